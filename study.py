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

Learning rates: --rates are tried at the smallest budget for the arms of SWEPT; while the best of them is the smallest
or the largest, half or twice of it is tried too. That rate serves the arm, and the arms that name it, everywhere.
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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from checkpoint import checkpoints, load_run, step_of
from cli import Parser, fail, flag
from model import CHOICES as MODEL_CHOICES
from model import MoR, MoRConfig
from prepare import load_meta
from train import read_metrics

ROOT = Path(__file__).resolve().parent


def arms(layers: int) -> dict[str, tuple[str, dict]]:
    """Returns the kinds of model: name -> (the arm whose learning rate it takes, MoRConfig fields).

    layers: unrolled depth L. MoR-3 costs about as much as 2 + (L - 2) 2/3 layers, and has 2 + (L - 2) / 3 of its own."""
    mean, unique = 2 + (layers - 2) * 2 // 3, 2 + (layers - 2) // 3
    mor = dict(router="expert")
    return {
        "vanilla": ("vanilla", dict()),
        "vanilla, MoR-3's mean depth": ("vanilla", dict(n_layer=mean)),
        "vanilla, MoR-3's parameters": ("vanilla", dict(n_layer=unique)),
        "recursive-2": ("recursive-3", dict(n_recursion=2)),
        "recursive-3": ("recursive-3", dict(n_recursion=3)),
        "recursive, MoR-3's mean depth": ("recursive-3", dict(n_recursion=2, n_layer=mean)),
        "MoR-2": ("MoR-2", dict(n_recursion=2) | mor),
        "MoR-3": ("MoR-3", dict(n_recursion=3) | mor),
        # controls: all but the choice of tokens is MoR-3's
        "MoR-3 random": ("MoR-3", dict(n_recursion=3, router="random")),
        "MoR-3 position": ("MoR-3", dict(n_recursion=3, router="position")),
        "MoR-3 gate alone": ("MoR-3", dict(n_recursion=3, capacity=(1.0, 1.0, 1.0)) | mor),
        "MoR-2 gate alone": ("MoR-2", dict(n_recursion=2, capacity=(1.0, 1.0)) | mor),
        # variants
        "MoR-3 token": ("MoR-3", dict(n_recursion=3, router="token")),
        "MoR-3 token, none dropped": ("MoR-3", dict(n_recursion=3, router="token", capacity_slack=3.0)),
        "MoR-3 shared KV": ("MoR-3", dict(n_recursion=3, kv="share") | mor),
        "MoR-3 auxiliary 16e-3": ("MoR-3", dict(n_recursion=3, aux_coef=1.6e-2) | mor),
        "MoR-2, MoR-3's block": ("MoR-3", dict(n_recursion=2, n_layer=mean) | mor),
        "recursive-3 cycle": ("recursive-3", dict(n_recursion=3, sharing="cycle")),
        "recursive-3 sequence": ("recursive-3", dict(n_recursion=3, sharing="sequence")),
        "recursive-3 middle sequence": ("recursive-3", dict(n_recursion=3, sharing="middle_sequence")),
    }


