"""Trains a Mixture-of-Recursions model, or its vanilla and recursive baselines, on the shards that prepare.py writes.

    python train.py --data data/python --out out/demo                  # a laptop: nano MoR, three recursions, minutes
    python train.py --recipe mor-3 --data data/fineweb --out out/mor3  # one GPU: a row of the paper's Table 3
    torchrun --standalone --nproc_per_node=8 train.py --preset 360M    # one node; --parallel fsdp shards the weights
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1                        # two nodes: the same lines on each
    torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py
    python train.py --recipes                                          # the rows of the paper, for --recipe NAME

Baselines are the same program: `--router none` is the recursive model, `--router none --n-recursion 1` the vanilla one.
Every field of TrainConfig and of config.py's MoRConfig is a flag (--help).

Stopping and resuming: after Ctrl-C, SIGTERM or kill -9, the same command continues from the newest good checkpoint in
--out, on any number of processes, with the same batches in the same order; in a single process on a CPU the losses are
the same to the bit. With several nodes, --out must be on a file system that they share: after a restart another node
may be the one that reads and writes. Several budgets from one plateau (paper Appendix D), in one command, or by hand:

    python train.py --out out/scaling --budgets 400,800,1600    # steps, or FLOPs: 2e18,5e18,16.5e18
    python train.py --out out/plateau --steps 1280 --warmup 20 --cooldown 0 --keep-at 320,640
    python train.py --out out/cool400 --cooldown-from out/plateau/ckpt_000320.pt --steps 80

Uptraining: --init-from takes weights, and the model with them; model flags change it. Optimizer, schedule and data
start afresh. From a Hugging Face Llama in the directory SmolLM-360M:

    python prepare.py fineweb-edu --tokenizer SmolLM-360M --max-tokens 1e9 --out data/edu
    python train.py --init-from SmolLM-360M --n-recursion 2 --router expert --data data/edu --out out/up

Shapes: B sequences, T time, N recursions, E evaluation blocks. A step is a global batch of `batch_tokens` tokens, cut
into micro-batches of at most `micro_batch` sequences; which sequences it holds does not depend on the processes.
"""

import fcntl
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentTypeError, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict as gathered
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    DAMAGE,
    checkpoints,
    from_pretrained,
    load_run,
    read_checkpoint,
    read_metrics,
    step_of,
    write_state,
    written_at_once,
)
from cli import Parser, check_compiler, fail, flag, spell, whole
from config import CHOICES as MODEL_CHOICES
from config import PRESETS, MoRConfig
from eval import Measured, fractions, measure, rounded, router_metrics
from model import MoR, Output
from prepare import Shards, check_tokenizer, load_meta, load_tokenizer, tokenizer_file

MODEL_DEFAULTS = dict(router="expert", n_recursion=3)  # what "a MoR" means when no flag says otherwise
TERMS = ("lm", "aux", "balance", "z")  # of Output.losses
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# What a size is trained with unless flags say otherwise: the paper's 1024 sequences of 2048 tokens, 20B tokens in all.
PAPER = dict(batch_tokens=2**21, steps=9438)
SIZES = dict.fromkeys(PRESETS, PAPER) | {"nano": dict(batch_tokens=2048, steps=800)}
UPTRAINING = dict(batch_tokens=2**17, steps=800)

# Rows of the paper's Table 3 at 360M, from the released configurations; name -> (steps, warm-up, cool-down, validation
# loss there, model). The ablations (Tables 4, 8, 10 to 16) have a cosine over 10B tokens, and flags for what they vary.
RECIPES = {
    "vanilla": (9438, 57, 1888, 2.7824, dict(router="none", n_recursion=1)),
    "recursive-2": (9438, 57, 1888, 2.8079, dict(router="none", n_recursion=2)),
    "recursive-3": (9438, 57, 1888, 2.8466, dict(router="none", n_recursion=3)),
    "recursive-4": (8883, 57, 1777, 2.8781, dict(router="none", n_recursion=4)),
    "mor-2": (12619, 86, 2524, 2.7511, dict(router="expert", n_recursion=2)),
    "mor-3": (14161, 86, 2832, 2.7925, dict(router="expert", n_recursion=3)),
    "mor-4": (14216, 86, 2843, 2.8204, dict(router="expert", n_recursion=4)),
    "mor-3-share": (14672, 86, 2934, 2.7983, dict(router="expert", n_recursion=3, kv="share")),
    "mor-3-token": (14161, 86, 2832, 2.9163, dict(router="token", n_recursion=3, z_coef=1e-5, capacity_slack=3.0)),
    "ablation": (4768, 238, 0, None, dict(router="expert", n_recursion=3)),
}
RECIPE_VOCABULARY = 49152  # SmolLM's tokenizer, which all of them have

