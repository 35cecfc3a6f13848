"""Is routing worth it? Compares models at equal training compute, by a queue of train.py runs that may be interrupted.

    python study.py plan                         # every run in order, with its cost
    python study.py run                          # works through it; stop it at any moment, start it again, start two
    python study.py status                       # what is done, what is left, how long that takes
    python study.py report                       # tables and pictures from the rows, rows of other machines included
    python study.py rerun KEY                    # trains one row once more at its own commit: is the loss the same?

The same on a GPU, with larger models and budgets (training FLOPs, head included):

    python study.py run --sizes 512,768,1024 --main 768 --layers 20 --budgets 1e18,3e18,1e19 --block-size 1024 \
        --batch-tokens 262144 --data data/fineweb --rows study/gpu.jsonl

A *run* is an arm (a kind of model), a width, a budget, a learning rate, an optimizer and a seed. Steps follow from the
budget: warm-up is 5 % of the steps of the smallest budget, cool-down 20 % of the run's own, so that runs which differ
only in budget share their plateau, and a larger one continues from where the smaller left it, which changes no bit. A
finished run is one line of the rows file, written at once; everything else can be deleted and is not asked for again.

Learning rates: --rates are tried at the smallest budget and the main width, with --sweep-seeds seeds each; while the
best mean is that of the smallest or the largest rate, half or twice of it is tried too (a single rate is taken as it
is). The best one serves the arm, and the arms that name it, at all widths, budgets and seeds.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from checkpoint import checkpoints, load_run, read_metrics, step_of
from cli import Parser, fail, flag
from eval import THRESHOLDS, flops, fractions, measure, rounded
from model import MoR, MoRConfig
from prepare import Shards, load_meta, load_tokenizer, tokenizer_file
from show import token_bytes
from train import round_vocabulary

ROOT = Path(__file__).resolve().parent


def arms(layers: int) -> dict[str, tuple[str, dict]]:
    """Returns the kinds of model: name -> (the arm whose learning rate it takes, MoRConfig fields).

    layers: unrolled depth L. MoR-3 costs about what 2 + (L - 2) 2/3 layers cost, and has 2 + (L - 2) / 3 of its own."""
    mean, unique = 2 + (layers - 2) * 2 // 3, 2 + (layers - 2) // 3
    two, three = dict(n_recursion=2), dict(n_recursion=3)
    expert = dict(router="expert")
    return {
        "vanilla": ("vanilla", dict()),
        "vanilla at mean depth": ("vanilla", dict(n_layer=mean)),
        "vanilla at equal parameters": ("vanilla", dict(n_layer=unique)),
        "recursive-2": ("recursive-3", two),
        "recursive-3": ("recursive-3", three),
        "recursive at mean depth": ("recursive-3", two | dict(n_layer=mean)),
        "MoR-2": ("MoR-2", two | expert),
        "MoR-3": ("MoR-3", three | expert),
        # controls: all but the choice of tokens is as in the MoR
        "MoR-3 random": ("MoR-3", three | dict(router="random")),
        "MoR-3 position": ("MoR-3", three | dict(router="position")),
        "MoR-3 gate alone": ("MoR-3", three | expert | dict(capacity=(1.0, 1.0, 1.0))),
        "MoR-2 gate alone": ("MoR-2", two | expert | dict(capacity=(1.0, 1.0))),
        # variants of the MoR, and of sharing
        "MoR-3 token": ("MoR-3", three | dict(router="token")),
        "MoR-3 token, none dropped": ("MoR-3", three | dict(router="token", capacity_slack=3.0)),
        "MoR-3 shared KV": ("MoR-3", three | expert | dict(kv="share")),
        "MoR-3 auxiliary 16e-3": ("MoR-3", three | expert | dict(aux_coef=1.6e-2)),
        "MoR-2 of MoR-3 blocks": ("MoR-3", two | expert | dict(n_layer=mean)),
        "recursive-3 cycle": ("recursive-3", three | dict(sharing="cycle")),
        "recursive-3 sequence": ("recursive-3", three | dict(sharing="sequence")),
        "recursive-3 middle sequence": ("recursive-3", three | dict(sharing="middle_sequence")),
    }


HEAD = ("vanilla", "MoR-3", "MoR-2", "recursive-3")
THREE = ("vanilla", "MoR-3", "recursive-3")
CONTROLS = ("MoR-3 gate alone", "recursive at mean depth", "MoR-3 random", "MoR-3 position")
SMALLER = ("vanilla at mean depth", "vanilla at equal parameters")
ROUTERS = ("MoR-3 token", "MoR-3 token, none dropped", "MoR-3 shared KV", "MoR-3 auxiliary 16e-3")
SHARING = ("recursive-3 cycle", "recursive-3 sequence", "recursive-3 middle sequence")
STAGES = (  # (optimizer, arms, widths, which budget, seeds), most wanted first; "main" is one width, "others" the rest
    ("adamw", THREE, "main", 0, (0,)),
    ("adamw", ("MoR-3", "MoR-3 auxiliary 16e-3"), "main", 0, (0, 1, 2)),
    ("adamw", CONTROLS, "main", 0, (0,)),
    ("adamw", THREE, "main", 0, (1, 2)),
    ("adamw", ("MoR-2", "recursive-2", "MoR-2 gate alone", *SMALLER), "main", 0, (0,)),
    ("adamw", ("vanilla",), "others", 0, (0,)),
    ("adamw", HEAD, "main", 1, (0, 1, 2)),
    ("adamw", (*CONTROLS, "MoR-2"), "main", 0, (1, 2)),
    ("adamw", ("vanilla", "MoR-3", "MoR-2"), "others", 1, (0,)),
    ("adamw", (*CONTROLS, "recursive-2", "MoR-2 gate alone", *SMALLER), "main", 1, (0,)),
    ("muon", THREE, "main", 1, (0, 1, 2)),
    ("adamw", HEAD, "main", 2, (0, 1, 2)),
    ("adamw", CONTROLS, "main", 1, (1, 2)),
    ("adamw", (*ROUTERS, "MoR-2 of MoR-3 blocks", *SHARING), "main", 1, (0,)),
    ("adamw", ("vanilla", "MoR-2"), "others", 2, (0,)),
    ("adamw", HEAD, "main", 3, (0,)),
    ("muon", ("vanilla", "MoR-3"), "main", 2, (0,)),
)
OPTIMIZERS = ("adamw", "muon")
PAIRS = (  # (arm, minus arm) whose losses are compared
    ("MoR-3", "vanilla"), ("MoR-2", "vanilla"), ("recursive-3", "vanilla"), ("recursive-2", "vanilla"),
    ("MoR-3", "recursive-3"), ("MoR-2", "recursive-2"),
    *(("MoR-3", control) for control in (*CONTROLS, *SMALLER)), ("MoR-2", "MoR-2 gate alone"),
    ("MoR-3 gate alone", "recursive-3"),
    *((variant, "MoR-3") for variant in ROUTERS), *((variant, "recursive-3") for variant in SHARING),
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One run."""

    arm: str
    width: int
    budget: float
    lr: float | None  # None: not known before the sweep is done
    optimizer: str = "adamw"
    seed: int = 0

    @property
    def key(self) -> str:
        parts = f"{self.arm}_d{self.width}_{self.budget:g}_{self.optimizer}_lr{self.lr:g}_s{self.seed}"
        return re.sub(r"[^\w.-]+", "-", parts.replace("e+", "e"))