HEAD = ("vanilla", "MoR-3", "MoR-2", "recursive-3")
SWEPT = {"adamw": HEAD, "muon": ("vanilla", "MoR-3", "recursive-3")}
CONTROLS = "recursive, MoR-3's mean depth; MoR-3 gate alone; MoR-3 random; MoR-3 position; MoR-2 gate alone".split("; ")
SMALLER = ("vanilla, MoR-3's mean depth", "vanilla, MoR-3's parameters")
VARIANTS = (
    "MoR-3 token; MoR-3 token, none dropped; MoR-3 shared KV; MoR-3 auxiliary 16e-3; MoR-2, MoR-3's block; "
    "recursive-3 cycle; recursive-3 sequence; recursive-3 middle sequence"
).split("; ")
STAGES = (  # (optimizer, arms, widths, which budget, seeds), most wanted first; "main" is one width, "others" the rest
    ("adamw", HEAD, "main", 0, (1, 2)),
    ("adamw", ("recursive-2", *CONTROLS), "main", 0, (0,)),
    ("adamw", ("vanilla",), "others", 0, (0,)),
    ("adamw", HEAD, "main", 1, (0, 1, 2)),
    ("adamw", ("vanilla", "MoR-3", "MoR-2"), "others", 1, (0,)),
    ("adamw", CONTROLS, "main", 0, (1, 2)),
    ("adamw", (*CONTROLS, "recursive-2", *SMALLER), "main", 1, (0,)),
    ("muon", ("vanilla", "MoR-3", "recursive-3"), "main", 1, (0, 1, 2)),
    ("adamw", CONTROLS, "main", 1, (1, 2)),
    ("adamw", VARIANTS, "main", 0, (0,)),
    ("adamw", VARIANTS, "main", 1, (0,)),
    ("adamw", HEAD, "main", 2, (0,)),
    ("adamw", ("vanilla", "MoR-2"), "others", 2, (0,)),
)


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
        name = re.sub(r"[^\w.-]+", "-", self.arm.replace("'", ""))
        return f"{name}_d{self.width}_{self.budget:.0e}_{self.optimizer}_lr{self.lr}_s{self.seed}".replace("e+", "e")


# ----------------------------------------------------------------------------------------------------------------------
# what a run is