CHOICES = {
    "preset": tuple(PRESETS),
    "recipe": tuple(RECIPES),
    "init": ("stepwise", "average", "lower", "upper", "reference"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("trapezoid", "cosine"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", *DTYPES),
    "parallel": ("ddp", "fsdp"),
} | MODEL_CHOICES
SCHEDULE = "lr schedule steps warmup cooldown capacity_warmup".split()  # what a cool-down takes from its plateau


@dataclass
class TrainConfig:
    """How to train. The comment behind a field is its --help."""

    data: str = "data/python"  # directory that prepare.py wrote
    out: str = "out/demo"  # run directory: config.json, metrics.jsonl, checkpoints, loss.png
    preset: str = "nano"  # model size
    recipe: str = ""  # a row of the paper's Table 3; other flags override it (--recipes lists them)
    init_from: str = ""  # instead of --preset: a Hugging Face Llama, the authors' directory, a run, or a checkpoint
    init: str = "stepwise"  # how a Llama's layers become the shared block (checkpoint.py, from_pretrained)
    steps: int = 0  # optimizer steps, or those of the cool-down with --cooldown-from; 0: 800 at nano, 9438 above it
    batch_tokens: int = 0  # tokens per step over all processes; 0: 2048 at nano, 2097152 above, 131072 with --init-from
    micro_batch: int = 32  # most sequences per forward pass, fewer on a card without room; the rest is accumulated
    optimizer: str = "adamw"  # adamw, or muon for the matrices of the layers with adamw for all else
    lr: float = 3e-3  # peak learning rate
    schedule: str = "trapezoid"  # trapezoid (warm-up, plateau, linear cool-down to 0) or cosine (to a tenth)
    warmup: float = 0.05  # linear warm-up: a fraction of the steps, or a number of steps if 1 or more
    cooldown: float = 0.2  # trapezoid's cool-down: the same; both are saved as numbers of steps
    aux_lr_factor: float = 1.0  # learning rate of the auxiliary router, relative to --lr (released code: 10)
    weight_decay: float = 0.1  # on matrices only
    clip: float = 1.0  # largest norm of the gradient
    capacity_warmup: int = 0  # steps in which capacities fall from 1 to their values on a half cosine
    balance_rate: float = 1e-3  # how far a step moves the bias of --balance bias
    doc_mask: bool = False  # attention never crosses a document border (end-of-text opens the next document)
    seed: int = 0  # of the initial weights and of the order of the data
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # autocast to bf16, fp32 without autocast, or auto: what this machine multiplies faster
    compile: bool = True  # torch.compile the model
    parallel: str = "ddp"  # under torchrun: ddp (a replica per process) or fsdp (weights and optimizer sharded)
    checkpoint_recursions: bool = False  # recompute each recursion in the backward pass: less memory, more time
    log_every: int = 20  # steps between log lines
    eval_every: int = 200  # steps between evaluations
    eval_tokens: int = 65536  # tokens of the fixed validation blocks
    save_every: int = 0  # steps between checkpoints; 0: at every evaluation
    keep: int = 2  # newest checkpoints to keep; the best one is kept besides
    keep_at: tuple = ()  # also save these steps, and keep them: 320,640
    budgets: tuple = ()  # one plateau, and from it a cool-down to each of these: steps, or FLOPs as the paper counts
    resume: str = "auto"  # auto: from the newest good checkpoint in --out; or a checkpoint file
    cooldown_from: str = ""  # checkpoint on the plateau of another run, to cool down from in --steps steps
    max_skipped: int = 10  # stop after this many non-finite updates in a row (each is skipped)
    tensorboard: bool = False  # also write TensorBoard events to --out
    wandb: bool = False  # also log to Weights & Biases; its own WANDB_* variables count
    wandb_project: str = ""  # the project there, instead of WANDB_PROJECT or nanomor
    dry_run: bool = False  # check everything, say what would be trained, and stop

    def problems(self) -> list[str]:
        counts = "steps batch_tokens micro_batch log_every eval_every eval_tokens keep max_skipped".split()
        others = "warmup cooldown weight_decay capacity_warmup save_every seed".split()
        least = dict.fromkeys(counts, 1) | dict.fromkeys(others, 0)
        values = vars(self)
        bad = [f"{flag(k)} {values[k]} must be at least {n}" for k, n in least.items() if not n <= values[k] < math.inf]
        positive = [k for k in ("lr", "clip", "aux_lr_factor", "balance_rate") if not 0 < values[k] < math.inf]
        bad += [f"{flag(k)} {values[k]} must be a finite number > 0" for k in positive]
        if self.seed >= 2**63:
            bad.append(f"--seed {self.seed} must be below 2**63: generators take 64 bits")
        for name in ("keep_at", "budgets"):
            if any(x < 1 or x == math.inf or x != x for x in values[name]):
                bad.append(f"{flag(name)} {','.join(map(str, values[name]))} must be positive numbers")
        return bad


def parse_numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(x) for x in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} must be numbers with commas between them") from None


def parse_dtype(text: str) -> str:
    if text in ("fp16", "float16", "half"):
        raise ArgumentTypeError("fp16 loses gradients below 6e-8, and this loop scales no losses: use bf16")
    return text


KINDS = dict(tuple=parse_numbers, float=float, int=whole, str=str)  # by the first of these in an annotation


def make_parser() -> Parser:
    """Returns a parser whose flags are the fields of TrainConfig and MoRConfig."""
    layout = dict(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser = Parser(**layout, argument_default=SUPPRESS, allow_abbrev=False)
    parser.add_argument("--recipes", action="store_true", help="list the recipes and stop")
    for cls, title in ((TrainConfig, "training"), (MoRConfig, "model (default: what --preset or --init-from says)")):
        group = parser.add_argument_group(title)
        helps = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
        for f in fields(cls):
            kind = next((kind for name, kind in KINDS.items() if name in str(f.type)), str)
            how = dict(type=kind, metavar="X")
            if f.type is bool:
                how = dict(action=BooleanOptionalAction)
            elif f.name in CHOICES:
                known = [choice for choice in CHOICES[f.name] if choice is not None]
                how = dict(choices=known, type=parse_dtype if f.name == "dtype" else str)
            text = helps.get(f.name, "").replace("%", "%%")
            if cls is TrainConfig or f.name in MODEL_DEFAULTS:
                text += f" (default: {MODEL_DEFAULTS.get(f.name, f.default)!s})"
            group.add_argument(flag(f.name), help=text, **how)
    return parser


def read_flags(argv: list[str] | None) -> tuple[TrainConfig, dict]:
    """Returns (TrainConfig, the fields of MoRConfig that a recipe or a flag gives). Ends the program over mistakes."""
    given = vars(make_parser().parse_args(argv))
    if given.pop("recipes", False):
        print(list_recipes())
        sys.exit(0)
    problems = []
    if given.get("init_from") and {"preset", "recipe"} & given.keys():
        problems.append("--init-from has a size of its own: leave --preset out, and --recipe")
    if given.get("recipe"):
        given = recipe_settings(given["recipe"]) | given
    cfg = TrainConfig(**{f.name: given[f.name] for f in fields(TrainConfig) if f.name in given})
    size = UPTRAINING if cfg.init_from else SIZES[cfg.preset]
    if "steps" not in given:
        cfg.steps = size["steps"]
    if "batch_tokens" not in given:
        cfg.batch_tokens = size["batch_tokens"]
    cfg.keep_at = tuple(round(x) for x in cfg.keep_at if x == x and x < math.inf) or cfg.keep_at
    problems += cfg.problems()

    # fractions of the steps become steps
    if not problems and not cfg.budgets:
        cfg.warmup = round(cfg.warmup if cfg.warmup >= 1 else cfg.warmup * cfg.steps)
        cfg.cooldown = round(cfg.cooldown if cfg.cooldown >= 1 else cfg.cooldown * cfg.steps)
    trapezoid = cfg.schedule == "trapezoid" and not cfg.cooldown_from and not cfg.budgets
    if trapezoid and cfg.warmup + cfg.cooldown > cfg.steps:
        what = f"a warm-up of {cfg.warmup} and a cool-down of {cfg.cooldown} steps"
        problems.append(f"{what} do not fit into --steps {cfg.steps}")
    if cfg.budgets and (cfg.schedule != "trapezoid" or cfg.cooldown_from or not 0 < cfg.cooldown < 1):
        problems.append("--budgets needs --schedule trapezoid, a --cooldown below 1, and no --cooldown-from")
    packages = [name for name in ("tensorboard", "wandb") if getattr(cfg, name) and not is_installed(name)]
    problems += [f"--{name} needs that package: pip install {name}" for name in packages]
    if problems:
        fail("; ".join(problems))
    return cfg, {f.name: given[f.name] for f in fields(MoRConfig) if f.name in given}


def is_installed(name: str) -> bool:
    """Whether it is a package, and not just a folder of that name: wandb itself makes one where it runs."""
    spec = find_spec(name)
    return spec is not None and getattr(spec, "origin", "") is not None


def recipe_settings(name: str) -> dict:
    steps, warmup, cooldown, _, model = RECIPES[name]
    schedule = "cosine" if cooldown == 0 else "trapezoid"
    training = dict(preset="360M", steps=steps, warmup=float(warmup), cooldown=float(cooldown), schedule=schedule)
    return training | dict(batch_tokens=PAPER["batch_tokens"], lr=3e-3) | model


def list_recipes() -> str:
    """Returns a table of the recipes. EFLOPs are counted as the paper does: forward, without head."""
    head = f"{'recipe':12} {'steps':>6} {'warm-up':>7} {'cool-down':>9} {'tokens':>7} {'layers':>6} {'params':>7}"
    lines = [f"{head} {'EFLOPs':>7} {'loss':>7}"]
    for name, (steps, warmup, cooldown, loss, overrides) in RECIPES.items():
        config = MoRConfig.preset("360M", **overrides)
        with torch.device("meta"):
            model = MoR(config)
        tokens = steps * PAPER["batch_tokens"]
        flops = tokens * model.flops_per_token(config.block_size, convention="paper")
        layers, params = config.n_layer, model.num_params() / 1e6
        row = f"{name:12} {steps:6} {warmup:7} {cooldown:9} {tokens / 1e9:6.1f}B {layers:6} {params:6.0f}M"
        lines.append(f"{row} {flops / 1e18:7.2f} {loss or '':7}")
    lines.append("")
    lines.append("360M, 1024 sequences of 2048 tokens a step, lr 3e-3, SmolLM's tokenizer. tokens: of FineWeb-Edu;")
    lines.append("params: without embedding; loss: the paper's, in nats a token, by top-k routing. ablation: cosine.")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# processes


@dataclass
class World:
    """This process among the others; rank 0 is the chief. Everything works unchanged when it is alone."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def say(self, text: str) -> None:
        """Prints a line, unless its terminal is gone: that is no reason to lose a run."""
        if self.rank == 0:
            with suppress(OSError):
                print(spell(text), flush=True)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def agree(self, yes: bool) -> bool:
        """Whether any process says yes. Always over gloo on the CPU: asking must not wait for the GPU."""
        return bool(self.sum(torch.tensor(int(yes))))

    def chief_does(self, function: Callable, *args):
        """Runs it on the chief -> its result, on every process. If it fail()s, every process exits with it."""
        box = [None, None]
        if self.rank == 0:
            try:
                box[0] = function(*args)
            except SystemExit as e:
                box[1] = e.code
        if self.size > 1:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        if box[1] is not None:
            sys.exit(box[1])
        return box[0]


def read_ranks() -> tuple[int, int, int] | None:
    """Returns (rank, number of processes, rank on this node) as torchrun says; None without it. A WORLD_SIZE alone,
    which schedulers and shells leave behind, does not make a process one of many."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name) for name in names]
    if None in values:
        return None
    if not all(value.isdigit() for value in values):
        said = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        fail(f"{said} in the environment are not what torchrun sets: unset them, or start with torchrun")
    rank, size, local = map(int, values)
    return rank, size, local


def join_world(cfg: TrainConfig) -> World:
    ranks = read_ranks()
    torchrun = ranks is not None
    rank, size, local = ranks or (0, 1, 0)
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available() and not torchrun, cpu=True)
    name = next(n for n in has if has[n]) if cfg.device == "auto" else cfg.device
    if not has[name]:
        fail(f"--device {name}: this PyTorch ({torch.__version__}) sees no such device; use --device auto")
    if name == "cuda" and local >= torch.cuda.device_count():
        fail(f"process {local} has no GPU of its own: {torch.cuda.device_count()} present; lower --nproc_per_node")
    if cfg.parallel == "fsdp" and not torchrun:
        fail("--parallel fsdp shards over processes: start it as torchrun --nproc_per_node=N train.py ...")
    if name == "cuda":
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    if torchrun and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, store=meeting_place(), rank=rank, world_size=size)
    return World(torch.device(name, local) if name == "cuda" else torch.device(name), rank, size, local)