# ----------------------------------------------------------------------------------------------------------------------
# what a run is


def model_config(args, spec: Spec) -> MoRConfig:
    """Returns the model of a run. A head is 64 wide from width 256 on; two query heads share a key/value head."""
    heads = 2 * max(2, spec.width // 128)
    sizes = dict(d_model=spec.width, d_ff=3 * spec.width, n_head=heads, n_kv_head=heads // 2)
    sizes |= dict(n_layer=args.layers, vocab_size=args.vocab_size, block_size=args.block_size)
    return MoRConfig.resized(sizes, arms(args.layers)[spec.arm][1])


def count_costs(config: MoRConfig) -> dict:
    """Returns the forward FLOPs per token, head included, by both conventions, and the parameters."""
    T = config.block_size
    with torch.device("meta"):
        model = MoR(config)
    return dict(
        flops_per_token=model.flops_per_token(T, head=True),
        flops_per_token_paper=model.flops_per_token(T, head=True, convention="paper"),
        params=model.num_params(),
        params_embedding=model.num_params(embedding=True),
    )


def make_schedule(args, spec: Spec, flops_per_token: float) -> dict:
    """Returns steps, warm-up, cool-down and the steps between checkpoints; ends the program over a budget that whole
    steps miss by more than 1 %."""
    per_step = 3 * flops_per_token * args.batch_tokens  # the backward pass costs twice the forward pass
    steps, smallest = round(spec.budget / per_step), round(min(args.budgets) / per_step)
    if steps < 20 or abs(steps * per_step / spec.budget - 1) > 0.01:
        what = f"a budget of {spec.budget:g} FLOPs is {spec.budget / per_step:.1f} steps of {spec.arm} {spec.width}"
        fail(f"{what}: raise --budgets or lower --batch-tokens")
    every = (steps - steps // 5) // 4  # four checkpoints on the plateau, the last of them at its end
    return dict(steps=steps, warmup=max(1, round(0.05 * smallest)), cooldown=steps - 4 * every, save_every=every)


def describe_run(args, spec: Spec) -> tuple[list[str], dict]:
    """Returns (the flags of train.py, what will be in the row besides results)."""
    config = model_config(args, spec)
    costs = count_costs(config)
    times = make_schedule(args, spec, costs["flops_per_token"])
    default = MoRConfig.preset("nano")
    always = "n_layer d_model d_ff n_head n_kv_head n_recursion router".split()
    others = "sharing kv aux_coef capacity capacity_slack block_size".split()
    given = {name: getattr(config, name) for name in always + others}
    given = {name: value for name, value in given.items() if name in always or value != getattr(default, name)}

    # the three newest checkpoints at the end: the plateau's end, maybe one in the cool-down, the last
    given |= dict(optimizer=spec.optimizer, lr=spec.lr, seed=spec.seed, dtype="bf16", batch_tokens=args.batch_tokens)
    given |= times | dict(eval_every=times["steps"], eval_tokens=args.eval_tokens, keep=3)
    given |= dict(data=args.data, out=f"{args.out}/{spec.key}")
    line = []
    for name, value in given.items():
        line += [flag(name), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    tokens = times["steps"] * args.batch_tokens
    facts = dict(key=spec.key) | vars(spec) | costs | times | dict(tokens=tokens)
    facts["flops"] = 3 * tokens * costs["flops_per_token"]
    facts["flops_paper"] = 3 * tokens * costs["flops_per_token_paper"]
    return line + shlex.split(args.extra), facts


# ----------------------------------------------------------------------------------------------------------------------
# the rows, and which runs are left


def read_rows(path: Path) -> list[dict]:
    """Returns the finished runs. What a crash left of a line is no row."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in whole.splitlines()]


def append_row(path: Path, row: dict) -> None:
    """Adds one line in place of what a crash left of one, and waits for the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)
        f.write(json.dumps(row).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def loss_of(row: dict) -> float:
    """Returns the causal loss, infinity for a run that diverged."""
    return math.inf if row["loss"] is None else row["loss"]


def sweep(args, rows: list[dict], arm: str, optimizer: str) -> tuple[dict[float, float], list[float]]:
    """Returns (loss by learning rate at the smallest budget, the rates that the sweep has to try). The loss is the mean
    over the first seeds, as a rate may serve one seed and wreck another."""
    wanted_row = (arm, optimizer, args.main, min(args.budgets))
    names = "arm optimizer width budget".split()
    by_rate = {}
    for row in rows:
        if tuple(row[name] for name in names) == wanted_row and row["seed"] < args.sweep_seeds:
            by_rate.setdefault(row["lr"], []).append(loss_of(row))
    tried = {lr: sum(losses) / len(losses) for lr, losses in by_rate.items() if len(losses) == args.sweep_seeds}
    wanted = sorted(args.rates)
    while set(wanted) <= tried.keys() and 1 < len(wanted) < len(args.rates) + 3:
        best = min(wanted, key=tried.get)
        if wanted[0] < best < wanted[-1]:
            break
        wanted = [best / 2, *wanted] if best == wanted[0] else [*wanted, best * 2]
    return tried, wanted


def best_rate(args, rows: list[dict], arm: str, optimizer: str, provisional: bool = False) -> float | None:
    """Returns the learning rate that an arm's runs take; None while its sweep is not done, unless the best of what was
    tried so far will do."""
    tried, wanted = sweep(args, rows, arms(args.layers)[arm][0], optimizer)
    if tried and (provisional or set(wanted) <= tried.keys()):
        return min(tried, key=tried.get)
    return None


def plan(args, rows: list[dict]) -> list[Spec]:
    """Returns every run in the order of its worth, a sweep before the first that needs its outcome. Runs that wait for
    a sweep have no learning rate yet."""
    widths = dict(main=[args.main], others=[w for w in args.sizes if w != args.main])
    budgets, kinds, specs = sorted(args.budgets), arms(args.layers), []
    middle = sorted(args.rates)[len(args.rates) // 2]
    for optimizer, names, which, budget, seeds in STAGES:
        if budget >= len(budgets):
            continue
        trials = []
        for arm in dict.fromkeys(kinds[name][0] for name in names):
            for lr in sweep(args, rows, arm, optimizer)[1]:
                swept = range(args.sweep_seeds)
                trials += [Spec(arm, args.main, budgets[0], lr, optimizer, seed) for seed in swept]
        specs += sorted(trials, key=lambda spec: (spec.seed, abs(math.log(spec.lr / middle)), -spec.lr))
        for seed in seeds:
            for width in widths[which]:
                for arm in names:
                    spec = Spec(arm, width, budgets[budget], best_rate(args, rows, arm, optimizer), optimizer, seed)
                    if spec.lr or replace(spec, lr=trials[0].lr) not in trials:  # else the sweep will have run it
                        specs.append(spec)
    return list(dict.fromkeys(specs))


def open_specs(args, rows: list[dict]) -> tuple[list[Spec], list[Spec]]:
    """Returns the runs of the plan that (are done, are not)."""
    keys = {row["key"] for row in rows}
    specs = plan(args, rows)
    done = [spec for spec in specs if spec.lr is not None and spec.key in keys]
    return done, [spec for spec in specs if spec not in done]


def check_rows(args) -> None:
    """Ends the program if the rows file holds runs of the same name that other flags made."""
    for spec, row in ((Spec(*(row[f.name] for f in fields(Spec))), row) for row in read_rows(args.rows)):
        facts = describe_run(args, spec)[1] | dict(eval_tokens=args.eval_tokens)
        wrong = [f"{name} {row[name]} there, {value} here" for name, value in facts.items() if row[name] != value]
        if wrong:
            fail(f"{args.rows}, row {spec.key}: {', '.join(wrong)}: repeat its flags, or give other --rows and --out")


# ----------------------------------------------------------------------------------------------------------------------
# running


def name_machine() -> str:
    """Returns the name of the device that trains."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    facts = dict(re.findall(r"^(model name|model)\s*: (.*)$", info.read_text(), re.M)) if info.exists() else {}
    name = f"{facts['model name']} model {facts['model']}" if len(facts) == 2 else platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def name_commit() -> str:
    """Returns the commit of the programs, with a + if one of them differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "HEAD", "--name-only", "--", "*.py"], capture_output=True, text=True).stdout
    return head + ("+" if changed.strip() else "")


def claim(args, spec: Spec):
    """Returns the open lock file of a run, None while another process works on it. The training process inherits the
    lock: one that outlives a killed queue keeps it until it ends."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    f = open(Path(args.out, f"{spec.key}.lock"), "w")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        return None
    return f


def find_plateau(args, spec: Spec) -> Path | None:
    """Returns the checkpoint at the end of the plateau of the largest smaller budget that was trained here."""
    for budget in sorted((b for b in args.budgets if b < spec.budget), reverse=True):
        facts = describe_run(args, replace(spec, budget=budget))[1]
        path = Path(args.out, facts["key"], f"ckpt_{facts['steps'] - facts['cooldown']:06d}.pt")
        if path.exists():
            return path
    return None


def train_one(args, spec: Spec, lock) -> dict:
    """Trains one run, or what is left of it -> its row. Raises RuntimeError where train.py fails."""
    line, row = describe_run(args, spec)
    out = Path(args.out, spec.key)
    shared = find_plateau(args, spec)
    more = ["--resume", str(shared)] if shared and not checkpoints(out) else []
    log_file = Path(args.out, f"{spec.key}.log")
    start, before = time.perf_counter(), os.times()
    with open(log_file, "ab") as log:
        command = [sys.executable, str(ROOT / "train.py"), *line, *more]
        status = wait_for(subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[lock.fileno()]))
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system

    # a run that diverged is a result too
    metrics = read_metrics(out)
    last = next((r for r in metrics[::-1] if "val_loss" in r), {})
    text = log_file.read_text(errors="replace")
    diverged = status != 0 and "updates in a row were not finite" in text[-3000:]
    if not diverged and (status != 0 or last.get("step") != row["steps"]):
        raise RuntimeError(f"train.py ended with status {status}: {' '.join(text.splitlines()[-1:])}")

    health = "val_loss_bpb selected selected_topk depth agreement dead maxvio entropy".split()
    row |= dict(loss=last.get("val_loss"), topk=last.get("val_topk"), eval_tokens=args.eval_tokens)
    row |= {name: last[name] for name in health if name in last}
    if not diverged:
        row |= examine(args, checkpoints(out)[-1])
    speeds = [r["tokens_per_second"] for r in metrics if "tokens_per_second" in r]
    continued = shared and metrics[0]["step"] > step_of(shared)
    return row | dict(
        seconds=round(row["tokens"] / float(np.median(speeds)), 1),
        fastest=round(max(speeds)),  # of any 20 steps: pauses and other programs only slow a run down
        wall=round(wall),
        cpu=round(cpu),
        alone=torch.cuda.is_available() or cpu > 0.9 * wall,
        commit=name_commit(),
        command=shlex.join(["python", "train.py", *line]),
        continued_from=shared.parent.name if continued else None,
        machine=name_machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        data=args.meta,
        date=time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    )


def wait_for(child: subprocess.Popen) -> int:
    """Returns the exit status of a training process. Ctrl-C and SIGTERM go on to it: it saves, and the queue ends."""
    asked = []

    def stop(number, _frame) -> None:
        asked.append(number)
        child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    status = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if asked:
        print("stopped; the same command goes on from here", flush=True)
        sys.exit(128 + asked[0])
    return status


def examine(args, checkpoint: Path) -> dict:
    """Returns what a row says of the trained weights: their digest, and loss and forward FLOPs per token, head
    included, when tokens may run less: bounded depth, other thresholds, exit by confidence."""
    model, _, state = load_run(checkpoint)
    digest = hashlib.sha256()
    for name in sorted(state["model"]):
        digest.update(state["model"][name].contiguous().view(torch.uint8).numpy().tobytes())
    c, found = model.config, dict(weights=digest.hexdigest()[:16])
    if c.n_recursion == 1 or "sequence" in c.sharing:
        return found
    rows = Shards(args.data, "val").blocks(c.block_size, args.eval_tokens // 4)
    knobs = [dict(max_depth=d) for d in range(1, c.n_recursion + 1)]
    if c.router == "expert":
        knobs += [dict(threshold=t) for t in THRESHOLDS if t != 0.5]
    head, found["scaling"] = 2 * c.d_model * c.vocab_size, []
    for knob in knobs:
        m = measure(model, rows, "causal", **knob)
        cost = dict(nll=m.nll.mean(dtype=float), flops_per_token=flops(model, m.depth) + head)
        found["scaling"].append(knob | cost | dict(depth=m.depth.mean()))
    if c.router == "none":
        found["confidence"] = exit_by_confidence(model, rows)
    else:
        found["difficulty"] = relate_depth(model, rows, classify_tokens(args, c.vocab_size))
    return rounded(found)


@torch.no_grad()
def predict(model: MoR, rows: np.ndarray, **knobs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (loss, entropy of the prediction, depth) of every token of the blocks [E, T+1]: each [E, T], in nats."""
    parts = []
    for block in torch.from_numpy(rows).split(8):
        out = model(block[:, :-1], routing="causal", **knobs)
        logp = out.logits.log_softmax(-1)
        loss = -logp.gather(-1, block[:, 1:, None])[..., 0]
        entropy = -(logp.exp() * logp).sum(-1)
        parts.append(torch.stack([loss, entropy, out.depth.float()]))
    return tuple(torch.cat(parts, 1).numpy())


def classify_tokens(args, vocab_size: int) -> np.ndarray:
    """Returns the class of each token id: 0 begins a word, 1 goes on with one, 2 digits, 3 space, 4 anything else. All
    are 4 where the data has no tokenizer beside it."""
    classes = np.full(vocab_size, 4)
    if not tokenizer_file(args.data):
        return classes
    enc = load_tokenizer(args.data)
    for token in range(enc.n_vocab - 1):  # the last one is end-of-text
        text = token_bytes(enc, token).decode(errors="replace")
        kinds = (text[:1] == " " and text[1:].isalpha(), text.isalpha(), text.strip().isdigit(), text.isspace(), True)
        classes[token] = kinds.index(True)
    return classes


def relate_depth(model: MoR, rows: np.ndarray, classes: np.ndarray) -> dict:
    """Returns Spearman's rank correlations of a token's depth with how hard its prediction is: its loss, its entropy,
    and its loss when all tokens stop after one recursion, which its own depth cannot lower. "raw" is over all tokens;
    the others compare tokens of one class within 32 positions."""
    loss, entropy, depth = predict(model, rows)
    alone = predict(model, rows, max_depth=1)[0]
    position = np.arange(loss.shape[1]) // 32
    strata = position * 8 + classes[rows[:, :-1]]
    found = dict(raw=correlate_ranks(depth, loss, np.zeros_like(strata)))
    for name, hard in dict(loss=loss, entropy=entropy, loss_at_depth_1=alone).items():
        found[name] = correlate_ranks(depth, hard, strata)
    return found


def correlate_ranks(a: np.ndarray, b: np.ndarray, strata: np.ndarray) -> float | None:
    """Returns the correlation of the ranks that a and b have in their stratum, ties sharing theirs; None where one of
    them never varies."""
    ranks = np.zeros((2, a.size))  # from -1/2 to 1/2
    for stratum in np.unique(strata):
        here = strata.ravel() == stratum
        n = here.sum()
        for i, x in enumerate((a, b)):
            _, which, counts = np.unique(x.ravel()[here], return_inverse=True, return_counts=True)
            rank = counts.cumsum() - (counts - 1) / 2
            ranks[i, here] = (rank[which] - (n + 1) / 2) / n
    products = ranks @ ranks.T
    spread = math.sqrt(products[0, 0] * products[1, 1])
    return float(products[0, 1] / spread) if spread else None


def exit_by_confidence(model: MoR, rows: np.ndarray, limits: tuple = (1, 2, 3, 4, 5, 6)) -> list[dict]:
    """Returns loss and FLOPs when a token of a recursive model stops as soon as the entropy of its next-token
    distribution, in nats, is below a limit. Kind to the method: the tokens that go on see all keys of their depth, also
    those of tokens that stopped. Each look costs the last layer and the head."""
    c = model.config
    looks = [predict(model, rows, max_depth=depth) for depth in range(1, c.n_recursion + 1)]
    losses, entropies, _ = zip(*looks, strict=True)
    # a look costs the last layer, as much as one of the block, and the head
    T, found = c.block_size, []
    block = model.flops_per_token(T) - model.flops_per_token(T, fractions=[1.0] * (c.n_recursion - 1) + [0.0])
    look = 2 * c.d_model * c.vocab_size
    if c.n_unshared:
        look += block / c.n_block
    for limit in limits:
        sure = np.stack(entropies) < limit
        sure[-1] = True
        at = sure.argmax(0)  # [E, T] the first depth, from 0, that is sure
        nll = np.take_along_axis(np.stack(losses), at[None], 0).mean(dtype=float)
        share = fractions(at + 1, c.n_recursion)
        cost = model.flops_per_token(T, head=True, fractions=share) + at.mean() * look
        found.append(dict(limit=limit, nll=nll, flops_per_token=cost, depth=at.mean() + 1))
    return found


def run(args) -> None:
    """Works through the plan until every run is done or has failed."""
    check_rows(args)
    failed = {}
    while True:
        left = [s for s in open_specs(args, read_rows(args.rows))[1] if s.lr is not None and s.key not in failed]
        if not left:
            break
        claims = ((spec, claim(args, spec)) for spec in left)
        spec, lock = next((pair for pair in claims if pair[1]), (None, None))
        if spec is None:
            time.sleep(2)  # others have them all, or what a killed queue left running does
            continue
        with lock:
            if spec.key in {row["key"] for row in read_rows(args.rows)}:
                continue  # another process finished it in the meantime
            print(f"{time.strftime('%H:%M:%S')} {spec.key} ({len(left)} runs can start)", flush=True)
            try:
                row = train_one(args, spec, lock)
            except RuntimeError as e:
                failed[spec.key] = str(e)
                continue
            append_row(args.rows, row)
        print(f"{time.strftime('%H:%M:%S')} {spec.key} loss {row['loss']}, {row['wall']} s", flush=True)
        for path in checkpoints(Path(args.out, spec.key)):
            if step_of(path) not in (row["steps"], row["steps"] - row["cooldown"]):
                path.unlink()
    if failed:
        fail("; ".join(f"{key}: {reason}" for key, reason in failed.items()))


def repeat(args, row: dict, code: Path, out: Path) -> dict:
    """Trains a row from nothing with the train.py in `code` -> losses and digest of the weights, as in the row."""
    line = shlex.split(row["command"])[2:]
    status = subprocess.run([sys.executable, str(code / "train.py"), *line, "--out", str(out)]).returncode
    if status:
        fail(f"train.py ended with status {status}")
    last = read_metrics(out)[-1]
    weights = examine(args, checkpoints(out)[-1])["weights"]
    return dict(loss=last.get("val_loss"), topk=last.get("val_topk"), weights=weights)


def rerun(args) -> None:
    """Trains one row again with the programs of its commit. Exits with 1 if a loss or a weight differs."""
    row = next((row for row in read_rows(args.rows) if row["key"] == args.key), None)
    if row is None:
        fail(f"{args.rows} has no row {args.key}: study.py status lists them")
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch, "code")
        if subprocess.run([*git, "add", "--quiet", "--detach", str(code), row["commit"].rstrip("+")]).returncode:
            fail(f"commit {row['commit']} of {args.key} cannot be checked out: fetch it first")
        try:
            now = repeat(args, row, code, Path(scratch, "run"))
        finally:
            subprocess.run([*git, "remove", "--force", str(code)])
    then = {name: row[name] for name in now}
    print(f"row {then}\nnow {now}\n{'equal to the bit' if now == then else 'DIFFERENT'}")
    sys.exit(0 if now == then else 1)


# ----------------------------------------------------------------------------------------------------------------------
# the report

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, 97.5 %, by the number of seeds


@dataclass(frozen=True)
class Group:
    """What was compared: runs that differ only in their seed."""

    optimizer: str
    arm: str
    width: int
    budget: float


def group_rows(args, rows: list[dict]) -> dict[Group, dict[int, dict]]:
    """Returns the rows at their arm's learning rate, by group and seed; groups by budget, optimizer, arm, width."""
    groups = {}
    for row in rows:
        if row["lr"] == best_rate(args, rows, row["arm"], row["optimizer"], provisional=True):
            group = Group(row["optimizer"], row["arm"], row["width"], row["budget"])
            groups.setdefault(group, {})[row["seed"]] = row
    order = list(arms(args.layers))
    return dict(sorted(groups.items(), key=lambda item: (item[0].budget, item[0].optimizer, order.index(item[0].arm))))


def interval(values: list[float]) -> tuple[float, float | None]:
    """Returns (mean, half the 95 % interval); one value has no interval."""
    n = len(values)
    if n < 2:
        return values[0], None
    return float(np.mean(values)), T95.get(n, 2.3) * float(np.std(values, ddof=1)) / math.sqrt(n)


def show_interval(values: list[float], sign: str = "") -> str:
    mean, half = interval(values)
    return f"{mean:{sign}.3f}" if half is None else f"{mean:{sign}.3f} ± {half:.3f}"


def mean_loss(seeds: dict[int, dict]) -> float:
    return interval([loss_of(row) for row in seeds.values()])[0]


def seconds_of(rows: list[dict], row: dict) -> float | None:
    """Returns the seconds of a run at the best speed of this arm and width on its machine, seen in runs that had a core
    to themselves; None if there were none."""
    kind = [row[name] for name in ("arm", "width", "machine")]
    same = [r for r in rows if [r[name] for name in ("arm", "width", "machine")] == kind and r.get("alone")]
    return row["tokens"] / max(r["fastest"] for r in same) if same else None


def compare(groups: dict, group: Group, minus: str) -> list[float]:
    """Returns the differences of causal loss to the arm `minus`, one for each seed that both have."""
    ours = groups.get(group, {})
    theirs = groups.get(replace(group, arm=minus), {})
    both = sorted(ours.keys() & theirs.keys())
    return [loss_of(ours[seed]) - loss_of(theirs[seed]) for seed in both]


def compared(args, groups: dict) -> list[tuple[str, str, str, list[list[float]]]]:
    """Returns (arm, minus arm, optimizer, differences for each budget) of all PAIRS that have any."""
    found = []
    for optimizer in OPTIMIZERS:
        for arm, minus in PAIRS:
            each = [compare(groups, Group(optimizer, arm, args.main, b), minus) for b in sorted(args.budgets)]
            if any(each):
                found.append((arm, minus, optimizer, each))
    return found


def write_table(title: str, head: list[str], lines: list[list]) -> list[str]:
    """Returns a table in Markdown, below its title."""
    cells = [head, ["---"] * len(head), *lines]
    return [title, "", *("| " + " | ".join(map(str, line)) + " |" for line in cells), ""]


def write_tables(args, rows: list[dict]) -> list[str]:
    """Returns the tables, as lines of Markdown."""
    groups, budgets = group_rows(args, rows), sorted(args.budgets)
    done, left = open_specs(args, rows)
    page = [f"{len(done)} of {len(done) + len(left)} runs of the plan are done. Losses are nats per token of held-out"]
    page += ["documents with causal routing; intervals are 95 % over seeds, differences paired by seed. Seconds are at"]
    page += ["the best speed of runs that had a core to themselves, empty where none had.", ""]
    columns = [f"{budget:g}" for budget in budgets]

    lines = []
    for arm, minus, optimizer, each in compared(args, groups):
        shown = [f"{show_interval(values, '+')} ({len(values)})" if values else "" for values in each]
        lines.append([f"{arm} − {minus}", optimizer, *shown])
    title = f"**Differences** at width {args.main} by training FLOPs (seeds); below 0 the first arm is better."
    page += write_table(title, ["arms", "optimizer", *columns], lines)

    lines = []
    for arm in HEAD:
        line = [arm]
        for budget in budgets:
            same = [Group("adamw", arm, width, budget) for width in args.sizes]
            found = [(loss_of(groups[group][0]), group.width) for group in same if 0 in groups.get(group, {})]
            line.append("{:.3f} ({})".format(*min(found)) if found else "")
        lines.append(line)
    page += write_table("**Best of the widths** by training FLOPs, seed 0: loss (width).", ["arm", *columns], lines)

    lines = []
    for group, seeds in groups.items():
        row, everyone = next(iter(seeds.values())), list(seeds.values())
        counts = [f"{x / 1e6:.2f}" for x in (row["params"], row["params_embedding"], row["tokens"])]
        seconds = seconds_of(rows, row)
        costs = [f"{row['flops_paper']:.3g}", f"{seconds:.0f}" if seconds else ""]
        topk = "" if row["topk"] is None else show_interval([r["topk"] for r in everyone])
        losses = [len(seeds), show_interval([loss_of(r) for r in everyone]), topk]
        share = "/".join(f"{x:.2f}" for x in row.get("selected", []))
        line = [
            f"{group.budget:g}",
            group.arm,
            group.optimizer,
            group.width,
            row["lr"],
            *counts,
            *costs,
            *losses,
            share,
        ]
        lines.append(line)
    head = "FLOPs|arm|optimizer|width|rate|M parameters|with embedding|M tokens|FLOPs by the paper's count|seconds"
    head += "|seeds|loss|top-k loss|share of tokens per recursion"
    page += write_table("**All arms** at equal training FLOPs, head included.", head.split("|"), lines)

    sweeps = {(arm, optimizer): sweep(args, rows, arm, optimizer) for optimizer in OPTIMIZERS for arm in HEAD}
    rates, lines = sorted({lr for tried, _ in sweeps.values() for lr in tried}), []
    for (arm, optimizer), (tried, wanted) in sweeps.items():
        cells = [f"{tried[lr]:.3f}" if lr in tried else "" for lr in rates]
        if tried:
            best = rates.index(min(tried, key=tried.get))
            cells[best] = f"**{cells[best]}**"
            lines.append([arm, optimizer, *cells, "yes" if set(wanted) <= tried.keys() else "not yet"])
    title = f"**Learning rates**: loss at {budgets[0]:g} FLOPs, width {args.main}, mean of {args.sweep_seeds} seeds."
    page += write_table(title, ["arm", "optimizer", *(f"{lr:g}" for lr in rates), "bracketed"], lines)

    lines = []
    for group, seeds in groups.items():
        found = [row["difficulty"] for row in seeds.values() if "difficulty" in row]
        if found and None not in [x for each in found for x in each.values()]:
            cells = [show_interval([each[kind] for each in found], "+") for kind in found[0]]
            lines.append([f"{group.budget:g}", group.arm, group.optimizer, group.width, *cells])
    if lines:
        title = (
            "**Depth and difficulty**: rank correlation of a token's depth with its loss over all tokens; then, among "
        )
        title += "tokens of one class within 32 positions, with its loss, its entropy and its loss at one recursion."
        head = "FLOPs|arm|optimizer|width|loss, all tokens|loss|entropy|loss at one recursion"
        page += write_table(title, head.split("|"), lines)
    return page


def draw_losses(args, rows: list[dict], axes) -> None:
    """Loss against FLOPs and seconds, lines through the best width of each budget; against parameters."""
    groups = group_rows(args, rows)
    for color, arm in enumerate(HEAD):
        points = {}
        for group, seeds in groups.items():
            if (group.arm, group.optimizer) == (arm, "adamw"):
                row = next(iter(seeds.values()))
                cost = row["flops"], seconds_of(rows, row) or math.nan, row["params"]
                points.setdefault(group.budget, []).append((mean_loss(seeds), *cost))
        everyone = [point for same in points.values() for point in same]
        envelope = [min(same) for same in points.values()]
        for x, axis in enumerate(axes, 1):
            axis.plot([p[x] for p in everyone], [p[0] for p in everyone], "o", color=f"C{color}", alpha=0.5, label=arm)
            for line in points.values() if x == 3 else [envelope]:
                line = sorted(line, key=lambda p: p[3 if x == 3 else 1])
                axis.plot([p[x] for p in line], [p[0] for p in line], color=f"C{color}")
    names = "training FLOPs", "seconds at the best speed", "parameters without embedding"
    for axis, name in zip(axes, names, strict=True):
        axis.set(xscale="log", xlabel=name, ylabel="nats per token")
    axes[0].set_xlim(min(args.budgets) / 2, max(args.budgets) * 2)
    if not any(seconds_of(rows, row) for row in rows):
        axes[1].text(0.5, 0.5, "no run had a core to itself", ha="center", transform=axes[1].transAxes)
    axes[0].legend(frameon=False, fontsize=8)


def draw_differences(args, rows: list[dict], axis) -> None:
    """Differences of loss, paired by seed, with their 95 % intervals; a single seed has none."""
    labels = []
    for arm, minus, optimizer, each in compared(args, group_rows(args, rows)):
        for color, (budget, values) in enumerate(zip(sorted(args.budgets), each, strict=True)):
            if values:
                mean, half = interval(values)
                axis.errorbar(mean, len(labels), xerr=half, fmt="o", color=f"C{color}", capsize=3)
                labels.append(f"{arm} − {minus}, {optimizer}, {budget:g} ({len(values)})")
    axis.axvline(0, color="gray", lw=1)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("nats per token (seeds)")


def draw_depths(args, rows: list[dict], axis) -> None:
    """Loss of one model when its tokens run less: bounded depth, thresholds, exit by confidence."""
    largest = {}  # of the largest budget, as groups come by budget
    for group, seeds in group_rows(args, rows).items():
        if (group.optimizer, group.width) == ("adamw", args.main):
            largest[group.arm] = seeds
    for color, arm in enumerate(HEAD):
        row = next(iter(largest[arm].values())) if arm in largest else {}
        curves = {"confidence": row.get("confidence", [])}
        for knob in ("max_depth", "threshold"):
            curves[knob] = [point for point in row.get("scaling", []) if knob in point]
        for (name, curve), style in zip(curves.items(), ("s:", "o-", "^--"), strict=True):
            points = sorted((point["flops_per_token"] / 1e6, point["nll"]) for point in curve)
            if points:
                axis.plot(*zip(*points, strict=True), style, color=f"C{color}", ms=4, label=f"{arm}, {name}")
    axis.set(xlabel="forward MFLOPs per token, head included", ylabel="nats per token")
    axis.legend(frameon=False, fontsize=8)


def report(args) -> None:
    """Writes pictures to assets/, and them and the tables into the page, between its two markers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, begin, end = read_rows(args.rows), "<!-- study -->", "<!-- /study -->"
    if not rows:
        fail(f"{args.rows} has no rows: study.py run makes them")
    text = args.page.read_text() if args.page.exists() else f"{begin}\n{end}\n"
    if begin not in text or end not in text:
        fail(f"{args.page} has no lines {begin} and {end}: add them where the tables belong")
    page, assets = [begin, *write_tables(args, rows)], args.page.parent / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    pictures = (draw_losses, "loss", 3), (draw_differences, "difference", 1), (draw_depths, "depth", 1)
    for draw, name, columns in pictures:
        figure, axes = plt.subplots(1, columns, figsize=(4 * columns + 4 // columns, 4), layout="constrained")
        draw(args, rows, axes)
        figure.savefig(assets / f"study_{name}.png", dpi=120)
        plt.close(figure)
        page.append(f"![{draw.__doc__}](assets/study_{name}.png)")
    before, after = text.split(begin)[0], text.split(end)[1]
    args.page.write_text(before + "\n".join([*page, end]) + after)
    print(f"wrote {args.page} and the pictures in {assets}")


# ----------------------------------------------------------------------------------------------------------------------
# command line


def show_plan(args) -> None:
    """Prints every run in order: whether it is done, steps, tokens, parameters."""
    rows = read_rows(args.rows)
    done = open_specs(args, rows)[0]
    for spec in plan(args, rows):
        row = describe_run(args, replace(spec, lr=spec.lr or 0.0))[1]
        name = f"{spec.arm}, width {spec.width}, {spec.budget:g} FLOPs, {spec.optimizer} {spec.lr or 'best'}"
        name += f", seed {spec.seed}"
        cost = f"{row['steps']:6} steps {row['tokens'] / 1e6:6.2f}M tokens {row['params'] / 1e6:.2f}M + embedding"
        print(f"{'done' if spec in done else '    '} {name:78} {cost}")


def show_status(args) -> None:
    """Prints the rows, and how long what is left takes at the speed of the rows."""
    rows = read_rows(args.rows)
    done, left = open_specs(args, rows)
    for row in rows:
        print(f"{row['key']:64} loss {row['loss']}  {row['wall']} s  {row['date']}")
    flops_left = sum(spec.budget for spec in left)
    print(f"{len(done)} of {len(done) + len(left)} runs are done; left: {flops_left:.3g} FLOPs", end="")
    if rows:
        seconds = sum(
            max(1, min(row["wall"], row.get("cpu", row["wall"]))) for row in rows
        )  # CPU time if it was paused
        hours = flops_left / sum(row["flops"] for row in rows) * seconds / 3600
        print(f", {hours:.1f} hours for one queue that is not disturbed")
    else:
        print()


def numbers(kind: type) -> Callable[[str], list]:
    return lambda text: [kind(float(x)) for x in text.split(",")]


def read_flags(argv: list[str] | None):
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("what", choices=("plan", "run", "status", "report", "rerun"))
    add("key", nargs="?", help="of the row that rerun trains again")
    add("--rows", type=Path, default=ROOT / "study" / "rows.jsonl", help="finished runs (default: study/rows.jsonl)")
    add("--out", default="out/study", help="where runs are trained (default: out/study)")
    add("--data", default="data/debian", help="what prepare.py made (default: data/debian)")
    add("--sizes", type=numbers(int), default=[64, 96, 128], help="widths (default: 64,96,128)")
    add("--main", type=int, default=96, help="width of all but the comparison of widths (default: 96)")
    add("--layers", type=int, default=8, help="unrolled layers: 8, 14, 20, 26 or 32 (default: 8)")
    add("--budgets", type=numbers(float), default=[1e13, 3e13, 1e14, 3e14], help="FLOPs (default: 1e13,3e13,1e14,3e14)")
    add("--rates", type=numbers(float), default=[3e-3, 6e-3, 1.2e-2], help="of the sweep (default: 3e-3,6e-3,1.2e-2)")
    add("--sweep-seeds", type=int, default=2, help="seeds that the sweep takes the mean of (default: 2)")
    add("--block-size", type=int, default=256, help="context (default: 256)")
    add("--batch-tokens", type=int, default=1024, help="tokens a step (default: 1024)")
    add("--eval-tokens", type=int, default=131072, help="of held-out documents (default: 131072)")
    add("--page", type=Path, default=ROOT / "RESULTS.md", help="where report writes (default: RESULTS.md)")
    add("--extra", default="", help="further flags for train.py, in one string")
    args = parser.parse_args(argv)
    if args.layers % 6 != 2:
        fail(f"--layers {args.layers}: two unshared layers and a multiple of 6 are needed: use 8, 14, 20, 26 or 32")
    if args.sweep_seeds < 1:
        fail(f"--sweep-seeds {args.sweep_seeds} must be at least 1")
    if args.main not in args.sizes:
        fail(f"--main {args.main} is not among --sizes {','.join(map(str, args.sizes))}: add it")
    if (args.what == "rerun") != (args.key is not None):
        fail("rerun needs the key of a row, and nothing else takes one: study.py rerun KEY")
    if args.what in ("plan", "run", "rerun"):  # rows alone tell the rest
        meta = load_meta(args.data)
        args.vocab_size = round_vocabulary(meta["vocab_size"])
        args.meta = {name: meta[name] for name in ("tokenizer", "train_tokens", "val_tokens")}
    return args


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    if args.what in ("plan", "status"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # study.py plan | head
    {"plan": show_plan, "run": run, "status": show_status, "report": report, "rerun": rerun}[args.what](args)


if __name__ == "__main__":
    main()