def model_config(args, spec: Spec) -> MoRConfig:
    """Returns the model of a run. A head is 64 wide from width 256 on; two query heads share a key/value head."""
    heads = 2 * max(2, spec.width // 128)
    sizes = dict(n_layer=args.layers, d_model=spec.width, d_ff=3 * spec.width, n_head=heads, n_kv_head=heads // 2)
    fixed = dict(vocab_size=args.vocab_size, block_size=args.block_size)
    own = arms(args.layers)[spec.arm][1]
    if own.get("sharing", "middle_cycle").startswith("middle"):
        return MoRConfig(**fixed | sizes | own)
    return MoRConfig.resized(fixed | sizes, own)  # the depth grows until the recursions divide it


def count(config: MoRConfig, T: int) -> dict:
    """Returns the forward FLOPs per token, head included, by both conventions, and the parameters. The paper counts the
    projections of keys and values at full width, whatever the grouping of heads."""
    with torch.device("meta"):
        model, full = MoR(config), MoR(replace(config, n_kv_head=config.n_head))
    return dict(
        flops_per_token=model.flops_per_token(T, head=True),
        flops_per_token_paper=full.flops_per_token(T, head=True),
        params=model.num_params(),
        params_embedding=model.num_params(embedding=True),
    )


def schedule(args, spec: Spec, flops_per_token: float) -> dict:
    """Returns steps, warm-up, cool-down and the steps between checkpoints. The budget must be met within 1 %."""
    per_step = 3 * flops_per_token * args.batch_tokens  # the backward pass costs twice the forward pass
    steps, smallest = round(spec.budget / per_step), round(min(args.budgets) / per_step)
    if steps < 20 or abs(steps * per_step / spec.budget - 1) > 0.01:
        remedy = "raise --budgets or lower --batch-tokens"
        fail(f"a budget of {spec.budget:.1e} FLOPs is {spec.budget / per_step:.1f} steps of {spec.arm}: {remedy}")
    every = (steps - steps // 5) // 4  # four checkpoints on the plateau, the last of them at its end
    return dict(steps=steps, warmup=max(1, round(0.05 * smallest)), cooldown=steps - 4 * every, save_every=every)


def train_flags(args, spec: Spec) -> tuple[list[str], dict, dict]:
    """Returns (the command line of train.py, what the model costs, its schedule)."""
    config = model_config(args, spec)
    costs = count(config, args.block_size)
    times = schedule(args, spec, costs["flops_per_token"])
    given = "n_layer d_model d_ff n_head n_kv_head n_recursion sharing router kv aux_coef capacity capacity_slack"
    default = MoRConfig.preset("nano")
    fields = {f: getattr(config, f) for f in given.split()}
    always = given.split()[:8]
    fields = {f: value for f, value in fields.items() if f in always or value != getattr(default, f)}
    if args.block_size != default.block_size:
        fields["block_size"] = args.block_size
    fields |= dict(data=args.data, out=f"{args.out}/{spec.key}", lr=spec.lr, seed=spec.seed) | times
    fields |= dict(batch_tokens=args.batch_tokens, eval_tokens=args.eval_tokens, eval_every=times["steps"], keep=3)
    fields |= dict(dtype="bf16")
    if spec.optimizer != "adamw":
        fields["optimizer"] = spec.optimizer
    line = []
    for name, value in fields.items():
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        line += [flag(name), str(value)]
    if args.device == "cpu" and not args.compile:
        line.append("--no-compile")
    return line, costs, times


# ----------------------------------------------------------------------------------------------------------------------
# the rows, and which runs are left


def read_rows(path: Path) -> list[dict]:
    """Returns the finished runs. What a crash left of a line is no row."""
    rows = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            rows.append(json.loads(line if line.endswith("\n") else ""))
        except json.JSONDecodeError:
            continue
    return rows


def append_row(path: Path, row: dict) -> None:
    """Writes one line and waits for the disk. The remains of a torn line end up on a line of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 1))
        torn = size and f.read(1) != b"\n"
        f.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def spec_of(row: dict) -> Spec:
    return Spec(*(row[k] for k in ("arm", "width", "budget", "lr", "optimizer", "seed")))


def loss_of(row: dict) -> float:
    """Returns the causal loss, infinity for a run that diverged."""
    return math.inf if row["loss"] is None else row["loss"]


def tune(args, rows: list[dict], arm: str, optimizer: str) -> tuple[float | None, list[float]]:
    """Returns (the best learning rate of an arm, None while it is not known; the rates that must be tried for it)."""
    first = [r for r in rows if (r["arm"], r["optimizer"], r["seed"]) == (arm, optimizer, 0)]
    tried = {r["lr"]: loss_of(r) for r in first if (r["width"], r["budget"]) == (args.main, min(args.budgets))}
    wanted = sorted(args.rates)
    while all(lr in tried for lr in wanted):
        best = min(wanted, key=tried.get)
        inside = wanted[0] < best < wanted[-1]
        if inside or len(wanted) >= len(args.rates) + 3:
            return best, wanted
        wanted = [best / 2, *wanted] if best == wanted[0] else [*wanted, best * 2]
    return None, wanted


def plan(args, rows: list[dict]) -> list[Spec]:
    """Returns every run in the order of its worth. Before a sweep is done, the runs that wait for it have no rate."""
    widths = dict(main=[args.main], others=[w for w in args.sizes if w != args.main])
    smallest, specs = min(args.budgets), []

    def sweep(optimizer: str) -> None:
        rates = {arm: tune(args, rows, arm, optimizer)[1] for arm in SWEPT[optimizer]}
        for lr in sorted(set(sum(rates.values(), [])), key=lambda lr: abs(math.log(lr / args.rates[1]))):
            specs.extend(Spec(arm, args.main, smallest, lr, optimizer) for arm in rates if lr in rates[arm])

    sweep("adamw")
    for optimizer, names, which, budget, seeds in STAGES:
        if budget >= len(args.budgets):
            continue
        if optimizer not in {spec.optimizer for spec in specs}:
            sweep(optimizer)
        for seed in seeds:
            for width in widths[which]:
                for arm in names:
                    if arms(args.layers)[arm][1].get("router", "none") not in MODEL_CHOICES["router"]:
                        continue
                    lr = tune(args, rows, arms(args.layers)[arm][0], optimizer)[0]
                    specs.append(Spec(arm, width, sorted(args.budgets)[budget], lr, optimizer, seed))
    return list(dict.fromkeys(specs))


# ----------------------------------------------------------------------------------------------------------------------
# running


def machine() -> str:
    """Returns the name of the device that trains."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$|^model\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    flat = [name or f"model {number}" for name, number in names[:2]]
    return f"{' '.join(flat[::-1]) or platform.processor()}, {os.cpu_count()} cores"


def commit() -> str:
    """Returns the commit of the code, with a + if a program differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "HEAD", "--name-only", "--", "*.py"], capture_output=True, text=True).stdout
    return head + "+" * bool(changed.strip())


def cpu_seconds() -> tuple[float, float]:
    """Returns the CPU seconds that (the whole machine, this program's finished children) have used; 0 if unknown."""
    stat, own = Path("/proc/stat"), os.times()
    ticks = stat.read_text().split()[1:9] if stat.exists() else []
    busy = sum(int(t) for i, t in enumerate(ticks) if i not in (3, 4)) / os.sysconf("SC_CLK_TCK")
    return busy, own.children_user + own.children_system


def claim(args, spec: Spec):
    """Returns the open lock file of a run, None while another process works on it. The training process inherits the
    lock: one that outlives a killed queue keeps it until it ends."""
    directory = Path(args.out)
    directory.mkdir(parents=True, exist_ok=True)
    f = open(directory / f"{spec.key}.lock", "w")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        return None
    os.set_inheritable(f.fileno(), True)
    return f


def plateau_of_smaller(args, spec: Spec) -> Path | None:
    """Returns the checkpoint at the end of the plateau of the largest smaller budget that was trained here."""
    for budget in sorted((b for b in args.budgets if b < spec.budget), reverse=True):
        smaller = replace(spec, budget=budget)
        times = train_flags(args, smaller)[2]
        path = Path(args.out, smaller.key, f"ckpt_{times['steps'] - times['cooldown']:06d}.pt")
        if path.exists():
            return path
    return None


def train_one(args, spec: Spec, lock) -> dict | None:
    """Trains one run, or what is left of it -> its row; None if it was stopped."""
    line, costs, times = train_flags(args, spec)
    out = Path(args.out, spec.key)
    shared = plateau_of_smaller(args, spec)
    more = ["--resume", str(shared)] if shared and not checkpoints(out) else []
    before, start = cpu_seconds(), time.perf_counter()
    with open(Path(args.out, f"{spec.key}.log"), "ab") as log:
        command = [sys.executable, str(ROOT / "train.py"), *line, *more]
        child = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[lock.fileno()])
        status = wait_for(child)
    wall = time.perf_counter() - start
    after = cpu_seconds()
    others = (after[0] - before[0]) - (after[1] - before[1])
    text = Path(log.name).read_text(errors="replace")
    diverged = status != 0 and "updates in a row were not finite" in text[-3000:]
    if status and not diverged:
        raise RuntimeError(f"{spec.key}: train.py ended with status {status}: {text.strip().splitlines()[-1:]}")
    metrics = read_metrics(out)
    last = next((r for r in metrics[::-1] if "val_loss" in r), {})
    if not diverged and last.get("step") != times["steps"]:
        return None
    tokens = times["steps"] * args.batch_tokens
    speed = [r["tokens_per_second"] for r in metrics if "tokens_per_second" in r]
    row = dict(key=spec.key) | vars(spec) | dict(commit=commit())
    row |= dict(command=shlex.join(["python", "train.py", *line]), continued_from=str(shared) if more else None)
    row |= dict(steps=times["steps"], tokens=tokens, flops=3 * costs["flops_per_token"] * tokens)
    row |= dict(flops_paper=3 * costs["flops_per_token_paper"] * tokens) | costs
    row |= dict(seconds=round(tokens / float(np.median(speed)), 1), wall=round(wall, 1))
    row |= dict(alone=others < 0.05 * wall and before[0] > 0, loss=last.get("val_loss"), topk=last.get("val_topk"))
    health = "val_loss_bpb selected selected_topk depth agreement dead maxvio entropy".split()
    row |= {k: last[k] for k in health if k in last}
    row |= dict(weights=None if diverged else digest(checkpoints(out)[-1]), eval_tokens=args.eval_tokens)
    row |= dict(machine=machine(), threads=torch.get_num_threads(), torch=torch.__version__)
    row |= dict(date=time.strftime("%Y-%m-%d %H:%M", time.gmtime()), data=args.meta)
    return row


def wait_for(child: subprocess.Popen) -> int:
    """Waits for a training process. Ctrl-C and SIGTERM go on to it: it saves, ends, and so does the queue."""
    asked = []

    def stop(number, _frame) -> None:
        asked.append(number)
        child.send_signal(signal.SIGTERM)

    before = [signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)]
    status = child.wait()
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)
    if asked:
        print("stopped; the same command goes on from here", flush=True)
        sys.exit(128 + asked[0])
    return status


def digest(path: Path) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of the weights in a checkpoint."""
    weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def run(args) -> None:
    """Works through the plan until nothing is left that this process may take."""
    failed = set()
    while True:
        rows = read_rows(args.rows)
        done, lock = {row["key"] for row in rows}, None
        left = [s for s in plan(args, rows) if s.key not in done | failed and s.lr is not None]
        for spec in left:
            lock = claim(args, spec)
            if lock:
                break
        if lock is None:
            break
        with lock:
            if spec.key in {row["key"] for row in read_rows(args.rows)}:
                continue  # another process has finished it in the meantime
            print(f"{time.strftime('%H:%M:%S')} {spec.key} ({len(left)} left)", flush=True)
            try:
                row = train_one(args, spec, lock)
            except RuntimeError as e:
                print(f"failed: {e}", file=sys.stderr, flush=True)
                row = None
                failed.add(spec.key)
            if row is None:
                failed.add(spec.key)
                continue
            append_row(args.rows, row)
            print(f"{time.strftime('%H:%M:%S')} {spec.key} loss {row['loss']} in {row['wall']:.0f} s", flush=True)
            plateau = row["steps"] - int(
                shlex.split(row["command"])[shlex.split(row["command"]).index("--cooldown") + 1]
            )
            for path in checkpoints(Path(args.out, spec.key)):
                if step_of(path) != plateau:
                    path.unlink()
    if failed:
        fail(f"{len(failed)} runs failed, see their logs in {args.out}: {', '.join(sorted(failed))}")


def show_plan(args) -> None:
    rows = read_rows(args.rows)
    done = {row["key"] for row in rows}
    for spec in plan(args, rows):
        _, costs, times = train_flags(args, spec)
        mark = "done" if spec.key in done else "    "
        tokens = times["steps"] * args.batch_tokens / 1e6
        print(
            f"{mark} {spec.key:60} {times['steps']:6} steps {tokens:7.2f}M tokens {costs['params'] / 1e6:6.2f}M parameters"
        )


def numbers(kind):
    return lambda text: [kind(float(x)) for x in text.split(",")]


def read_flags(argv: list[str] | None):
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("what", choices=("plan", "run", "status", "report", "rerun"))
    add("key", nargs="?", help="the row that rerun trains again")
    add(
        "--rows", type=Path, default=ROOT / "study" / "rows.jsonl", help="the finished runs (default: study/rows.jsonl)"
    )
    add("--out", default="out/study", help="where runs are trained (default: out/study)")
    add("--data", default="data/debian", help="what prepare.py made (default: data/debian)")
    add("--sizes", type=numbers(int), default=[96, 128, 192], help="widths (default: 96,128,192)")
    add("--main", type=int, default=128, help="the width of everything but the comparison of widths (default: 128)")
    add("--layers", type=int, default=8, help="unrolled layers: 8, 14, 20, 26 or 32 (default: 8)")
    add("--budgets", type=numbers(float), default=[2e13, 6e13, 2e14], help="training FLOPs (default: 2e13,6e13,2e14)")
    add(
        "--rates",
        type=numbers(float),
        default=[1.5e-3, 3e-3, 6e-3],
        help="first learning rates (default: 1.5e-3,3e-3,6e-3)",
    )
    add("--block-size", type=int, default=256, help="context (default: 256)")
    add("--batch-tokens", type=int, default=2048, help="tokens a step (default: 2048)")
    add("--eval-tokens", type=int, default=131072, help="of held-out documents (default: 131072)")
    add("--device", default="cpu" if not torch.cuda.is_available() else "cuda")
    add("--compile", action="store_true", default=True)
    args = parser.parse_args(argv)
    meta = load_meta(args.data)
    args.vocab_size = meta["vocab_size"]
    args.meta = {k: meta[k] for k in ("tokenizer", "train_tokens", "val_tokens")}
    return args


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    {"plan": show_plan, "run": run}[args.what](args)


if __name__ == "__main__":
    main()