def meeting_place() -> dist.Store | None:
    """Where the processes find each other; None: where torch does. torchrun keeps one store through all restarts, and
    after one a process would connect to the addresses of the dead: each attempt needs a part of it to itself. Several
    nodes count their attempts differently, but can have a new store for each."""
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if env["GROUP_WORLD_SIZE"] != "1":
        if env["TORCHELASTIC_MAX_RESTARTS"] != "0":
            fail("--max-restarts on several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each, before torchrun")
        return None
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(env["TORCHELASTIC_RESTART_COUNT"], store)


# ---------------------------------------------------------------------------------------------------------------------
# data and initial model: all that can be checked before anything is computed


class Blocks:
    """The training tokens cut into blocks of T (+1 for the last target), in a new random order every epoch. Sequence
    number i counts over the whole run: the position in the data is one number, and nothing is ever replayed."""

    def __init__(self, shards: Shards, T: int, seed: int):
        self.shards, self.T, self.seed = shards, T, seed
        self.count = (len(shards) - 1) // T
        self.epoch, self.order = -1, None

    def row(self, i: int) -> np.ndarray:
        """Tokens [T+1] of sequence i."""
        epoch, i = divmod(i, self.count)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return self.shards.tokens(int(self.order[i]) * self.T, self.T + 1)

    def batches(self, first: int, count: int, size: int) -> Iterator[np.ndarray]:
        """Sequences first..first+count in batches [size, T+1]."""
        for start in range(first, first + count, size):
            yield np.stack([self.row(i) for i in range(start, start + size)])


def to_device(rows: np.ndarray, eot: int | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens [B, T+1] -> idx, targets [B, T], and segments [B, T] if eot is given: each end-of-text opens a document,
    so that every target is predicted from its own document, a document's first token too."""
    rows = torch.from_numpy(rows)
    if device.type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    idx, targets = rows[:, :-1].clone(), rows[:, 1:].clone()  # contiguous() would share memory where B is 1
    return idx, targets, None if eot is None else (idx == eot).cumsum(1)


def initial_model(cfg: TrainConfig, given: dict, meta: dict) -> tuple[MoRConfig, dict[str, Tensor] | None]:
    """Returns (the configuration that --preset or --init-from and the model flags describe, weights if it comes with
    any). Every process reads --init-from: a mistake ends them all, and file and seed make the same weights in each."""
    path, model, theirs = Path(cfg.init_from), None, meta
    remedy = "leave --vocab-size out"
    try:
        if not cfg.init_from:
            settings = MODEL_DEFAULTS | dict(vocab_size=choose_vocabulary(cfg, meta["vocab_size"]))
            config = MoRConfig.preset(cfg.preset, **(settings | given))
        else:
            torch.manual_seed(cfg.seed)  # of new routers
            if any(path.glob("ckpt_*.pt")) or path.is_file() and path.suffix == ".pt":
                model, theirs, _ = load_run(path)
            else:
                model = from_pretrained(path, cfg.init, **given)
            config = replace(model.config, **given)
            remedy = "prepare the data with the tokenizer of the weights"
    except ValueError as e:
        fail(str(e)[:400])

    # flags and data that this model has no use for
    if cfg.capacity_warmup and config.router != "expert":
        fail(f"--capacity-warmup {cfg.capacity_warmup} needs --router expert, not {config.router}: leave it out")
    if cfg.aux_lr_factor != 1 and config.causality != "aux_router":
        fail(f"--aux-lr-factor {cfg.aux_lr_factor} needs --causality aux_router, not {config.causality}: leave it out")
    if config.vocab_size < meta["vocab_size"]:
        fail(f"a vocabulary of {config.vocab_size} is below the {meta['vocab_size']} of {cfg.data}: {remedy}")
    if model is None:
        return config, None

    # weights that the flags, or the data, do not fit
    with torch.device("meta"):
        needed = {name: w.shape for name, w in MoR(config).state_dict().items()}
    shapes = {name: w.shape for name, w in model.state_dict().items()}
    if needed != shapes:
        fail(f"the weights in {path} do not fit the model flags: leave these out, or start from an export")
    if theirs["tokenizer"] != meta["tokenizer"]:
        fail(f"{path} was trained with tokenizer {theirs['tokenizer']}, {cfg.data} has {meta['tokenizer']}: {remedy}")
    home = path.parent if path.is_file() else path
    if tokenizer_file(home):  # it must be that of the data, whatever its name
        check_tokenizer(home, load_tokenizer(cfg.data))
    return config, model.state_dict()


def round_vocabulary(tokens: int) -> int:
    """Returns the next multiple of 128, since every product of the head is misaligned on a GPU otherwise."""
    return -(-tokens // 128) * 128


def choose_vocabulary(cfg: TrainConfig, tokens: int) -> int:
    """Returns the vocabulary of a model for data with `tokens` kinds of token, rounded up; a run that is there already
    keeps the one it has."""
    files = [Path(file) for file in (cfg.resume, cfg.cooldown_from) if Path(file).is_file()]
    for place in [Path(cfg.out), *(file.parent for file in files)]:
        with suppress(OSError, ValueError, KeyError):  # no run, or one that the checks of resuming refuse
            there = json.loads((place / "config.json").read_text())
            if there["data"]["vocab_size"] == tokens:
                return there["model"]["vocab_size"]
    return round_vocabulary(tokens)


def open_data(cfg: TrainConfig, meta: dict, config: MoRConfig) -> tuple[Shards, Shards]:
    """Training and validation tokens, enough of them for the batch and the model."""
    train, val, T = Shards(cfg.data, "train"), Shards(cfg.data, "val"), config.block_size
    sequences = cfg.batch_tokens // T
    _, processes, _ = read_ranks() or (0, 1, 0)
    if cfg.batch_tokens % T:
        near = max(1, round(cfg.batch_tokens / T)) * T
        fail(f"--batch-tokens {cfg.batch_tokens} must be a multiple of the block size {T}: use {near}")
    if sequences % processes:
        what = f"{processes} processes cannot share its {sequences} sequences equally"
        fail(f"--batch-tokens {cfg.batch_tokens}: {what}: use {-(-sequences // processes) * processes * T}")
    if (len(train) - 1) // T < sequences:
        fail(f"{cfg.data} has {len(train)} training tokens, less than one batch: lower --batch-tokens")
    if len(val) <= T:
        fail(f"{cfg.data} has {len(val)} validation tokens, not one block of {T}: prepare with a larger --val-fraction")
    return train, val


def warn_of_plan(cfg: TrainConfig, meta: dict) -> list[str]:
    """Returns what is legal and most likely not meant, in words."""
    found, usual = [], SIZES[cfg.preset]["batch_tokens"]
    if not cfg.init_from and cfg.batch_tokens * 16 < usual:
        what = f"--batch-tokens {cfg.batch_tokens} is far below the {usual} that {cfg.preset} is trained with"
        found.append(f"{what}: leave it out (what does not fit at once is accumulated), or lower --lr {cfg.lr:g}")
    if cfg.recipe and meta["vocab_size"] != RECIPE_VOCABULARY:
        what = f"tokenizer {meta['tokenizer']} with {meta['vocab_size']} tokens"
        found.append(
            f"--recipe {cfg.recipe} has SmolLM's tokenizer of {RECIPE_VOCABULARY} tokens, {cfg.data} has {what}:"
            " losses will not compare with the paper's; prepare with --tokenizer and SmolLM's directory"
        )
    return found


def estimate_activations(c: MoRConfig, B: int, T: int, recompute: bool = False) -> int:
    """Returns about how many bytes the compiled forward keeps for the backward pass, under bf16 autocast, of B
    sequences of T tokens; with `recompute` of one recursion at a time."""
    stream = 4 * 2 * c.d_model  # fp32: before attention and before the MLP
    inner = 4 * c.d_model + 2 * c.n_kv_head * c.head_dim + 3 * c.d_ff  # normed twice, q, attention; K, V; MLP
    slack = c.capacity_slack if c.router == "token" else 1.0
    passes = [min(1.0, slack * capacity) for capacity in c.capacities]
    layers = c.n_unshared + c.n_block * (max(passes) if recompute else sum(passes))
    return int(B * T * (stream + 2 * inner) * layers)


def plan_memory(c: MoRConfig, B: int, T: int, shards: int = 1, recompute: bool = False) -> dict[str, int]:
    """Returns the bytes that a device holds in training, by kind: fp32 weights, gradients and AdamW moments, bf16
    copies of the weights, and activations of B sequences of T.

    FSDP cuts the first three into `shards`, but weights and gradients are whole while a step lasts: the shared block is
    used N times, and gathering it N times would send more than it saves."""
    with torch.device("meta"):
        P = MoR(c).num_params(embedding=True)
    whole = 4 * P if shards > 1 else 0
    return dict(
        weights=4 * P // shards + whole,
        gradients=4 * P // shards + whole,
        optimizer=8 * P // shards,
        casts=2 * P,
        activations=estimate_activations(c, B, T, recompute),
    )


def fit_micro_batch(cfg: TrainConfig, config: MoRConfig, world: World) -> int:
    """Returns --micro-batch, or on CUDA the most sequences up to it that the memory plan fits into what every card has
    free, and says so. Ends the program where not even one fits."""
    if world.device.type != "cuda":
        return cfg.micro_batch
    # a tenth is left for what the plan does not count: the chunk of logits in the loss, the libraries, fragments
    room = torch.tensor(int(0.9 * torch.cuda.mem_get_info(world.device)[0]))
    if world.size > 1:
        dist.all_reduce(room, dist.ReduceOp.MIN)
    shards = world.size if cfg.parallel == "fsdp" else 1
    plan = plan_memory(config, 1, config.block_size, shards, cfg.checkpoint_recursions)
    each = plan.pop("activations")
    fixed = sum(plan.values())
    fitting = (int(room) - fixed) // each
    wanted = min(cfg.micro_batch, cfg.batch_tokens // config.block_size // world.size)
    if fitting >= wanted:
        return cfg.micro_batch

    # in GiB, as nvidia-smi counts
    gib = [f"{x / 2**30:.1f} GiB" for x in (fixed + each, fixed + wanted * each, room)]
    if fitting < 1:
        remedy = "use --checkpoint-recursions, --parallel fsdp on more cards, or a smaller model"
        fail(f"a single sequence of {config.block_size} tokens needs {gib[0]}, {gib[2]} can be used: {remedy}")
    world.say(f"micro-batches of {fitting}: {wanted} sequences at once need {gib[1]}, {gib[2]} can be used")
    return fitting


def check_ids(cfg: TrainConfig, shards: tuple[Shards, ...], vocab_size: int, world: World) -> None:
    """Every token id against the vocabulary; the processes divide the reading."""
    piece, maps = 1 << 24, [tokens for split in shards for tokens in split.maps]
    starts = ((m, i) for m in maps for i in range(world.rank * piece, len(m), world.size * piece))
    if world.agree(any(m[i : i + piece].max() >= vocab_size for m, i in starts)):
        fail(f"{cfg.data} holds token ids beyond the vocabulary of {vocab_size} in its meta.json: prepare it again")


def bigram_nll(train: Shards, rows: np.ndarray, vocab_size: int, most: int = 1 << 24) -> float:
    """Nats per token, on the targets of rows [E, T+1], of a Witten-Bell bigram model of the first `most` train tokens:
    P(b|a) = (count(a, b) + kinds(a) P(b)) / (count(a) + kinds(a)), kinds(a) the number of its different successors."""
    t = train.tokens(0, min(most, len(train)))
    unigram = (np.bincount(t, minlength=vocab_size) + 1) / (t.size + vocab_size)
    pairs, counts = np.unique(t[:-1] * vocab_size + t[1:], return_counts=True)
    context = np.bincount(t[:-1], minlength=vocab_size)
    kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)
    a, b = rows[:, :-1].ravel(), rows[:, 1:].ravel()
    place = np.searchsorted(pairs, a * vocab_size + b).clip(max=pairs.size - 1)
    seen = np.where(pairs[place] == a * vocab_size + b, counts[place], 0)
    p = np.where(context[a] > 0, (seen + kinds[a] * unigram[b]) / np.maximum(context[a] + kinds[a], 1), unigram[b])
    return float(-np.log(p).mean())


# ---------------------------------------------------------------------------------------------------------------------
# a step: schedules, which are functions of it outside the compiled model; devices; the update


def learning_rate(cfg: TrainConfig, step: int) -> float:
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "cosine":
        done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
        return cfg.lr * (0.55 + 0.45 * math.cos(math.pi * done))
    return cfg.lr * min(1.0, (cfg.steps - step) / max(1, cfg.cooldown))


def warm_capacities(cfg: TrainConfig, step: int, config: MoRConfig, device: torch.device) -> Tensor | None:
    """Returns the capacities [N] of a step while they warm up; None, and the graph with fixed slots, from then on."""
    if step >= cfg.capacity_warmup:
        return None
    extra = 0.5 + 0.5 * math.cos(math.pi * step / cfg.capacity_warmup)
    return torch.tensor([c + (1 - c) * extra for c in config.capacities], device=device)


def cool_down(plateau: dict, step: int, steps: int) -> dict:
    """Returns the schedule (fields of SCHEDULE) that leaves this one at `step` for a cool-down of `steps` steps."""
    before = plateau["steps"] - plateau["cooldown"]
    if plateau["schedule"] != "trapezoid" or not plateau["warmup"] <= step <= before:
        what = "a {schedule} of {steps} steps, {warmup} of warm-up, {cooldown} of cool-down".format(**plateau)
        fail(f"--cooldown-from: step {step} is not on a plateau ({what}): choose a checkpoint that is")
    return plateau | dict(steps=step + steps, cooldown=steps)


def parallelise(model: MoR, cfg: TrainConfig, world: World) -> torch.nn.Module:
    """Compiles the model and wraps it for --parallel -> what is called to train; `model` keeps holding the weights."""
    if cfg.parallel == "fsdp":
        # First and last layer are groups of their own. The shared block stays in the root group, which is gathered once
        # per step, serves every recursion and the backward pass, and is reduced once; as a group of its own it would be
        # gathered in the backward pass, and reduced, once per recursion.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes to keys and values
        for layer in filter(None, (model.first, model.last)):
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=False)
        if cfg.compile:  # the forward, not the module: gathering is done by hooks, which stay outside the graphs
            model.forward = torch.compile(model.forward, fullgraph=model.first is None, dynamic=False)
        return model
    if cfg.compile:
        model.compile(fullgraph=True, dynamic=False)
    if world.size == 1:
        return model
    # One graph. Dynamo would split it to overlap the reduction with the backward pass, but the gradient of a shared
    # block is complete only when recursion 0 is done: there is next to nothing to overlap with.
    torch._dynamo.config.optimize_ddp = False
    ids = [world.local_rank] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True)


def sync_gradients(wrapped: torch.nn.Module, last: bool) -> None:
    """Only the last micro-batch's backward pass communicates. Flags, not no_sync(): the step stays a straight loop."""
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = last
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
        wrapped.set_reshard_after_backward(last)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """FLOP/s of a large square matrix product, the best of as many as fit: what "of peak" refers to."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits, on any device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # torch.optim.Muon's: a quintic that lifts small singular values fast


def orthogonalize(x: Tensor) -> Tensor:
    """Returns about U V^T for matrices x = U S V^T, [n, rows, columns]: five Newton-Schulz iterations (Muon).

    An iteration multiplies x by a polynomial of G = x x^T, and so G by its square. Where x is at least twice as long as
    wide, iterations on G alone are cheaper: three, then two on a new G. Five on one G would blow up what bf16 rounds
    off; three and two are as exact as iterations on x."""
    a, b, c = NEWTON_SCHULZ
    tall = x.size(1) > x.size(2)
    x = x.mT.contiguous() if tall else x  # the products are of the size of the shorter side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.size(2) < 2 * x.size(1):
        for _ in range(5):
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
        return x.mT if tall else x

    identity = torch.eye(x.size(1), dtype=x.dtype, device=x.device)
    for iterations in (3, 2):
        gram = x @ x.mT
        for i in range(iterations):
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            if i == 0:
                factor = polynomial + a * identity
            else:
                factor = torch.baddbmm(factor, polynomial, factor, beta=a)
            if i < iterations - 1:
                for _ in range(2):
                    gram = torch.baddbmm(gram, polynomial, gram, beta=a)
        x = factor @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Updates the first parameter group, matrices, as torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does, and the
    other groups by AdamW. Unlike torch's, it obeys `found_inf`: where that is 1, nothing changes. Sharded matrices are
    gathered, and each process orthogonalizes all of them: 0.1 % of the FLOPs of a step of 2M tokens at 360M.

    dtype: what the iterations multiply in. (torch's always take bf16, which turns the rounding of an fp32 gradient into
    differences of a hundredth.)"""

    def __init__(self, matrices: list[Tensor], groups: list[dict], dtype: torch.dtype, momentum: float = 0.95, **adam):
        weight_decay = adam.pop("weight_decay")
        first = dict(params=matrices, weight_decay=weight_decay, momentum=momentum)
        super().__init__([first, *groups], fused=True, **adam)
        self.dtype = dtype
        self.found_inf = torch.zeros((), device=matrices[0].device)

    def step(self, closure: Callable | None = None) -> None:
        groups = self.param_groups
        self.param_groups = groups[1:]
        super().step(closure)
        self.param_groups = groups
        self.step_matrices(**groups[0])

    @torch.no_grad()
    def step_matrices(self, params: list[Tensor], lr: float, weight_decay: float, momentum: float, **_) -> None:
        rate, skip = lr * (1 - self.found_inf), self.found_inf > 0
        updates = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
                state["step"] = torch.zeros(())  # not counted: what AdamW's loading looks for
            average, grad = local(state["momentum"]), local(p.grad)
            grad = torch.where(skip, average, grad)  # which leaves the average as it is
            average.lerp_(grad, 1 - momentum)
            updates.setdefault(p.shape, []).append((p, grad.lerp(average, momentum)))  # Nesterov's

        # matrices of one shape in one batch: seven products instead of seven for each
        for shape, pairs in updates.items():
            whole = torch.stack([gather_like(p, update).to(self.dtype) for p, update in pairs])
            scale = 0.2 * math.sqrt(max(shape))  # the root mean square of AdamW's updates
            for (p, _), update in zip(pairs, orthogonalize(whole), strict=True):
                local(p).mul_(1 - rate * weight_decay).sub_(shard_like(p, update) * (rate * scale))


def local(x: Tensor) -> Tensor:
    """Returns this process's part of a tensor, all of it unless FSDP shards it."""
    return x.to_local() if isinstance(x, DTensor) else x


def gather_like(p: Tensor, part: Tensor) -> Tensor:
    """Returns the whole of a tensor of which each process has `part`, as it has of p."""
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()


def shard_like(p: Tensor, whole: Tensor) -> Tensor:
    """Returns this process's part of `whole`, as it has of p."""
    if not isinstance(p, DTensor):
        return whole
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()


def make_optimizer(model: MoR, cfg: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW, or Muon for the matrices of the layers with AdamW for all else. Only matrices decay."""
    stacks = ("first.", "block.", "last.") if cfg.optimizer == "muon" else ()
    faster = "aux_routers." if cfg.aux_lr_factor != 1 else ()
    layers, matrices, vectors, routers = [], [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif name.startswith(stacks):
            layers.append(p)
        elif name.startswith(faster):
            routers.append(p)
        else:
            matrices.append(p)
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=vectors, weight_decay=0.0)]
    if routers:
        groups.append(dict(params=routers, weight_decay=cfg.weight_decay, lr_factor=cfg.aux_lr_factor))
    adam = dict(lr=cfg.lr, betas=(0.9, 0.95))
    if cfg.optimizer == "muon":
        return Muon(layers, groups, DTYPES[cfg.dtype], weight_decay=cfg.weight_decay, **adam)
    return torch.optim.AdamW(groups, fused=True, **adam)


PROGRESS = dict(step=0, sequences=0, best_loss=math.inf, best_step=-1, skipped=0)


@dataclass
class Run:
    """What the loop carries. `progress` is all of it that a checkpoint must hold besides weights and optimizer."""

    cfg: TrainConfig
    config: MoRConfig
    world: World
    meta: dict
    blocks: Blocks
    model: MoR
    wrapped: torch.nn.Module
    optimizer: torch.optim.AdamW
    peak: float  # FLOP/s of matrix products over all processes
    bad: Tensor  # non-finite: [in a row, skipped updates, times each of TERMS was the reason]
    progress: dict = field(default_factory=PROGRESS.copy)
    sinks: list = field(default_factory=list)  # of the chief, besides metrics.jsonl: (log(numbers, step), close())
    loading: float = 0.0  # seconds that this process spent on reading batches since the last log line
    warned: bool = False  # of dropped tokens

    @property
    def out(self) -> Path:
        return Path(self.cfg.out)

    @property
    def eot(self) -> int | None:
        return self.meta["eot"] if self.cfg.doc_mask else None

    def saved_config(self) -> dict:
        """Returns what config.json and checkpoints hold, as JSON gives it back: with lists for tuples."""
        config = dict(model=self.config.asdict(), train=asdict(self.cfg), data=self.meta)
        return json.loads(json.dumps(config))

    def autocast(self):
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.cfg.dtype == "bf16" else nullcontext()

    def micro_batches(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """This process's part of the next global batch."""
        start = time.perf_counter()
        share = self.cfg.batch_tokens // self.config.block_size // self.world.size
        size = next(n for n in range(min(share, self.cfg.micro_batch), 0, -1) if share % n == 0)
        first = self.progress["sequences"] + self.world.rank * share
        batches = [to_device(rows, self.eot, self.world.device) for rows in self.blocks.batches(first, share, size)]
        self.loading += time.perf_counter() - start
        return batches

    def forward(self, batch: tuple[Tensor, Tensor, Tensor | None], capacity: Tensor | None) -> Output:
        idx, targets, segments = batch
        with self.autocast():
            return self.wrapped(idx, targets, segments=segments, capacity=capacity)


def train_step(run: Run) -> Tensor:
    """Takes one optimizer step -> this process's part of [loss, lm, aux, balance, z, depth, dropped] and the norm, on
    the device. dropped: how often a token found no slot at a depth that it chose, per token.

    Nothing here waits for the device: an update that is not finite is skipped through the optimizer's found_inf, as
    loss scaling does, counted in run.bad, and looked at when a step is logged."""
    cfg, world, step = run.cfg, run.world, run.progress["step"]
    balancing = run.config.router == "token" and run.config.balance == "bias"

    # the batch, and how many of its tokens are predicted
    batches = run.micro_batches()
    valid = [(targets != -100).sum() for _, targets, _ in batches]
    total = world.sum(torch.stack(valid).sum())
    capacities = warm_capacities(cfg, step, run.config, world.device)

    # gradients, summed over micro-batches
    stats = torch.zeros(3 + len(TERMS), device=world.device)
    depths = torch.arange(1, run.config.n_recursion + 1, device=world.device)
    counts = torch.zeros(len(depths), device=world.device)
    for i, batch in enumerate(batches):
        sync_gradients(run.wrapped, last=i == len(batches) - 1)
        out = run.forward(batch, capacities)
        share = valid[i] / total  # of the global batch: losses add up to the mean over all its valid tokens
        (out.loss * (share * world.size)).backward()  # times size, as DDP and FSDP average over processes
        terms = [out.losses.get(name, stats.new_zeros(())) for name in TERMS]
        dropped = out.dropped / out.depth.numel()
        stats += torch.stack([out.loss.detach(), *terms, out.depth.float().mean(), dropped]) * share
        if balancing:  # by what tokens chose: what a full depth turned away was chosen nevertheless
            counts += (out.choice[..., None] == depths).sum((0, 1))

    # what is not finite is counted and skipped
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    skip = (~norm.isfinite()).float()
    run.bad[0] = (run.bad[0] + 1) * skip
    run.bad[1:] += torch.cat([skip[None], (~stats[1 : 1 + len(TERMS)].isfinite()).float()])
    run.optimizer.found_inf = skip

    # the update
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step) * group.get("lr_factor", 1)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if balancing:
        run.model.update_balance_bias(world.sum(counts), cfg.balance_rate)
    run.progress["step"] += 1
    run.progress["sequences"] += cfg.batch_tokens // run.config.block_size
    return torch.cat([stats, norm[None]])


def warm_up(run: Run) -> None:
    """Compiles before the first step, so that a recompile after it is a bug, and raises."""
    batch = run.micro_batches()[0]
    first = warm_capacities(run.cfg, run.progress["step"], run.config, run.world.device)
    sync_gradients(run.wrapped, last=True)
    for name, capacities in (("capacity warm-up", first), ("training", None)):
        if name == "training" or capacities is not None:
            start = time.perf_counter()
            (run.forward(batch, capacities).loss * 0).backward()
            run.optimizer.zero_grad(set_to_none=True)
            run.world.say(f"compiled the {name} graph in {time.perf_counter() - start:.1f} s")
    torch._dynamo.config.error_on_recompile = True


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate(run: Run, rows: np.ndarray) -> dict:
    """Measures the evaluation blocks [E, T+1], divided over the processes -> NLL (nats per token) with causal and with
    top-k routing, and the health of the router. Eager: two more graphs cost more than they save."""
    world, config = run.world, run.config
    routings = []
    if config.router != "expert" or config.causality != "none":
        routings.append("causal")
    if config.router == "expert":
        routings.append("topk")

    # this process's part; the last one wraps round, as every process must make the same calls
    part = -(-len(rows) // world.size)
    mine = rows.take(range(world.rank * part, (world.rank + 1) * part), axis=0, mode="wrap")
    run.model.eval()
    with torch.compiler.set_stance("force_eager"), run.autocast():
        measured = [measure(run.model, mine, routing, run.eot) for routing in routings]
    run.model.train()
    everyone = [measured] * world.size
    if world.size > 1:
        dist.all_gather_object(everyone, measured)

    # the loss by each routing
    passes, metrics = [], {}
    for routing, *parts in zip(routings, *everyone, strict=True):
        columns = []
        for values in zip(*parts, strict=True):
            columns.append(None if values[0] is None else np.concatenate(values)[: len(rows)])
        m = Measured(*columns)
        passes.append(m)
        suffix = "" if routing == "causal" else "_topk"
        loss = "val_topk" if suffix else "val_loss"
        metrics[loss] = m.nll.mean(dtype=float)
        if run.meta["val_bytes"]:  # unknown for shards without meta.json
            metrics[loss + "_bpb"] = metrics[loss] / math.log(2) * run.meta["val_tokens"] / run.meta["val_bytes"]
        if config.router != "none":
            metrics["selected" + suffix] = fractions(m.depth, config.n_recursion)

    # what the router does: as at inference, and as it is trained
    if config.router != "none":
        taken, trained = router_metrics(config, passes[0]), router_metrics(config, passes[-1])
        metrics |= dict(depth=passes[0].depth.mean(), maxvio=taken["max_vio"])
        metrics |= dict(entropy=trained["entropy"], dead=trained["dead_token_ratio"])
        if "sampling_accuracy" in trained:  # some recursion has a choice
            metrics["agreement"] = list(trained["sampling_accuracy_by_recursion"].values())
    return rounded(metrics)


def router_warnings(metrics: dict, config: MoRConfig) -> list[str]:
    """What a collapsing router looks like, in words."""
    found, selected = [], metrics.get("selected", [])
    if config.router == "token":
        for d, share in enumerate(-np.diff([*selected, 0.0]), 1):  # of the tokens that leave at depth d
            if share < 0.02:
                found.append(f"{share:.1%} of the tokens choose depth {d}: raise --balance-coef, or use --balance bias")
    if config.router == "expert":
        for r, (by_threshold, by_topk) in enumerate(zip(selected, config.capacities, strict=False)):
            if not by_topk / 2 <= by_threshold <= (1.5 + by_topk) / 2:
                what = f"{by_threshold:.1%} of the tokens by threshold, {by_topk:.1%} by top-k"
                found.append(f"recursion {r} takes {what}: train longer, or raise --aux-coef")
        if metrics.get("dead", 0) > 0.5:
            found.append(f"{metrics['dead']:.0%} of the positions never reach the last recursion")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

GATHER = gathered.StateDictOptions(full_state_dict=True, cpu_offload=True)  # one kind of file for 1 process, DDP, FSDP


def save(run: Run) -> None:
    run.progress["skipped"] = int(run.bad[1])
    model = gathered.get_model_state_dict(run.model, options=GATHER)
    optimizer = gathered.get_optimizer_state_dict(run.model, run.optimizer, options=GATHER)
    state = dict(model=model, optimizer=optimizer, config=run.saved_config(), rng=torch.get_rng_state())
    run.world.chief_does(write_checkpoint, run, state | run.progress)


def write_checkpoint(run: Run, state: dict) -> None:
    """Writes ckpt_STEP.pt so that at every moment either the whole file exists or none of it; then prunes."""
    step = state["step"]
    try:
        with written_at_once(run.out / f"ckpt_{step:06d}.pt") as f:
            write_state(f, state)
        # A file of a later step is one that the run could not continue from: it must not displace a good one.
        for path in [p for p in checkpoints(run.out) if step_of(p) <= step][: -run.cfg.keep]:
            if step_of(path) not in (state["best_step"], *run.cfg.keep_at):
                path.unlink()
    except (OSError, RuntimeError) as e:
        fail(f"cannot save the checkpoint of step {step} in {run.out}: {e}; earlier checkpoints are intact")


def inside(path: str | Path, out: str | Path) -> bool:
    return Path(path).resolve().parent == Path(out).resolve()


def find_checkpoint(cfg: TrainConfig, tensors: dict) -> tuple[Path, dict] | None:
    """Finds what to continue from: the newest good checkpoint in --out, --resume's, or where --cooldown-from starts ->
    its path and what every process must know of it; weights and optimizer go to `tensors`, as only the chief needs
    them."""
    paths = checkpoints(Path(cfg.out))
    named = cfg.cooldown_from if cfg.resume == "auto" else cfg.resume
    if cfg.cooldown_from and inside(cfg.cooldown_from, cfg.out):
        fail(f"--cooldown-from {cfg.cooldown_from} is in --out {cfg.out}: give the cool-down an --out of its own")
    if paths and (cfg.resume == "auto" or step_of(Path(named)) < step_of(paths[-1])):
        if named and inside(named, cfg.out):
            later = f"{cfg.out} holds the later {paths[-1].name}"
            fail(f"--resume {named}: {later}: choose another --out, or remove that file")
        named = ""  # the run that started there has come further: this is the same command once more
    if named and not Path(named).is_file():
        fail(f"checkpoint {named} does not exist")

    # the newest that is whole
    for path in [Path(named)] if named else paths[::-1]:
        try:
            checkpoint = read_checkpoint(path)
        except DAMAGE as e:
            reason = f"checkpoint {path} is damaged ({' '.join(str(e).split())[:200] or type(e).__name__})"
            if named:
                fail(f"{reason}: use another one")
            print(f"warning: {reason}: trying the one before", file=sys.stderr, flush=True)
            continue
        tensors.update(model=checkpoint.pop("model"), optimizer=checkpoint.pop("optimizer"))
        return path, checkpoint
    if paths:
        fail(f"every checkpoint in {cfg.out} is damaged: remove that directory to start over")
    return None


def resume(run: Run, path: Path, saved: dict, tensors: dict) -> None:
    """Puts the run where the checkpoint was, whatever processes wrote it. Says precisely what will not be as it was."""
    notes, schedule = run.world.chief_does(check_same_run, run, path, saved)
    run.cfg = replace(run.cfg, **schedule)
    options = replace(GATHER, cpu_offload=False, broadcast_from_rank0=dist.is_initialized())
    decays = [group["weight_decay"] for group in run.optimizer.param_groups]
    gathered.set_model_state_dict(run.model, tensors.get("model", {}), options=options)
    gathered.set_optimizer_state_dict(run.model, run.optimizer, tensors.get("optimizer", {}), options=options)
    for group, decay in zip(run.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay  # the flag's, not the checkpoint's
    run.progress = {k: saved[k] for k in run.progress}
    run.bad[1] = run.progress["skipped"]
    torch.set_rng_state(saved["rng"])
    if run.cfg.cooldown_from and not inside(path, run.out):
        run.progress.update(best_loss=math.inf, best_step=-1)
    run.world.say(f"continuing from {path}" + (f"; changed since: {', '.join(notes)}" if notes else ""))


def check_same_run(run: Run, path: Path, saved: dict) -> tuple[list[str], dict]:
    """Refuses another model or tokenizer, and a step that the schedule does not have -> (what else differs between this
    command and the checkpoint's, in words; the fields of SCHEDULE, where they are not this command's)."""
    now = run.saved_config()
    then = json.loads(json.dumps(saved["config"]))  # older checkpoints hold tuples

    # what would make it another run
    defaults = {f.name: f.default for f in fields(MoRConfig)}  # of settings that are younger than the checkpoint
    there = defaults | then["model"]
    model = [f"{k} {there[k]} there, {v} here" for k, v in now["model"].items() if v != there[k]]
    if model:
        fail(f"{path} is another model ({', '.join(model)}): repeat its flags, or choose another --out")
    theirs = then["data"]["tokenizer"], then["data"]["vocab_size"]
    ours = now["data"]["tokenizer"], now["data"]["vocab_size"]
    if theirs != ours:
        fail(f"{path} was trained with tokenizer {theirs}, {run.cfg.data} has {ours}: use data of the same one")
    theirs = then["train"].get("optimizer", "adamw")
    if theirs != run.cfg.optimizer:
        fail(f"{path} was trained with --optimizer {theirs}, this is {run.cfg.optimizer}: repeat that flag")
    schedule = {}
    if run.cfg.cooldown_from:
        schedule = {k: then["train"][k] for k in SCHEDULE}
        if not inside(path, run.out):  # another run's plateau; else a cool-down that was interrupted
            schedule = cool_down(schedule, saved["step"], run.cfg.steps)
    elif saved["step"] > run.cfg.steps:
        fail(f"{path} has done {saved['step']} steps already, more than --steps {run.cfg.steps}")

    # what makes it go on in another way
    harmless = "out resume cooldown_from data device dtype compile log_every keep keep_at budgets recipe dry_run"
    harmless = [*harmless.split(), "tensorboard", "wandb", "wandb_project"]
    changed = {k: v for k, v in (now["train"] | schedule).items() if v != then["train"].get(k) and k not in harmless}
    notes = [f"{k} {then['train'].get(k)} -> {v}" for k, v in changed.items()]
    if now["data"] != then["data"]:
        notes.append("data (its blocks come in another order from here)")
    return notes, schedule


# ---------------------------------------------------------------------------------------------------------------------
# what is told: log, metrics.jsonl, picture


def start_run_directory(run: Run) -> int:
    """config.json, and metrics.jsonl without what was logged after the checkpoint that the run continues from -> the
    step of the last evaluation in it."""
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        for leftover in run.out.glob("*.tmp"):
            leftover.unlink()
        with written_at_once(run.out / "config.json") as f:
            f.write(json.dumps(run.saved_config(), indent=1).encode())
        ranks = Path(run.cfg.data, run.meta["tokenizer"])
        if ranks.suffix == ".tiktoken" and ranks.exists():  # so that the run can be sampled wherever it is moved
            shutil.copyfile(ranks, run.out / ranks.name)
        rows = [row for row in read_metrics(run.out) if row["step"] <= run.progress["step"] and run.progress["step"]]
        with written_at_once(run.out / "metrics.jsonl") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    except OSError as e:
        fail(f"cannot write to --out {run.out}: {e.strerror}")
    return max((row["step"] for row in rows if "loss" not in row), default=0)


def open_sinks(run: Run) -> list[tuple[Callable, Callable]]:
    """Returns (log(numbers, step), close()) of each tracker. A resumed run continues what it has written there."""
    cfg, sinks = run.cfg, []
    if cfg.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run wrote after its last checkpoint comes once more
        writer = SummaryWriter(cfg.out, purge_step=run.progress["step"] + 1)
        sinks.append((lambda row, step: [writer.add_scalar(k, v, step) for k, v in row.items()], writer.close))
    if cfg.wandb:
        import wandb

        project = cfg.wandb_project or os.environ.get("WANDB_PROJECT") or "nanomor"
        name = os.environ.get("WANDB_NAME") or run.out.name
        resumed = dict(id=os.environ.get("WANDB_RUN_ID") or wandb_id(run.out), resume="allow")
        try:
            wandb.init(project=project, name=name, dir=cfg.out, config=asdict(cfg), **resumed)
        except Exception as e:  # no key, no network, no such project: a class for each, and none is a bug here
            reason = " ".join(str(e).split())[:200]
            fail(f"--wandb: {reason}; log in (wandb login), or set WANDB_API_KEY, or WANDB_MODE=offline")
        sinks.append((wandb.log, wandb.finish))
    return sinks


def wandb_id(out: Path) -> str:
    """Returns the name under which wandb knows the run in this directory: made once, and kept beside it."""
    file = out / "wandb_id"
    if not file.exists():
        file.write_text(os.urandom(8).hex())
    return file.read_text()


def record(run: Run, row: dict) -> None:
    """One line of metrics.jsonl, and the same to the optional sinks."""
    row = dict(step=run.progress["step"]) | row
    try:
        with open(run.out / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
    except OSError as e:
        fail(f"cannot write {run.out / 'metrics.jsonl'}: {e.strerror}; checkpoints are intact")
    for log, _ in run.sinks:
        log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=row["step"])


def log_step(run: Run, stats: Tensor, seconds: float, steps: int) -> None:
    """Tells what `steps` steps in `seconds` came to; `stats`: train_step's, of the last of them, on the CPU."""
    cfg, world, step = run.cfg, run.world, run.progress["step"]
    loading = torch.tensor([run.loading / seconds / world.size])  # a bound on the waiting: a GPU computes meanwhile
    loss, lm, *others, depth, dropped, loading = world.sum(torch.cat([stats[:-1], loading])).tolist()
    row = dict(loss=loss, lm=lm)
    row |= {name: value for name, value in zip(TERMS[1:], others, strict=True) if value != 0}
    row |= dict(depth=depth, norm=float(stats[-1]), lr=run.optimizer.param_groups[0]["lr"])
    if run.config.router not in ("none", "expert"):
        row["dropped"] = dropped
    shown = describe(row)

    # how fast
    speed = steps * cfg.batch_tokens / seconds
    flops = 3 * run.model.flops_per_token(run.config.block_size, head=True) * speed  # backward is twice the forward
    row |= dict(tokens_per_second=speed, flops_per_second=flops, of_peak=flops / run.peak, loading=loading)
    row |= dict(skipped=int(run.bad[1]), peak_memory=peak_memory(world.device))
    minutes, left = divmod(int((cfg.steps - step) * seconds / steps), 60)
    speed = f"{speed:,.0f} tok/s  {flops / 1e12:.3f} TFLOP/s {flops / run.peak:.0%} of peak"
    line = f"step {step:>5}/{cfg.steps}  {shown}  {speed}  eta {minutes}:{left:02d}"
    if row["skipped"]:
        line += f"  skipped {row['skipped']}"
    world.say(line)
    world.chief_does(record, run, row)

    # what the user should know
    if dropped > 0.01 and not run.warned:
        run.warned = True
        what = f"{dropped:.1%} of the tokens find no slot at a depth that they chose"
        remedy = f"raise --capacity-slack {run.config.capacity_slack:g}; {run.config.n_recursion} drops none"
        world.say(f"warning: {what}: {remedy}, as the paper's runs")
    if run.bad[0] >= cfg.max_skipped:
        counts = zip(TERMS, world.sum(run.bad[2:].clone()).tolist(), strict=True)
        blame = ", ".join(f"{k} {int(n)} times" for k, n in counts if n) or "the gradient, no loss"
        good = (checkpoints(run.out) or ["none yet"])[-1]
        what = f"{int(run.bad[0])} updates in a row were not finite, all skipped (not finite: {blame})"
        world.chief_does(fail, f"{what}; the last good checkpoint: {good}; lower --lr or raise --warmup")


def describe(row: dict) -> str:
    parts = {k: "/".join(f"{x:.3f}" for x in v) if isinstance(v, list) else f"{v:.4g}" for k, v in row.items()}
    return "  ".join(f"{k} {v}" for k, v in parts.items())


def peak_memory(device: torch.device) -> int:
    """Bytes: of the allocator on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_model(run: Run) -> str:
    c, start = run.config, Path(run.cfg.init_from).name or run.cfg.preset
    layers = f"1+{c.n_block}x{c.n_recursion}+1" if c.n_unshared else f"{c.n_block}x{c.n_recursion}"
    return f"{start}, {c.router} router, {layers} layers, {run.model.num_params() / 1e6:.2f}M + embedding"


def plot(run: Run, bigram: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key, label, style in (("lm", "training", "-"), ("val_loss", "validation", "o-"), ("val_topk", "top-k", "x--")):
        points = [(row["step"], row[key]) for row in read_metrics(run.out) if key in row]
        ax.plot(*np.array(points).reshape(-1, 2).T, style, label=label if points else None)
    ax.axhline(bigram, color="gray", ls=":", label="bigram model")
    ax.set(xlabel="step", ylabel="nats per token")
    ax.set_title(spell(f"{run.out.name}: {describe_model(run)}"), parse_math=False)  # a name may have a $
    ax.legend()
    try:
        plt.savefig(run.out / "loss.png", dpi=120)
    except OSError as e:
        run.world.say(f"warning: cannot write {run.out / 'loss.png'}: {e.strerror}")
    plt.close()


# ---------------------------------------------------------------------------------------------------------------------
# the loop


class StopRequest:
    """Finishes the step, saves and exits 0 on SIGTERM, Ctrl-C, or when the terminal closes (SIGHUP, unless nohup has it
    ignored). A second Ctrl-C stops at once, unless within a second of the first: under torchrun the terminal and
    torchrun both deliver the same one."""

    def __init__(self):
        self.since = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, _frame) -> None:
        if self.since is None:
            self.since = time.monotonic()
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"stopping after this step\n")  # not print(), which may be what was interrupted
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:
            os._exit(130)


def train(run: Run, rows: np.ndarray, evaluated: int, stop: StopRequest) -> dict | None:
    """Takes steps, evaluates, saves -> metrics of the last evaluation; None if asked to stop before. Goes round once
    more than there are steps, so that the last weights are evaluated and saved as well."""
    cfg, world, progress = run.cfg, run.world, run.progress
    first = progress["step"]
    save_every = cfg.save_every or cfg.eval_every
    while True:
        # what is due before the next step
        step = progress["step"]
        stopping = world.agree(stop.since is not None)
        done = step == cfg.steps
        fresh = step > first
        saving = fresh and (done or stopping or step % save_every == 0 or step in cfg.keep_at)
        evaluating = done or (step > evaluated and step % cfg.eval_every == 0 and not stopping)

        if evaluating:
            metrics = evaluate(run, rows)
            if step > evaluated:
                world.chief_does(record, run, metrics)
            loss = metrics.get("val_loss", metrics.get("val_topk"))
            if (saving or not fresh) and loss < progress["best_loss"]:
                progress.update(best_loss=loss, best_step=step)
            world.say(f"step {step:>5}  evaluation: {describe(metrics)}")
            if step >= cfg.steps // 2:
                for warning in router_warnings(metrics, run.config):
                    world.say(f"warning: {warning}")
        if saving:
            save(run)
        if done:
            return metrics
        if stopping:
            world.say(f"stopped after step {step}; the same command continues from {run.out}")
            return None

        # a step, timed without evaluating and saving
        if not fresh or saving or evaluating:
            mark, marked, run.loading = time.perf_counter(), step, 0.0
        stats = train_step(run)
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            stats = stats.cpu()  # the one place of the loop that waits for the device
            log_step(run, stats, time.perf_counter() - mark, step + 1 - marked)
            mark, marked, run.loading = time.perf_counter(), step + 1, 0.0


class OutputLock:
    """A file in a run directory that one process group at a time holds, and that says who. A process that dies, even by
    kill -9, lets go of it; a shared file system passes the lock on to other machines."""

    def __init__(self, out: str):
        self.path, self.file = Path(out, "lock"), None

    def take(self) -> None:
        """Takes the lock, if the directory is there; ends the program if another one has it."""
        if self.file is not None or not self.path.parent.is_dir():
            return
        try:
            file = open(self.path, "a+")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self.path.read_text().strip() or "another process"
            fail(f"--out {self.path.parent} is in use by {holder}: wait for it, or choose another --out")
        except OSError:
            return  # not writable, as the first real file will say; or a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
        file.flush()
        self.file = file

    def release(self) -> None:
        if self.file is not None:
            self.file.close()


def plan_budgets(cfg: TrainConfig, config: MoRConfig) -> list[TrainConfig]:
    """Returns the runs that --budgets asks for: the plateau, and from it a cool-down to each budget in a directory of
    its own. The warm-up is a part of the smallest budget (paper Appendix D)."""
    with torch.device("meta"):
        flops = MoR(config).flops_per_token(config.block_size, convention="paper") * cfg.batch_tokens
    totals, branches = {}, {}
    for budget in cfg.budgets:
        steps = round(budget / flops if budget >= 1e9 else budget)  # nobody takes 1e9 steps
        branches[budget] = steps - round(cfg.cooldown * steps)
        totals[budget] = steps
    smallest = min(totals.values())
    warmup = round(cfg.warmup if cfg.warmup >= 1 else cfg.warmup * smallest)
    if not warmup <= min(branches.values()) < smallest:
        what = f"--budgets {min(cfg.budgets):g} is {smallest} steps of {flops:.3g} FLOPs, {warmup} of them warm-up"
        fail(f"{what}: too few to cool down from; lower --batch-tokens or --warmup, or raise the budget")
    keep = tuple(sorted(branches.values()))
    plateau = replace(cfg, steps=keep[-1], warmup=warmup, cooldown=0, keep_at=keep, budgets=())
    runs = [plateau]
    for budget, steps in totals.items():
        start = Path(cfg.out, f"ckpt_{branches[budget]:06d}.pt")
        out = Path(cfg.out, f"budget_{budget:g}")
        more = dict(steps=steps - branches[budget], cooldown_from=str(start), out=str(out), resume="auto", keep_at=())
        runs.append(replace(plateau, **more))
    return runs


def main(argv: list[str] | None = None) -> None:
    # every process finds the same mistakes: one line per node is enough
    with redirect_stderr(open(os.devnull, "w")) if os.environ.get("LOCAL_RANK", "0") != "0" else nullcontext():
        cfg, given = read_flags(argv)
        meta = load_meta(cfg.data)
        config, weights = initial_model(cfg, given, meta)
        shards = open_data(cfg, meta, config)
        if cfg.compile:
            check_compiler()
        runs = plan_budgets(cfg, config) if cfg.budgets else [cfg]
        world = join_world(cfg)
        check_ids(cfg, shards, meta["vocab_size"], world)
        micro_batch = fit_micro_batch(cfg, config, world)
    runs = [replace(each, micro_batch=micro_batch) for each in runs]
    for warning in warn_of_plan(cfg, meta):
        world.say(f"warning: {warning}")
    if cfg.dry_run:
        for each in runs:
            world.say(describe_plan(each, config, world))
        return

    results = []
    for each in runs:
        lock = OutputLock(each.out)
        try:
            metrics = train_run(each, config, weights, meta, shards, world, lock)
        finally:
            lock.release()
        if metrics is None:  # asked to stop
            return
        results.append(metrics.get("val_loss", metrics.get("val_topk")))
    for budget, loss in zip(cfg.budgets, results[1:], strict=False):
        world.say(f"budget {budget:g}: validation {loss:.4f} nats per token")


def describe_plan(cfg: TrainConfig, config: MoRConfig, world: World) -> str:
    with torch.device("meta"):
        model = MoR(config)
    tokens = cfg.steps * cfg.batch_tokens
    flops = tokens * model.flops_per_token(config.block_size, convention="paper")
    sequences = cfg.batch_tokens // config.block_size // world.size
    what = f"{model.num_params() / 1e6:.2f}M parameters + embedding"
    length = f"{cfg.steps} steps of {cfg.batch_tokens} tokens = {tokens:.3g}"
    cost = f"{flops:.3g} FLOPs forward as the paper counts"
    return f"{cfg.out}: {what}; {length}; {cost}; {sequences} sequences per step and process"


def train_run(
    cfg: TrainConfig,
    config: MoRConfig,
    weights: dict[str, Tensor] | None,
    meta: dict,
    shards: tuple[Shards, Shards],
    world: World,
    lock: OutputLock,
) -> dict | None:
    """Trains a model from its start, or from where it was -> metrics of the last evaluation; None if asked to stop."""
    world.chief_does(lock.take)
    tensors = {}
    path, saved = world.chief_does(find_checkpoint, cfg, tensors) or (None, None)
    if cfg.dtype == "auto" and saved:
        cfg.dtype = saved["config"]["train"]["dtype"]
    peaks = {k: matmul_peak(world.device, v) for k, v in DTYPES.items() if cfg.dtype in (k, "auto")}
    cfg.dtype = world.chief_does(lambda: max(peaks, key=peaks.get))
    peak = float(world.sum(torch.tensor(peaks[cfg.dtype])))

    # the model
    if world.device.type == "cpu":  # else the embedding's gradient adds up in the order that threads happen to run
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.reset()  # what an earlier run compiled is not this model's
    torch._dynamo.config.error_on_recompile = False
    torch.manual_seed(cfg.seed)
    model = MoR(config)
    if weights:
        model.load_state_dict(weights)
    model.to(world.device).checkpoint_recursions = cfg.checkpoint_recursions
    wrapped = parallelise(model, cfg, world)
    optimizer = make_optimizer(model, cfg)

    # all that the loop carries
    blocks = Blocks(shards[0], config.block_size, cfg.seed)
    bad = torch.zeros(2 + len(TERMS), device=world.device)
    run = Run(cfg, config, world, meta, blocks, model, wrapped, optimizer, peak, bad)
    where = f"{world.size} x {world.device.type}, {cfg.dtype}, peak {peak / 1e12:.2f} TFLOP/s"
    world.say(f"{describe_model(run)} on {where}")
    if saved:
        resume(run, path, saved, tensors)
    del tensors
    evaluated = world.chief_does(start_run_directory, run)
    world.chief_does(lock.take)
    world.chief_does(lambda: run.sinks.extend(open_sinks(run)))
    stop = StopRequest()
    if cfg.compile:
        warm_up(run)

    rows = shards[1].blocks(config.block_size, cfg.eval_tokens)
    metrics = train(run, rows, evaluated, stop)
    for _, close in run.sinks:
        close()
    if metrics and world.rank == 0:
        bigram = bigram_nll(shards[0], rows, meta["vocab_size"])
        kinds = (("causal", "val_loss"), ("top-k", "val_topk"))
        nll = "  ".join(f"{name} {metrics[key]:.4f}" for name, key in kinds if key in metrics)
        world.say(f"validation, nats per token:  {nll}  (a bigram model of the same tokens: {bigram:.4f})")
        plot(run, bigram)
        world.say(f"peak memory {peak_memory(world.device) / 2**20:,.0f} MiB; everything is in {run.out}")
    return metrics


if __name__ == "__main__":
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except Exception:  # a bug: shown as Python would, but left as every other end of a process group is
        sys.excepthook(*sys.exc_info())
        code = 1
    if dist.is_initialized():
        # Without destructors: gloo's joins a thread that may be waiting for the GIL, which its caller holds.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
