"""
Measures what a Mixture-of-Recursions costs and how fast it is, beside its baselines, in one run.

    python bench.py cost 135M 360M                    # parameters, FLOPs, KV beside the paper's: computed, not run
    python bench.py cost 360M --devices 8 --batch 16  # what each of 8 devices holds and sends: does it fit
    python bench.py train                             # training step of five variants, interleaved
    python bench.py train vanilla expert-3 --fresh    # first compile, warm start, peak memory
    python bench.py train vanilla expert-3 --profile  # where the step goes
    python bench.py train --sweep capacity --seq 1024 --batch 4   # does time follow FLOPs? also --sweep T, --sweep N
    python bench.py decode --batch 1 8                # cached decoding, against transformers' Llama where installed
    python bench.py decode expert-3 --ablate --no-llama --no-uncached   # what fused attention, packing, exits are worth
    python bench.py decode vanilla --int8 --llama-cpp FILE.gguf --layers 0 --vocab 0   # the sizes of SmolLM2-135M
    python bench.py serve                             # continuous depth-wise batching against vanilla's, untrained
    python bench.py serve --run out/NAME              # the same by what a checkpoint's routers decide
    python bench.py serve vanilla expert-3 --widths 8 16 32 64 --no-equal-memory       # tokens/s against width
    python bench.py serve vanilla expert-3 share-3 --prompts 256   # a mixed load with prompts, and how long users wait
    python bench.py launches vanilla expert-3 --preset 360M --layers 0 --vocab 0   # kernels per stage of a GPU, counted
    python bench.py gpu --json gpu.json               # all that is worth knowing of a GPU, in about ten minutes
    python bench.py plot results/*.json -o results.png

A variant is vanilla, recursive-N, expert-N, share-N (expert choice, shared K/V) or token-N with N recursions. All have
the same unrolled depth; where N does not divide it, depth grows as the paper's does. The default model is the 135M
preset with 11 layers and a vocabulary of 8192, which a laptop can train.

Every command prints a table, then one line of JSON, which --json FILE keeps as well. How it measures: warm-up, which is
compilation, apart; then rounds A B C A B C, so that a slow minute hits all variants; medians over rounds, and of ratios
taken within a round. A machine that was busy, or rounds that differ much, are said in "warnings". Nothing waits for
the device inside a measured stage; CUDA is timed by events. --quick makes everything tiny: does it run, not how fast.

Shapes: B sequences, T tokens each, D width, N recursions.
"""

import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import model as model_file
import ops
from checkpoint import load_run
from cli import Parser, fail, open_device
from config import PRESETS, MoRConfig
from engine import Engine
from generate import Decoder, Graphs, generate
from model import MoR
from train import DTYPES, TrainConfig, make_optimizer, matmul_peak, plan_memory

KINDS = {
    "vanilla": {},
    "recursive": {},
    "expert": dict(router="expert"),
    "share": dict(router="expert", kv="share"),
    "cycle": dict(router="expert", kv="share", sharing="cycle"),
    "token": dict(router="token"),
}
QUICK = dict(vocab_size=256, n_layer=4, n_head=2, n_kv_head=1, d_model=64, d_ff=128)

# What the paper reports: parameters without embedding (Table 6), and forward FLOPs against vanilla at equal tokens,
# from Table 3, whose EFLOPs have one decimal: the ratios are good to 0.006.
PAPER_PARAMS = {
    "135M": {"vanilla": 106e6, "expert-3": 42e6},
    "360M": {"vanilla": 315e6, "expert-2": 167e6, "expert-3": 118e6, "expert-4": 98e6},
    "730M": {"vanilla": 654e6, "expert-3": 252e6},
    "1.7B": {"vanilla": 1.61e9, "expert-3": 0.67e9},
}
PAPER_FLOPS = {"360M": {"expert-2": 0.745, "expert-3": 0.667, "expert-4": 0.667}}


# ----------------------------------------------------------------------------------------------------------------------
# models


def make_config(variant: str, preset: str, T: int, **overrides) -> MoRConfig:
    """Returns the configuration of `expert-3` and the like. n_layer in overrides grows to the next depth that N
    divides. Ends the program if there is no such variant."""
    kind, _, number = variant.partition("-")
    if kind not in KINDS or number.isdigit() == (kind == "vanilla"):
        fail(f"unknown variant {variant!r}: use vanilla, or {', '.join(KINDS)} with a number of recursions: expert-3")
    n = int(number or 1)
    if n > 1 and "n_layer" in overrides:
        unshared = 0 if kind == "cycle" else 2
        layers = math.ceil((overrides["n_layer"] - unshared) / n)
        overrides["n_layer"] = unshared + n * max(1, layers)
    try:
        return MoRConfig.preset(preset, block_size=T, n_recursion=n, **KINDS[kind], **overrides)
    except ValueError as e:
        fail(str(e))


def choose_size(args: Namespace) -> dict[str, int]:
    """Returns what the command line changes of the preset."""
    if args.quick:
        return QUICK
    size = dict(n_layer=args.layers, vocab_size=args.vocab)
    return {name: value for name, value in size.items() if value}


def describe_layers(c: MoRConfig) -> str:
    """Returns "1+3x3+1" and the like."""
    inner = f"{c.n_block}x{c.n_recursion}" if c.n_recursion > 1 else str(c.n_layer)
    return f"1+{inner}+1" if c.n_unshared else inner


def make_training_model(config: MoRConfig, args: Namespace) -> MoR:
    """Returns a model to train, compiled as one graph. A recompilation is an error: it would be timed."""
    model = MoR(config).to(args.device).train()
    model.checkpoint_recursions = args.checkpoint_recursions
    if args.compile == "whole":
        # isolated, since Dynamo otherwise counts the graphs of a function, not of a model
        model.compile(fullgraph=True, dynamic=False, isolate_recompiles=True, recompile_limit=1)
    return model


def make_training_step(model: MoR, B: int, T: int, dtype: torch.dtype) -> list[Callable[[], None]]:
    """Returns forward, backward and optimizer of a step on random tokens, as three calls. What a router has learned
    does not matter for their cost: how many tokens each recursion takes is fixed."""
    device = model.wte.weight.device
    optimizer = make_optimizer(model, TrainConfig(lr=1e-4))
    idx, targets = torch.randint(model.config.vocab_size, (2, B, T), device=device)
    loss: list[Tensor] = []

    def forward():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss.append(model(idx, targets).loss)

    def backward():
        loss.pop().backward()

    def optimize():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return [forward, backward, optimize]


# ----------------------------------------------------------------------------------------------------------------------
# inside the model and the engine: all that this file knows of their fields


class BalancedRouter(nn.Module):
    """Stands in for the router of an untrained model: decides by a hash of the hidden state, so that a fraction
    capacity_r of all tokens runs recursion r. Like a real one it is causal, static, and reads its token's stream."""

    def __init__(self, c: MoRConfig, r: int | None):
        super().__init__()
        self.goes_on = None  # expert choice: P(runs r | ran r - 1)
        if r is not None:
            self.goes_on = c.capacities[r] / c.capacities[max(0, r - 1)]
        self.register_buffer("border", 1 - torch.tensor(c.capacities))  # token: depth is the number of borders below u
        self.register_buffer("projection", torch.randn(c.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits fp32 of x [B, T, D]: [B, T, 1] for expert choice, [B, T, N] for token choice."""
        u = (x.float() * self.projection).sum(-1, keepdim=True) * 1e3
        u = u - u.floor()  # uniform in [0, 1)
        if self.goes_on is not None:
            return self.goes_on - u
        return torch.where(u >= self.border, self.border, -1.0).float() * 100  # the last border below u wins


def balance_routers(model: MoR) -> MoR:
    """Puts balanced routers in the place of the model's own, and returns it."""
    c = model.config
    if c.router == "expert":
        model.routers = nn.ModuleList(BalancedRouter(c, r) for r in range(c.n_recursion))
    if c.router == "token":
        model.router = BalancedRouter(c, None)
    return model


def attend_by_sdpa(q: Tensor, k: Tensor, v: Tensor, index: None, length: Tensor) -> Tensor:
    """Returns what attend_cache does, by torch's own attention."""
    mask = torch.arange(k.size(1), device=q.device) < length[:, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True)
    return y.transpose(1, 2)


PLAIN_KERNELS = {"linear": F.linear, "attend_cache": attend_by_sdpa}


def replace_kernel(name: str | None) -> ExitStack:
    """Returns a context in which the model calls torch's plain function for a fast one; None: nothing is replaced. It
    must be open when the model compiles. model.py imports the kernels by name, so they are replaced there as well."""
    context = ExitStack()
    for module in (model_file, ops) if name else ():
        context.enter_context(patch.object(module, name, PLAIN_KERNELS[name]))
    return context


def count_block_params(model: MoR) -> int:
    """Returns the parameters of the shared block."""
    return sum(p.numel() for p in model.block.parameters())


def make_engine(model: MoR, slots: int, width: int, turn_width: int, args: Namespace) -> Engine:
    """Returns an engine for `slots` resident requests of up to args.max_len tokens."""
    options = dict(turn_width=turn_width, slack=args.slack, compile=args.compile, freeze=True)
    return Engine(model, slots, width, args.max_len, **options)


def count_waiting(engine: Engine) -> int:
    """Returns the number of requests that were not admitted yet."""
    return len(engine.waiting)


def take_history(engine: Engine) -> list[dict]:
    """Returns the stages since the last call: stage, seconds, rows and, of a block, recursions (rows in each). From now
    on every stage is kept: the engine's own record is bounded."""
    stages = [stage._asdict() for stage in engine.history]
    engine.history = deque()
    return stages


def measure_kv_bytes(engine: Engine) -> int:
    """Returns the bytes of keys and values of all residents, without the scratch row of unused lanes."""
    return engine.cache.nbytes * engine.slots // engine.cache.batch


def count_overflow(engine: Engine) -> int:
    """Returns how many tokens of the residents ended early for want of room in the cache."""
    return int(engine.cache.overflow.sum())


# ----------------------------------------------------------------------------------------------------------------------
# measuring


def time_stages(stages: list[Callable], device: torch.device) -> list[float]:
    """Returns the seconds of each stage, run one after the other."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for stage in stages:
            stage()
            marks.append(time.perf_counter())
        return [end - start for start, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for stage, event in zip(stages, events[1:], strict=True):
        stage()
        event.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def interleave(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list]:
    """Returns the results of every case, which take turns: A B C A B C."""
    results = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            results[name].append(case())
    return results


def warm_up(name: str, stages: list[Callable], device: torch.device) -> float:
    """Returns the seconds of the first run, which compiles. The second, which still allocates, is not measured."""
    print(f"{name}: ", end="", file=sys.stderr, flush=True)
    seconds = sum(time_stages(stages, device))
    time_stages(stages, device)
    print(f"warm after {seconds:.0f} s", file=sys.stderr, flush=True)
    return seconds


def measure_spread(seconds: list[float]) -> float:
    """Returns how much rounds differ, as a fraction of their median."""
    return (max(seconds) - min(seconds)) / median(seconds)


def compare_rounds(a: list[float], b: list[float]) -> float:
    """Returns the median over rounds of a / b."""
    return median(x / y for x, y in zip(a, b, strict=True))


def run_in_fresh_process(function: Callable, *args, env: dict[str, str]) -> Any:
    """Returns function(*args) of a new interpreter that starts with these environment variables."""
    before = os.environ.copy()
    os.environ.update(env)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure_first_step(config: MoRConfig, B: int, T: int, args: Namespace) -> dict[str, float | None]:
    """Returns the seconds that the first training step takes longer than the second, and the third's peak memory."""
    device = torch.device(args.device)
    model = make_training_model(config, args)
    stages = make_training_step(model, B, T, DTYPES[args.dtype])
    first = sum(time_stages(stages, device))
    second = sum(time_stages(stages, device))
    kept = 3 * sum(p.nbytes for p in model.parameters())  # weights and two AdamW moments
    return dict(start=first - second, peak_bytes=measure_peak_memory(stages, kept, device))


def measure_peak_memory(stages: list[Callable], kept: int, device: torch.device) -> int | None:
    """Returns the bytes that a step needs at most, the `kept` ones included; None where there is no /proc.

    CUDA: the allocator's count. Else the growth of the resident set, whose peak Linux can reset: without interpreter,
    libraries and what compilation left. Right only where freed tensors leave the process at once
    (MALLOC_MMAP_THRESHOLD_)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        time_stages(stages, device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def read_resident(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    before = read_resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    time_stages(stages, device)
    return kept + read_resident("VmHWM") - before


# ----------------------------------------------------------------------------------------------------------------------
# reporting


def describe_run(args: Namespace) -> dict[str, Any]:
    """Returns what a figure needs beside it to mean something."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if commit and subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode:
        commit += "+changes"
    return dict(
        commit=commit or None,
        machine=describe_machine(args.device),
        torch=torch.__version__,
        device=args.device,
        dtype=args.dtype,
        threads=torch.get_num_threads(),
        command=" ".join(["python bench.py", *args.argv]),
        load=round(os.getloadavg()[0], 2),
    )


def describe_machine(device: str) -> str:
    """Returns the names of processor and accelerator."""
    machine = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        machine = names[0].split(":")[1].strip() if names else machine
    machine += f", {os.cpu_count()} cores"
    if device.startswith("cuda"):
        machine += f", {torch.cuda.get_device_name(device)}"
    return machine


def pick(rows: list[dict], key: str) -> list:
    """Returns one field of all rows."""
    return [row[key] for row in rows]


def find_disturbances(facts: dict, spreads: dict[str, float]) -> list[str]:
    """Returns signs that something else ran at the same time."""
    found = []
    for name, spread in spreads.items():
        if spread > 0.15:
            found.append(f"rounds of {name} differ by {spread:.0%} of their median")
    if facts["load"] > 0.3 * os.cpu_count():
        found.append(f"load average {facts['load']} at the start: something else was running, or had just stopped")
    return found


def print_table(rows: list[dict], columns: str) -> None:
    """Prints rows as aligned text. columns: "heading=key|heading=key:format|heading=key:format/divisor|..." """
    grid = []
    for column in columns.split("|"):
        heading, _, rest = column.strip().partition("=")
        key, _, rest = rest.partition(":")
        spec, _, unit = rest.partition("/")
        cells = [heading]
        for row in rows:
            value = row.get(key)
            if value is not None and unit:
                value /= float(unit)
            cells.append("-" if value is None else format(value, spec))
        width = max(map(len, cells))
        align = str.rjust if spec else str.ljust
        grid.append([align(cell, width) for cell in cells])
    for line in zip(*grid, strict=True):
        print("  ".join(line))


# ----------------------------------------------------------------------------------------------------------------------
# cost


def count_cost(preset: str, variant: str, T: int) -> dict[str, Any]:
    """Returns parameters, forward FLOPs per token and K/V bytes of a variant.

    flops is exact, without the head; flops_exact adds head and routers; flops_paper is by the paper's convention."""
    c = make_config(variant, preset, T)
    with torch.device("meta"):
        model = MoR(c)

    # FLOPs: 2 per weight and token, routers included where it says exact
    forward = model.flops_per_token(T)
    routers = sum(p.numel() for name, p in model.named_parameters() if "router" in name)
    exact = model.flops_per_token(T, head=True) + 2 * routers

    # K/V, of all layers and of the shared ones
    kv_bytes = model.kv_bytes(1, T, torch.bfloat16)
    per_layer = 2 * c.n_kv_head * c.head_dim * 2  # K and V of a token, in bf16
    shared_layers = kv_bytes / (T * per_layer) - c.n_unshared

    return dict(
        name=f"{preset} {variant}",
        preset=preset,
        variant=variant,
        layers=describe_layers(c),
        params=model.num_params(),
        params_with_embedding=model.num_params(embedding=True),
        flops=forward,
        flops_exact=exact,
        flops_paper=model.flops_per_token(T, convention="paper"),
        attention=(model.flops_per_token(2 * T) - forward) / forward,  # proportional to T
        kv_per_token=kv_bytes / T,
        kv_bytes=kv_bytes,
        kv_shared_layers=shared_layers / (c.n_block * c.n_recursion),  # against vanilla's K/V of as many layers
        kv_read=sum(c.capacities) / c.n_recursion if c.own_kv else 1.0,
        paper_params=PAPER_PARAMS.get(preset, {}).get(variant),
        paper_ratio=PAPER_FLOPS.get(preset, {}).get(variant),
    )


def plan_devices(row: dict, args: Namespace, fsdp: bool) -> dict[str, Any]:
    """Returns the bytes that each device holds in training and serving, and sends per step."""
    n = args.devices
    P = row["params_with_embedding"]
    config = make_config(row["variant"], row["preset"], args.seq)
    held = plan_memory(config, args.batch, args.seq, n if fsdp else 1)
    kv_cache = args.batch * row["kv_bytes"]

    return dict(
        name=f"{row['name']} {'FSDP' if fsdp else 'DDP'}",
        **held,
        training=sum(held.values()),
        sent=2 * 4 * P * (n - 1) // n,  # ring: all-reduce, or reduce-scatter and all-gather
        kv_cache=kv_cache,
        serving=2 * P + kv_cache,
    )


def report_cost(args: Namespace) -> dict[str, Any]:
    """Prints what variants of the presets cost and what each device must hold. Nothing is run."""
    rows = []
    for preset in args.presets or (["nano"] if args.quick else ["360M"]):
        if preset not in PRESETS:
            fail(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
        variants = ["vanilla", "recursive-3", "expert-2", "expert-3", "expert-4", "share-3", "token-3"]
        # the first is vanilla, what the others are compared with
        group = [count_cost(preset, variant, args.seq) for variant in variants]
        for row in group:
            for key in ("flops", "flops_exact", "flops_paper", "kv_bytes"):
                row[f"{key}_ratio"] = row[key] / group[0][key]
        rows += group
    plans = [plan_devices(row, args, fsdp) for row in rows for fsdp in (False, True)]

    print(
        f"forward FLOPs per token, T = {args.seq}: counted as the paper does (no head, K and V at full width), beside"
    )
    print("the ratios that it reports; then exact, without the head and with head and routers")
    print_table(
        rows,
        "model=name|layers=layers|params M=params:.1f/1e6|paper=paper_params:.0f/1e6|"
        "paper's MFLOPs=flops_paper:.1f/1e6|ratio=flops_paper_ratio:.4f|reported=paper_ratio:.3f|"
        "exact=flops:.1f/1e6|ratio=flops_ratio:.4f|attention=attention:.1%|with head=flops_exact:.1f/1e6|"
        "ratio=flops_exact_ratio:.4f|KV B/token=kv_per_token:,.0f|KV MiB=kv_bytes:.1f/1048576|"
        "ratio=kv_bytes_ratio:.3f|shared layers=kv_shared_layers:.3f|read=kv_read:.3f",
    )
    print(f"\nGiB per device: {args.devices} devices, {args.batch} sequences of {args.seq} tokens on each")
    gib = ":.2f/1073741824"
    print_table(
        plans,
        f"model=name|weights=weights{gib}|gradients=gradients{gib}|AdamW=optimizer{gib}|"
        f"bf16 copies=casts{gib}|activations=activations{gib}|training=training{gib}|sent per step=sent{gib}|"
        f"KV cache=kv_cache{gib}|serving=serving{gib}",
    )
    return dict(about=describe_run(args), seq=args.seq, rows=rows, plans=plans, warnings=[])


# ----------------------------------------------------------------------------------------------------------------------
# train


def choose_training_cases(args: Namespace) -> dict[str, tuple[MoRConfig, int, int]]:
    """Returns configuration, B and T by name. The first is what the others are compared with."""

    def make_case(variant: str, T: int, **overrides) -> tuple[MoRConfig, int, int]:
        config = make_config(variant, args.preset, T, **choose_size(args), **overrides)
        return config, args.batch * args.seq // T, T  # equal tokens at any T

    if args.sweep == "capacity":
        levels = (1.0, 0.5) if args.quick else (1.0, 0.75, 0.5, 0.25)
        return {f"capacity {level}": make_case("expert-3", args.seq, capacity=(level,) * 3) for level in levels}
    if args.sweep == "T":
        lengths = [args.seq // 2, args.seq, 2 * args.seq, 4 * args.seq]
        lengths = [T for T in lengths if 1 <= T <= args.batch * args.seq]
        return {f"{name} T={T}": make_case(name, T) for T in lengths for name in ("vanilla", "expert-3")}
    if args.sweep == "N":
        names = ["vanilla", "expert-2", "expert-3", "expert-4"]
    else:
        names = args.variants or ["vanilla", "recursive-3", "expert-3", "token-3", "share-3"]
    return {name: make_case(name, args.seq) for name in names}


def measure_training(args: Namespace) -> dict[str, Any]:
    """Times the training step of every case, in turns."""
    facts = describe_run(args)
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype]
    cases = choose_training_cases(args)
    peak = matmul_peak(device, dtype)
    counters = torch._dynamo.utils.counters
    rows = []
    steps = {}

    # compile one after the other
    for name, (config, B, T) in cases.items():
        model = make_training_model(config, args)
        steps[name] = make_training_step(model, B, T, dtype)
        counters.clear()
        row = dict(
            name=name,
            layers=describe_layers(config),
            batch=B,
            seq=T,
            params=model.num_params(),
            flops=3 * model.flops_per_token(T, head=True) * B * T,
            warmup=warm_up(name, steps[name], device),
            graphs=counters["stats"]["unique_graphs"],
            breaks=sum(counters["graph_break"].values()),
        )
        rows.append(row)

    # measure in turns; counters that grow now mean a recompilation
    counters.clear()
    calls = {name: lambda stages=stages: time_stages(stages, device) for name, stages in steps.items()}
    results = interleave(calls, args.rounds)
    recompiles = counters["stats"]["unique_graphs"]
    peak = max(peak, matmul_peak(device, dtype))  # once more: disturbed at the start, it would flatter every row

    # what the rounds say
    for row in rows:
        row |= summarize_training(row, rows[0], results, peak)
        row["tokens_per_second"] = args.batch * args.seq / row["step"]
        if args.profile:
            row["profile"] = profile_step(steps[row["name"]], device)
    steps.clear()  # new processes should have the memory to themselves
    if args.fresh:
        for row in rows:
            row |= measure_fresh_starts(*cases[row["name"]], args)
            row["peak_ratio"] = row["peak_bytes"] and row["peak_bytes"] / rows[0]["peak_bytes"]

    # tables, and all of it as one result
    print(
        f"{args.batch * args.seq} tokens a step, {args.dtype}, {args.rounds} rounds; ratios are to {rows[0]['name']};"
    )
    print(f"{recompiles} recompilations; a matrix product does {peak / 1e12:.2f} TFLOP/s")
    print_training(rows, args)
    return dict(
        about=facts,
        sweep=args.sweep,
        peak_flops=peak,
        recompiles=recompiles,
        rows=rows,
        warnings=find_disturbances(facts, {row["name"]: row["spread"] for row in rows}),
    )


def summarize_training(row: dict, first: dict, results: dict[str, list], peak: float) -> dict[str, Any]:
    """Returns what the rounds of a case say; peak: FLOP/s of a matrix product."""
    rounds = results[row["name"]]
    others = results[first["name"]]
    totals = [sum(stages) for stages in rounds]
    passes = [sum(stages[:2]) for stages in rounds]
    step = median(totals)
    ratio = compare_rounds(totals, [sum(stages) for stages in others])
    by_flops = row["flops"] / first["flops"]
    forward, backward, optimizer = zip(*rounds, strict=True)
    return dict(
        forward=median(forward),
        backward=median(backward),
        optimizer=median(optimizer),
        step=step,
        spread=measure_spread(totals),
        flops_per_second=row["flops"] / step,
        of_peak=row["flops"] / step / peak,
        ratio=ratio,
        ratio_passes=compare_rounds(passes, [sum(stages[:2]) for stages in others]),
        by_flops=by_flops,
        off=ratio / by_flops,
    )


def print_training(rows: list[dict], args: Namespace) -> None:
    """Prints the tables of `train`."""
    print_table(
        rows,
        "variant=name|layers=layers|params M=params:.1f/1e6|step s=step:.3f|spread=spread:.0%|"
        "forward=forward:.3f|backward=backward:.3f|optimizer=optimizer:.3f|tok/s=tokens_per_second:,.0f|"
        "TFLOP/s=flops_per_second:.3f/1e12|of peak=of_peak:.1%|ratio=ratio:.3f|fwd+bwd=ratio_passes:.3f|"
        "by FLOPs=by_flops:.3f|ratio/FLOPs=off:.2f|warm-up s=warmup:.1f|graphs=graphs:d|breaks=breaks:d",
    )
    if args.fresh:
        mib = ":,.0f/1048576"
        print("\nin new processes: seconds with an empty, then with a filled compile cache on disk; MiB at the peak")
        print_table(
            rows,
            f"variant=name|first compile=first_compile:.1f|warm start=warm_start:.1f|peak=peak_bytes{mib}|"
            f"ratio=peak_ratio:.3f|planned=planned_bytes{mib}",
        )
    if args.profile:
        print("\nseconds of one step by kind of kernel")
        kinds = "|".join(f"{kind}={kind}:.3f" for kind in KERNELS)
        print_table([dict(name=row["name"]) | row["profile"] for row in rows], f"variant=name|{kinds}")


def measure_fresh_starts(config: MoRConfig, B: int, T: int, args: Namespace) -> dict[str, Any]:
    """Returns what a start with an empty compile cache on disk takes, and one that finds it filled, which also measures
    memory."""
    with tempfile.TemporaryDirectory() as cache:
        env = {"TORCHINDUCTOR_CACHE_DIR": cache}
        cold = run_in_fresh_process(measure_first_step, config, B, T, args, env=env)
        env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        warm = run_in_fresh_process(measure_first_step, config, B, T, args, env=env)
    return dict(
        first_compile=cold["start"],
        warm_start=warm["start"],
        peak_bytes=warm["peak_bytes"],
        planned_bytes=sum(plan_memory(config, B, T).values()),
    )


KERNELS = {  # kind -> what its kernels are called; the first that fits
    "attention backward": (
        "attention_backward",
        "for_cpu_backward",
        "on_cpu_backward",
        "flash_bwd",
        "sdpa_bwd",
        "bprop",
    ),
    "attention": ("attention", "attend_on_cpu", "flash_fwd", "sdpa", "fmha"),
    "matmul": ("mm", "linear", "gemm", "addmv", "nvjet", "cutlass"),  # nvjet: cuBLAS on Hopper
    "optimizer": ("adam",),
    "fused": ("fused", "triton", "compiled"),  # on the CPU, fused kernels count as time of the region they are in
    "other": ("",),
}


def profile_step(stages: list[Callable], device: torch.device) -> dict[str, float]:
    """Returns the seconds of one step by kind of kernel, each counted without what it calls."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for stage in stages:
            stage()

    seconds = dict.fromkeys(KERNELS, 0.0)
    for event in profiler.key_averages():
        # operators of the CPU carry the time of the kernels that they launch, which are events of their own
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        name = event.key.lower()
        kind = next(kind for kind, parts in KERNELS.items() if any(part in name for part in parts))
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        seconds[kind] += microseconds / 1e6
    return seconds


# ----------------------------------------------------------------------------------------------------------------------
# decode


def make_our_case(
    model: MoR, batches: Tensor, args: Namespace, kernel: str | None = None, **options
) -> Callable[[], dict]:
    """Returns a call of generate.py's `generate` that keeps cache and graphs; each call takes the next batch of prompts
    [B, P]. kernel: what to replace by torch's plain one."""
    _, B, P = batches.shape
    options = dict(compile=args.compile, freeze=True) | options
    decoder = Decoder(model, B, P + args.new, **options)
    turns = iter(batches.tolist())

    def run_case():
        prompts = next(turns)
        with replace_kernel(kernel):
            start = time.perf_counter()
            out = generate(model, prompts, args.new, decoder=decoder)
            seconds = time.perf_counter() - start
        return dict(
            tokens=out.tokens,
            seconds=seconds,
            prefill=out.prefill_seconds,
            step=out.seconds / args.new,  # as many steps as tokens: the last one only tells the depth of the last token
            depth=mean(depth for row in out.depth for depth in row[P:]),
            kv_bytes=decoder.cache.nbytes,
        )

    return run_case


def make_uncached_case(model: MoR, batches: Tensor, args: Namespace) -> Callable[[], dict]:
    """Returns a call that runs a full forward for every token: a prefill of all that there is, again and again. One
    graph, at the final length: the padding behind a prompt does not change it."""
    _, B, P = batches.shape
    length = P + args.new
    cache = model.make_cache(B, length, slack=model.config.n_recursion)  # room for every token at every depth
    graphs = Graphs(args.compile, True, torch.device(args.device))
    turns = iter(batches)

    @torch.no_grad()
    def run_case():
        start = time.perf_counter()
        idx = torch.zeros(B, length, dtype=torch.long, device=args.device)
        idx[:, :P] = next(turns)
        for n in range(P, length):
            lengths = torch.full((B,), n, device=args.device)
            logits = graphs.run(("uncached",), lambda i, n: model.prefill(i, n, cache), idx, lengths)
            idx[:, n] = logits.argmax(-1)
        return dict(tokens=idx[:, P:].tolist(), seconds=time.perf_counter() - start)

    return run_case


def make_llama(c: MoRConfig) -> nn.Module:
    """Returns transformers' model of the dimensions of a vanilla configuration."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        fail("the comparison needs the package transformers: pip install it, or give --no-llama")
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def make_llama_case(model: nn.Module, batches: Tensor, args: Namespace, compiled: bool) -> Callable[[], dict]:
    """Returns a call of transformers' generate with its static cache, compiled as its users would."""
    from transformers import CompileConfig

    options = dict(cache_implementation="static", do_sample=False, eos_token_id=None, pad_token_id=0)
    options["disable_compile"] = not compiled
    if compiled:
        # CUDA graphs, as it does by itself: without them it would be measured against ours
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        options["compile_config"] = CompileConfig(fullgraph=True, dynamic=False, mode=mode)
        options["compile_config"]._compile_all_devices = True  # it leaves CPUs out unless told
    turns = iter(batches.to(model.device))

    def time_call(idx: Tensor, n: int) -> tuple[list, float]:
        start = time.perf_counter()
        out = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, **options)
        tokens = out[:, idx.size(1) :].tolist()
        return tokens, time.perf_counter() - start

    def run_case():
        idx = next(turns)
        _, prefill = time_call(idx, 1)  # one token is the prefill
        tokens, seconds = time_call(idx, args.new)
        step = (seconds - prefill) / max(1, args.new - 1)
        return dict(tokens=tokens, seconds=seconds, prefill=prefill, step=step)

    return run_case


def make_llama_cpp_case(file: Path, batches: Tensor, args: Namespace) -> Callable[[], dict]:
    """Returns a call of llama.cpp for the first prompt of a batch, with as many threads as torch has."""
    import llama_cpp as cpp

    threads = torch.get_num_threads()
    length = batches.size(2) + args.new
    options = dict(n_ctx=length, n_threads=threads, n_threads_batch=threads, verbose=False)
    model = cpp.Llama(str(file), **options)
    turns = iter(batches[:, 0].tolist())

    def feed(tokens: list[int]) -> int:
        array = (cpp.llama_token * len(tokens))(*tokens)  # the batch points to it
        status = cpp.llama_decode(model.ctx, cpp.llama_batch_get_one(array, len(tokens)))
        assert status == 0, f"llama_decode: {status}"
        logits = cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    def run_case():
        cpp.llama_memory_clear(cpp.llama_get_memory(model.ctx), True)
        marks = [time.perf_counter()]
        tokens = [feed(next(turns))]
        marks.append(time.perf_counter())
        for _ in range(args.new):  # as ours, whose last step only tells a depth
            tokens.append(feed(tokens[-1:]))
        marks.append(time.perf_counter())
        prefill, seconds = (end - start for start, end in pairwise(marks))
        return dict(tokens=[tokens[: args.new]], seconds=prefill + seconds, prefill=prefill, step=seconds / args.new)

    return run_case


def make_llama_cpp_cases(file: str, batches: Tensor, args: Namespace) -> dict[str, Callable[[], dict]]:
    """Returns the calls for a GGUF file, whose weights llama.cpp itself makes bf16 and Q8_0."""
    try:
        import llama_cpp as cpp
    except ImportError:
        fail("--llama-cpp needs the package llama-cpp-python: pip install it")
    settings = cpp.llama_model_quantize_default_params()
    settings.allow_requantize = True
    cases = {}
    for name, kind in (("bf16", cpp.LLAMA_FTYPE_MOSTLY_BF16), ("Q8_0", cpp.LLAMA_FTYPE_MOSTLY_Q8_0)):
        settings.ftype = kind
        with tempfile.TemporaryDirectory() as directory:  # what is loaded stays readable without it
            made = Path(directory, "model.gguf")
            if cpp.llama_model_quantize(file.encode(), str(made).encode(), settings) != 0:
                fail(f"--llama-cpp {file}: llama.cpp cannot read it, or not write {made}")
            cases[f"llama.cpp, {name}"] = make_llama_cpp_case(made, batches, args)
    return cases


def make_decoding_cases(
    models: dict[str, MoR], theirs: nn.Module | None, B: int, args: Namespace
) -> dict[str, Callable[[], dict]]:
    """Returns the calls to compare at batch B, by name: the first model first, then what is asked for beside it."""
    first = next(iter(models))
    config = models[first].config
    # other prompts each round (two warm up), or routing's depths would be those of one text
    batches = torch.randint(config.vocab_size, (args.rounds + 2, B, args.prompt))
    cases = {}
    for name, model in models.items():
        cases[name] = make_our_case(model, batches, args)
        if args.int8:
            cases[f"{name}, int8"] = make_our_case(model, batches, args, quantize="int8")

    # the first without each of the things that make it fast
    if args.ablate:
        without = {"SDPA": dict(kernel="attend_cache"), "not packed": dict(freeze=False)}
        if B == 1:
            without["F.linear"] = dict(kernel="linear")
        if config.router != "none":
            without["early exit"] = dict(early_exit=True)
            without["one graph"] = dict(early_exit=False)
        for what, options in without.items():
            cases[f"{first}, {what}"] = make_our_case(models[first], batches, args, **options)

    # what it is compared with
    if args.uncached:
        cases[f"{first}, uncached"] = make_uncached_case(models[first], batches, args)
    if args.llama_cpp and B == 1:
        cases |= make_llama_cpp_cases(args.llama_cpp, batches, args)
    if theirs is not None:
        cases["transformers"] = make_llama_case(theirs, batches, args, compiled=False)
        if args.compile:
            cases["transformers, compiled"] = make_llama_case(theirs, batches, args, compiled=True)
    return cases


def measure_decoding(args: Namespace) -> dict[str, Any]:
    """Times greedy decoding of every variant, in turns, at every batch size."""
    facts = describe_run(args)
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype]
    length = args.prompt + args.new
    names = args.variants or ["vanilla", "expert-3", "token-3"]

    # ours with balanced routers, theirs as it is
    theirs = None
    if args.llama:
        theirs = make_llama(make_config("vanilla", args.preset, length, **choose_size(args))).to(device, dtype).eval()
    models = {}
    for name in names:
        model = balance_routers(MoR(make_config(name, args.preset, length, **choose_size(args))))
        if theirs is not None and name == "vanilla":  # the same weights should give the same tokens
            model.load_reference_state_dict(theirs.state_dict())
        models[name] = model.to(device, dtype).eval()
    flops = {name: model.flops_per_token(length, head=True) for name, model in models.items()}

    # every batch size on its own, its cases in turns
    rows = []
    for B in args.batch:
        cases = make_decoding_cases(models, theirs, B, args)
        warmup = {name: warm_up(name, [case], device) for name, case in cases.items()}
        results = interleave(cases, args.rounds)
        for name in cases:
            row = dict(name=name, batch=B, warmup=warmup[name])
            row |= summarize_decoding(results[name], results[names[0]], B, args)
            variant = name.split(",")[0]
            if variant in (names[0], "transformers"):
                row["same_tokens"] = compare_tokens(results[name], results[names[0]])
            elif B == 1 and variant in flops:
                row["bound"] = flops[names[0]] / flops[variant]
            rows.append(row)

    # the table, and all of it as one result
    print(f"{args.dtype}, greedy, {args.new} tokens after {args.prompt}, balanced routing; a call is prefill and the")
    print(f"decoding after it; ratios are to {rows[0]['name']}")
    print_table(
        rows,
        "decoder=name|batch=batch:d|call tok/s=tokens_per_second:,.0f|spread=spread:.0%|ratio=speedup:.2f|"
        "bound=bound:.2f|decode tok/s=decode_tokens_per_second:,.0f|prefill tok/s=prefill_tokens_per_second:,.0f|"
        "depth=depth:.2f|KV MiB=kv_bytes:.2f/1048576|same tokens=same_tokens:.2f|warm-up s=warmup:.1f",
    )
    return dict(
        about=facts,
        routing="balanced",
        rows=rows,
        warnings=find_disturbances(facts, {f"{row['name']} at batch {row['batch']}": row["spread"] for row in rows}),
    )


def summarize_decoding(rounds: list[dict], base: list[dict], B: int, args: Namespace) -> dict[str, Any]:
    """Returns what the rounds of a case say, and how much faster it is than `base`."""
    seconds = pick(rounds, "seconds")
    row = dict(
        seconds=median(seconds),
        spread=measure_spread(seconds),
        tokens_per_second=B * args.new / median(seconds),
        speedup=compare_rounds(pick(base, "seconds"), seconds),
    )
    if "step" in rounds[0]:
        row["decode_tokens_per_second"] = B / median(pick(rounds, "step"))
        row["prefill_tokens_per_second"] = B * args.prompt / median(pick(rounds, "prefill"))
    if "depth" in rounds[0]:
        row["depth"] = mean(pick(rounds, "depth"))
        row["kv_bytes"] = rounds[0]["kv_bytes"]
    return row


def compare_tokens(rounds: list[dict], base: list[dict]) -> float:
    """Returns the fraction of tokens that are the same in both."""
    same = torch.tensor(pick(rounds, "tokens")) == torch.tensor(pick(base, "tokens"))
    return same.double().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# serve


def load_serving_models(args: Namespace) -> tuple[dict[str, MoR], int]:
    """Returns models by name, the vanilla one first, and the token that an empty prompt becomes."""
    dtype = DTYPES[args.dtype]
    T = args.max_len
    if args.run:
        model, meta, _ = load_run(args.run, args.device, dtype)
        c = model.config
        if c.block_size < T:
            remedy = f"--new {c.block_size * 2 // 3} or less"
            if args.prompts:
                remedy = f"--lengths of at most {c.block_size // 2}"
            fail(f"--run {args.run} has a context of {c.block_size} tokens: give {remedy}")
        sizes = "vocab_size block_size n_layer n_head n_kv_head d_model d_ff".split()
        vanilla = MoR(MoRConfig(**{name: getattr(c, name) for name in sizes}))
        return {"vanilla": vanilla.to(args.device, dtype).eval(), Path(args.run).name: model}, meta["eot"]

    names = [name for name in args.variants or ["expert-2", "expert-3", "expert-4"] if name != "vanilla"]
    models = {}
    for name in ["vanilla", *names]:
        model = balance_routers(MoR(make_config(name, args.preset, T, **choose_size(args))))
        models[name] = model.to(args.device, dtype).eval()
    return models, 0


class Service:
    """Keeps an engine under load: empty prompts, output lengths ~ N(new, new/8), a queue of 8 times the residents.

    Tokens are drawn: greedy requests of an untrained model would all be one text, with its depths."""

    def __init__(self, model: MoR, slots: int, width: int, turn_width: int, eot: int, args: Namespace):
        self.engine = make_engine(model, slots, width, turn_width, args)
        self.model = model
        self.slots = slots
        self.width = width
        self.turn_width = turn_width
        self.new = args.new
        self.eot = eot
        self.rng = random.Random(0)
        self.served = 0  # tokens
        self.windows: list[dict] = []

    def refill(self) -> list:
        """Submits requests until the queue is full, and returns them."""

        def count_token(request, token):
            self.served += 1

        requests = []
        while count_waiting(self.engine) < 8 * self.slots:
            length = round(self.rng.gauss(self.new, self.new / 8))
            length = min(max(1, length), self.new * 3 // 2 - 1)
            seed = self.rng.getrandbits(32)
            request = self.engine.submit([self.eot], length, temperature=1.0, seed=seed, on_token=count_token)
            requests.append(request)
        return requests

    def warm_up(self) -> None:
        """Compiles, then serves first requests of uneven lengths, so that a window finds requests of all ages."""
        first = self.refill()[: self.slots]
        for request in first:
            request.max_new_tokens = self.rng.randint(1, request.max_new_tokens)
        while any(request.status != "done" for request in first):
            self.refill()
            self.engine.step()

    def serve_window(self, seconds: float) -> None:
        """Serves for some seconds and keeps what happened; nothing is left out of the time."""
        take_history(self.engine)  # what came before does not count
        before = self.served
        start = time.perf_counter()
        while time.perf_counter() < start + seconds:
            self.refill()
            self.engine.step()
        wall = time.perf_counter() - start
        stages = take_history(self.engine)
        self.windows.append(dict(seconds=wall, speed=(self.served - before) / wall, stages=stages))


def make_services(models: dict[str, MoR], eot: int, args: Namespace) -> dict[tuple[int, str], Service]:
    """Returns engines under load by width and name. Equal memory: as many residents as fit vanilla's K/V."""
    services = {}
    for width in args.widths:
        for name, model in models.items():
            if model.config.router == "none":  # recursive: its recursions never wait for one another
                services[width, name] = Service(model, width, width, width, eot, args)
                continue
            routed = Service(model, 2 * width - 1, width, width, eot, args)
            services[width, name] = routed
            if args.equal_memory and not args.prompts:
                vanilla = services[width, "vanilla"]
                per_resident = measure_kv_bytes(routed.engine) // routed.slots
                slots = measure_kv_bytes(vanilla.engine) // per_resident
                turn = (slots + 1) // 2
                service = Service(model, slots, slots + 1 - turn, turn, eot, args)
                services[width, f"{name}, equal memory"] = service
    return services


def count_bytes_read(service: Service, fractions: list[float]) -> float:
    """Returns the bytes read per token: weights once per stage, K/V once per token. A request of T tokens is on average
    half done: T/2 keys per layer, fewer where fewer tokens went."""
    c = service.model.config
    itemsize = next(service.model.parameters()).itemsize
    block_params = count_block_params(service.model)
    turn_params = sum(p.numel() for p in service.model.parameters())
    weights = turn_params / service.turn_width + block_params * sum(fractions[1:]) / service.width
    kept = [fraction**2 for fraction in fractions] if c.own_kv else fractions
    keys = service.new / 2 * (c.n_unshared + c.n_block * sum(kept))
    return itemsize * (weights + keys * 2 * c.n_kv_head * c.head_dim)


def summarize_serving(name: str, service: Service, vanilla: dict | None) -> dict[str, Any]:
    """Returns what the windows of one engine say."""
    model = service.model
    n = model.config.n_recursion
    stages = [stage for window in service.windows for stage in window["stages"]]
    turns = [stage for stage in stages if stage["stage"] == "turn"]
    blocks = [stage for stage in stages if stage["stage"] == "block"]

    # the work that routing left, per token
    fractions = [1.0] * n
    if model.config.router != "none":
        entered = sum(pick(turns, "rows"))
        for r in range(1, n):
            fractions[r] = sum(block["recursions"][r] for block in blocks) / entered
    flops = model.flops_per_token(service.new, head=True, fractions=fractions)

    # speed, memory, and how full the batches were
    speeds = pick(service.windows, "speed")
    busy = sum(pick(stages, "seconds"))
    row = dict(
        name=name,
        layers=describe_layers(model.config),
        width=service.width,
        turn_width=service.turn_width,
        slots=service.slots,
        kv_bytes=measure_kv_bytes(service.engine),
        tokens_per_second=median(speeds),
        spread=measure_spread(speeds),
        speeds=speeds,
        depth=sum(fractions),
        fractions=fractions,
        flops=flops,
        bytes_read=count_bytes_read(service, fractions),
        turn_use=mean(pick(turns, "rows")) / service.turn_width,
        turn_seconds=median(pick(turns, "seconds")),
        host=1 - busy / sum(pick(service.windows, "seconds")),
        overflow=count_overflow(service.engine),
    )

    # against vanilla, by time and by what FLOPs and bytes allow
    base = vanilla or row
    ratio = compare_rounds(speeds, base["speeds"])
    bound = base["flops"] / flops
    row |= dict(
        ratio=ratio,
        bound=bound,
        bound_bytes=base["bytes_read"] / row["bytes_read"],
        of_bound=ratio / bound,
    )
    if blocks:
        timeline = [[round(s["seconds"], 6), s["stage"], s["rows"], s["recursions"]] for s in stages[-150:]]
        row |= dict(
            block_use=mean(pick(blocks, "rows")) / service.width,
            block_seconds=median(pick(blocks, "seconds")),
            timeline=timeline,
        )
    return row


def measure_serving(args: Namespace) -> dict[str, Any]:
    """Serves with every engine for windows of some seconds, in turns."""
    args.lengths = args.lengths or ([100, 1000] if args.device.startswith("cuda") else [10, 100])
    if args.lengths[0] > args.lengths[1]:
        fail(f"--lengths {args.lengths[0]} {args.lengths[1]}: the smaller number comes first")
    args.rounds = args.rounds or (1 if args.prompts else 5)
    args.max_len = 2 * args.lengths[1] if args.prompts else args.new * 3 // 2
    if args.prompts:
        return measure_mixed_load(args)
    facts = describe_run(args)
    routing = "trained" if args.run else "balanced"

    # warm up one engine after the other, then serve in turns
    models, eot = load_serving_models(args)
    services = make_services(models, eot, args)
    warmup = {}
    for (width, name), service in services.items():
        warmup[width, name] = sum(time_stages([service.warm_up], torch.device(args.device)))
        print(f"{name}, width {width}: warm after {warmup[width, name]:.0f} s", file=sys.stderr, flush=True)
    windows = {case: lambda service=service: service.serve_window(args.seconds) for case, service in services.items()}
    interleave(windows, args.rounds)

    # ratios are to the vanilla engine of the same width
    rows = []
    vanilla = {}  # width -> row
    for (width, name), service in services.items():
        row = summarize_serving(name, service, vanilla.get(width))
        row |= dict(at=width, warmup=warmup[width, name])
        vanilla.setdefault(width, row)
        rows.append(row)

    # two tables, and all of it as one result
    print(f"{args.dtype}, {routing} routing, empty prompts, output lengths ~ N({args.new}, {args.new // 8}); all time")
    print(f"counted in {args.rounds} windows of {args.seconds:g} s, interleaved; ratios are to vanilla")
    print_table(
        rows,
        "variant=name|layers=layers|turn=turn_width:d|block=width:d|slots=slots:d|KV MiB=kv_bytes:.1f/1048576|"
        "tok/s=tokens_per_second:,.0f|spread=spread:.0%|ratio=ratio:.3f|by FLOPs=bound:.3f|of it=of_bound:.1%|"
        "by bytes=bound_bytes:.3f|depth=depth:.2f|overflow=overflow:d|warm-up s=warmup:.0f",
    )
    print("\nuseful rows in a stage's batch; milliseconds of a stage; share of the time between stages")
    print_table(
        rows,
        "variant=name|turn full=turn_use:.1%|block full=block_use:.1%|turn ms=turn_seconds:.2f/1e-3|"
        "block ms=block_seconds:.2f/1e-3|host=host:.1%",
    )
    return dict(
        about=facts,
        routing=routing,
        rows=rows,
        warnings=find_disturbances(facts, {f"{row['name']} at {row['at']}": row["spread"] for row in rows}),
    )


# ----------------------------------------------------------------------------------------------------------------------
# serve --prompts

Load = list[tuple[list[int], int]]  # requests: a prompt, and how many tokens are to follow it


def make_load(c: MoRConfig, args: Namespace) -> Load:
    """Returns random prompts and output lengths, both evenly distributed over args.lengths."""
    rng = random.Random(0)
    load = []
    for _ in range(args.prompts):
        prompt = [rng.randrange(c.vocab_size) for _ in range(rng.randint(*args.lengths))]
        load.append((prompt, rng.randint(*args.lengths)))
    return load


def serve_load(engine: Engine, load: Load) -> dict[str, Any]:
    """Asks for everything at once -> the seconds it took, when each token of each request came, and the share of the
    time that prompts took. Tokens are drawn, for the reason that Service has."""
    take_history(engine)
    times = [[] for _ in load]
    start = time.perf_counter()
    for i, (prompt, new) in enumerate(load):

        def note_time(request, token, i=i):
            times[i].append(time.perf_counter() - start)

        engine.submit(prompt, new, temperature=1.0, seed=i, on_token=note_time)
    engine.run()
    seconds = time.perf_counter() - start
    prefill = sum(stage["seconds"] for stage in take_history(engine) if stage["stage"] == "prefill")
    return dict(seconds=seconds, times=times, prefill=prefill / seconds)


def serve_load_by_transformers(manager: Any, load: Load) -> dict[str, Any]:
    """Returns what serve_load does, but for the prompts' share."""
    start = time.perf_counter()
    for prompt, new in load:
        manager.add_request(prompt, max_new_tokens=new, record_timestamps=True)
    times = []
    while len(times) < len(load):
        answer = manager.get_result(timeout=1)
        if answer is not None and answer.is_finished():
            times.append([t - start for t in answer.timestamps])
        elif not manager.is_running():
            fail("transformers' continuous batching has stopped: --no-llama goes without it")
    return dict(seconds=time.perf_counter() - start, times=times)


def start_transformers(model: nn.Module, width: int, args: Namespace, stack: ExitStack) -> tuple[Any, int]:
    """Returns transformers' continuous batching, and the bytes of its K/V. It is what generate_batch runs, which itself
    knows only one output length for all. Residents, and tokens of prompts per step, are those of vanilla's engine."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    c = model.config
    page = 32  # tokens
    pages = width * math.ceil(args.max_len / page)
    config = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=pages,
        max_batch_tokens=width + 512,
        max_requests_per_batch=width,
        allow_block_sharing=False,
    )
    drawn = GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    manager = stack.enter_context(model.continuous_batching_context_manager(drawn, continuous_batching_config=config))
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize
    return manager, pages * page * per_token


def make_load_cases(models: dict[str, MoR], eot: int, args: Namespace, stack: ExitStack) -> tuple[dict, dict]:
    """Returns, by width and name, a call that serves a load, and what is to be known of it. Everything is compiled."""
    cases, known = {}, {}
    for case, service in make_services(models, eot, args).items():
        engine = service.engine
        seconds = sum(time_stages([lambda engine=engine: engine.warm_up(args.lengths[1], (False,))], engine.device))
        print(f"{case[1]}, width {case[0]}: warm after {seconds:.0f} s", file=sys.stderr, flush=True)
        known[case] = dict(
            layers=describe_layers(service.model.config),
            slots=service.slots,
            turn_width=service.turn_width,
            width=service.width if service.model.config.router != "none" else None,
            kv_bytes=measure_kv_bytes(engine),
            warmup=seconds,
        )
        cases[case] = partial(serve_load, engine)
    if args.llama:
        llama = make_llama(models["vanilla"].config).to(args.device, DTYPES[args.dtype]).eval()
        for width in args.widths:
            manager, kv_bytes = start_transformers(llama, width, args, stack)
            known[width, "transformers"] = dict(slots=width, turn_width=width, kv_bytes=kv_bytes)
            cases[width, "transformers"] = partial(serve_load_by_transformers, manager)
    return cases, known


def summarize_load(rounds: list[dict], base: list[dict]) -> dict[str, Any]:
    """Returns the speed of a case, and how long its users waited for a first and for each further token."""
    seconds = pick(rounds, "seconds")
    requests = [times for r in rounds for times in r["times"]]
    first = torch.tensor([times[0] for times in requests])
    gaps = torch.tensor([after - before for times in requests for before, after in pairwise(times)])
    return dict(
        tokens_per_second=sum(map(len, rounds[0]["times"])) / median(seconds),
        spread=measure_spread(seconds),
        ratio=compare_rounds(pick(base, "seconds"), seconds),
        first=first.quantile(torch.tensor([0.5, 0.99])).tolist(),
        between=gaps.quantile(torch.tensor([0.5, 0.99])).tolist(),
        prefill=mean(pick(rounds, "prefill")) if "prefill" in rounds[0] else None,
    )


def measure_mixed_load(args: Namespace) -> dict[str, Any]:
    """Serves the same requests, all asked at once, by every engine and by transformers, in turns."""
    facts = describe_run(args)
    args.variants = args.variants or ["vanilla", "expert-3", "share-3"]
    models, eot = load_serving_models(args)
    load = make_load(models["vanilla"].config, args)
    with ExitStack() as stack:
        cases, known = make_load_cases(models, eot, args, stack)
        for case in cases.values():  # the first requests find everything cold
            case(load[: 2 * max(args.widths)])
        results = interleave({case: lambda run=run: run(load) for case, run in cases.items()}, args.rounds)

    rows = []
    for (width, name), rounds in results.items():
        row = dict(name=name, at=width) | known[width, name]
        row |= summarize_load(rounds, results[width, "vanilla"])
        row["first_median"], row["first_99"] = row.pop("first")
        row["between_median"], row["between_99"] = row.pop("between")
        rows.append(row)
    low, high = args.lengths
    print(f"{args.dtype}, {args.prompts} requests at once, prompts and outputs of {low} to {high} tokens; all time")
    print(f"counted; {args.rounds} rounds, interleaved; ratios to vanilla; s to the first token, ms between tokens")
    print_table(
        rows,
        "variant=name|layers=layers|turn=turn_width:d|block=width:d|residents=slots:d|KV MiB=kv_bytes:.1f/1048576|"
        "tok/s=tokens_per_second:,.0f|spread=spread:.0%|ratio=ratio:.2f|first s=first_median:.2f|99%=first_99:.2f|"
        "between ms=between_median:.1f/1e-3|99%=between_99:.1f/1e-3|prompts' time=prefill:.0%|warm-up s=warmup:.0f",
    )
    return dict(
        about=facts,
        routing="trained" if args.run else "balanced",
        lengths=args.lengths,
        rows=rows,
        warnings=find_disturbances(facts, {f"{row['name']} at {row['at']}": row["spread"] for row in rows}),
    )


# ----------------------------------------------------------------------------------------------------------------------
# launches


def list_stages(config: MoRConfig, args: Namespace) -> dict[str, tuple]:
    """Returns the stages that serving compiles, by name: a function, then its arguments, fake tensors on "cuda"."""
    torch.set_default_dtype(DTYPES[args.dtype])  # a model of fake tensors cannot be cast
    model = MoR(config).eval()
    torch.set_default_dtype(torch.float32)
    W = args.width
    routed = config.router != "none"
    engine = Engine(model, 2 * W - 1 if routed else W, W, config.block_size, slack=1.0)
    row = torch.zeros(W, dtype=torch.long)
    stages = {
        "turn": (lambda row, given: engine.turn(row, given, False), row, row),
        "turn, top-k": (lambda row, given: engine.turn(row, given, True), row, row),
    }
    if routed:
        stages["block"] = (engine.block, row, row)
    cache = model.make_cache(1, config.block_size)
    prompt = torch.zeros(1, config.block_size * 2 // 3, dtype=torch.long)
    stages["prefill"] = (
        lambda idx, lengths: model.prefill(idx, lengths, cache),
        prompt,
        torch.zeros(1, dtype=torch.long),
    )
    return {name: stage for name, stage in stages.items() if name in args.stages}


def count_stage_launches(config: MoRConfig, args: Namespace) -> dict[str, dict[str, int]]:
    """Returns the launches of each stage by kind of kernel. Mocks torch.cuda: for a process of its own."""
    sys.path.append(str(Path(__file__).parent / "tests"))
    from fake_cuda import count_launches, pretend

    with pretend():
        return {name: dict(count_launches(*stage)) for name, stage in list_stages(config, args).items()}


def report_launches(args: Namespace) -> dict[str, Any]:
    """Prints how many kernels each stage launches on an H100, which need not be there. At small widths a stage takes as
    long as its launches, so this is what a GPU's time will follow."""
    if find_spec("triton") is None:
        fail("the kernels of a GPU are written in Triton: pip install triton")
    rows = []
    for variant in args.variants or ["vanilla", "expert-3"]:
        config = make_config(variant, args.preset, args.new * 3 // 2, **choose_size(args))
        counts = run_in_fresh_process(count_stage_launches, config, args, env={})
        total = {stage: sum(kinds.values()) for stage, kinds in counts.items()}
        for stage, kinds in counts.items():
            rows.append(dict(name=variant, layers=describe_layers(config), stage=stage, launches=total[stage], **kinds))
        # of `width` tokens: a turn, and as many blocks as balanced routing needs
        if "turn" in total and (config.router == "none" or "block" in total):
            step = total["turn"] + total.get("block", 0) * sum(config.capacities[1:])
            rows.append(dict(name=variant, stage="a token for each row", launches=round(step)))
    print(
        f"kernel launches as {args.dtype} code for sm_90 has them: width {args.width}, {args.new * 3 // 2} tokens a row"
    )
    print_table(
        rows, "variant=name|layers=layers|stage=stage|launches=launches:d|Triton=triton:d|matmul=matmul:d|other=other:d"
    )
    return dict(about=describe_run(args), rows=rows, warnings=[])


# ----------------------------------------------------------------------------------------------------------------------
# gpu

GPU_SIZE = "--preset 360M --layers 0 --vocab 0 --rounds 3"
GPU_PARTS = {  # commands of this file, in the order of their worth
    "serve, width 32": "serve vanilla expert-3 --widths 32 --no-equal-memory",
    "decode": "decode vanilla expert-3 --batch 1 8 --prompt 256 --no-llama --no-uncached",
    "train": "train vanilla expert-3 --batch 8 --seq 2048",
    "serve, width 128": "serve vanilla expert-3 --widths 128 --no-equal-memory",
    "serve, width 256": "serve vanilla expert-3 --widths 256 --no-equal-memory",
}

# What an H100 SXM should take, until one has been measured: assumptions, in bytes/s, seconds and FLOP/s.
BANDWIDTH = 2.8e12  # of the 3.35e12 that its makers name
SMALL_KERNEL = 2.5e-6  # from launch to launch within a CUDA graph
SKINNY_MATMUL = 5e-6  # of few rows, whose weights are less than 14 MB
TRAINING_SPEED = 0.4 * 990e12  # the share of the peak that good trainers of this size reach
SMALL_KERNELS_OF_A_LAYER = 7  # two norms, RoPE, cast of q, two that write K and V, SwiGLU: see `launches`
SMALL_KERNELS_OF_ROUTING = 12  # of a turn or a block of a model with a router, its routers' products included


def estimate_stage(c: MoRConfig, layers: int, rows: int, keys: float, head: bool = True) -> float:
    """Returns the seconds of one token for each of some rows through some layers, and through head and sampling.

    A kernel takes its launch or the reading of its bytes, whichever is longer. keys: slots that a row reads, on
    average. To sample hashes the whole vocabulary, which is 45 us for up to 128 rows."""
    D, kv = c.d_model, c.n_kv_head * c.head_dim

    def read(numbers: float, least: float) -> float:
        return max(least, 2 * numbers / BANDWIDTH)

    matrices = ((D + 2 * kv) * D, D * D, 2 * c.d_ff * D, c.d_ff * D)
    matmuls = sum(read(n, SKINNY_MATMUL) for n in matrices)
    attention = read(2 * rows * keys * kv, 6e-6)
    seconds = layers * (matmuls + attention + SMALL_KERNELS_OF_A_LAYER * SMALL_KERNEL)
    if head:
        seconds += read(D * c.vocab_size, SKINNY_MATMUL) + 3 * read(4 * rows * c.vocab_size, SMALL_KERNEL)
        seconds += 45e-6 * max(1, rows / 128) + 10 * SMALL_KERNEL
    if c.router != "none":
        seconds += SMALL_KERNELS_OF_ROUTING * SMALL_KERNEL
    return seconds


def compare_with_estimates(row: dict, args: Namespace) -> dict[str, tuple[float, float]]:
    """Returns measured and estimated seconds of what a row of another command's table has, by name."""
    T = getattr(args, "seq", None) or args.new * 3 // 2
    c = make_config(row["name"], args.preset, T, **choose_size(args))
    if args.command == "train":
        return {"step": (row["step"], row["flops"] / TRAINING_SPEED)}
    if args.command == "decode":
        step = row["batch"] / row["decode_tokens_per_second"]
        return {"step": (step, estimate_stage(c, c.n_layer, row["batch"], args.prompt + args.new / 2))}

    # a request is on average half done; at recursion r it has capacity_r of its tokens
    keys = args.new / 2
    first = c.n_unshared + c.n_block  # layers of a turn: all but later recursions
    found = {"turn": (row["turn_seconds"], estimate_stage(c, first, row["turn_width"], keys))}
    if "block_seconds" in row:
        later = c.capacities[1:]
        keys *= sum(f * f for f in later) / sum(later)
        found["block"] = row["block_seconds"], estimate_stage(c, c.n_block, row["width"], keys, head=False)
    return found


def check_logits(device: torch.device) -> list[dict]:
    """Returns how far logits are from what they should be, by case: cached from uncached, and the golden vectors."""
    sys.path.append(str(Path(__file__).parent / "tests"))
    from conftest import load_golden, make_model
    from test_model import GOLDEN, golden_config, golden_weights

    rows = []
    size = dict(vocab_size=256, n_layer=8, n_head=4, n_kv_head=2, d_model=64, d_ff=96)
    for variant in ("vanilla", "recursive-3", "expert-3", "share-3", "token-3"):
        model = make_model(make_config(variant, "nano", 64, **size)).to(device).eval()
        idx = torch.randint(256, (3, 60), device=device)
        lengths = torch.tensor([40, 17, 1], device=device)
        row = torch.arange(3, device=device)
        with torch.no_grad():
            expected = model(idx, routing="causal").logits
            cache = model.make_cache(3, 64, slack=model.config.n_recursion)
            decode = Graphs(False, False, device)
            logits = model.prefill(idx[:, :40], lengths, cache)
            worst = (logits - expected[row, lengths - 1]).abs().max()
            for t in range(20):  # on CUDA recorded at the second, and then played back
                token = idx[row, lengths + t]
                logits = decode.run(
                    ("decode",), lambda token, model=model, cache=cache: model.decode(token, cache), token
                )
                worst = torch.maximum(worst, (logits - expected[row, lengths + t]).abs().max())
        rows.append(dict(name=f"{variant}, cached against uncached", difference=worst.item()))

    for case in GOLDEN:
        golden, about = load_golden(case)
        model = MoR(golden_config(case))
        model.load_reference_state_dict(golden_weights(golden, about["aliases"]))
        model = model.to(device).eval()
        with torch.no_grad():
            logits = model(golden["input_ids"].to(device), routing="topk").logits.cpu()
        rows.append(
            dict(name=f"{case}, the authors' code", difference=(logits - golden["eval.logits"]).abs().max().item())
        )
    for row in rows:
        row["verdict"] = "right" if row["difference"] < 1e-4 else "WRONG"
    return rows


def report_gpu(args: Namespace) -> dict[str, Any]:
    """Checks the logits on a GPU, then runs the commands of GPU_PARTS while there is time: what its owner can send in.

    A part that fails is reported, and the others run."""
    facts = describe_run(args)
    device = torch.device(args.device)
    end = time.perf_counter() + 60 * args.minutes
    checks = check_logits(device)
    rows = []
    parts = {}
    for name, command in GPU_PARTS.items():
        if time.perf_counter() > end:
            parts[name] = dict(error=f"not begun within --minutes {args.minutes}")
            continue
        flags = shlex.split(f"{command} {GPU_SIZE} --device {args.device}")
        if args.quick:
            flags += ["--quick", "--compile=none" if "train" in flags else "--no-compile"]
        part = read_flags(flags)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            parts[name] = COMMANDS[part.command](part)
        except Exception as e:  # whatever it is, the owner of the GPU should send it in
            parts[name] = dict(error=f"{type(e).__name__}: {e}")
            continue
        if device.type == "cuda":
            parts[name]["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            torch.cuda.empty_cache()

        # beside what was expected
        for row in parts[name]["rows"]:
            for what, (measured, estimated) in compare_with_estimates(row, part).items():
                place = f"batch {row['batch']}" if "batch" in row else f"width {row['at']}"
                speed = 1 / row["ratio"] if part.command == "train" else row.get("speedup", row.get("ratio"))
                line = dict(name=f"{part.command} {row['name']}, {place}: {what}", speed=speed)
                rows.append(line | dict(measured=measured, estimated=estimated, off=measured / estimated))

    # three tables, and all of it as one result
    print("\nlargest difference of a logit, fp32; right below 1e-4")
    print_table(checks, "case=name|difference=difference:.1e|verdict=verdict")
    print(f"\nmilliseconds on {facts['machine']}, beside an estimate for an H100 SXM; speed against vanilla")
    print_table(
        rows, "what=name|measured=measured:.2f/1e-3|estimated=estimated:.2f/1e-3|off=off:.2f|against vanilla=speed:.3f"
    )
    memory = [dict(name=name, peak=part.get("peak_bytes"), error=part.get("error", "")) for name, part in parts.items()]
    print("\npeak memory of each part; recompilations raise, and so would be an error here")
    print_table(memory, "part=name|peak MiB=peak:,.0f/1048576|error=error")
    warnings = [f"{part['error']} ({name})" for name, part in parts.items() if "error" in part]
    warnings += [f"{row['name']}: off by {row['difference']:.1e}" for row in checks if row["verdict"] == "WRONG"]
    return dict(about=facts, checks=checks, rows=rows, parts=parts, warnings=warnings)


# ----------------------------------------------------------------------------------------------------------------------
# plot

COLORS = ("#8fb8de", "#3b75af", "#c9c9c9")


def plot(args: Namespace) -> None:
    """Writes a PNG with a panel for each JSON file of the other commands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if Path(args.out).suffix != ".png" or not Path(args.out).absolute().parent.is_dir():
        fail(f"-o {args.out} must be a .png file in a directory that exists")

    # a grid of panels, empty where there are fewer files than places
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9}
    columns = min(2, len(args.files))
    lines = math.ceil(len(args.files) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 3.8 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(args.files) :]:
        axis.axis("off")

    # one panel per file, with machine and commit below it
    for file, axis in zip(args.files, axes.flat, strict=False):
        try:
            result = json.loads(Path(file).read_text().splitlines()[-1])
            draw_panel = PANELS[result["bench"]]
        except OSError as e:
            fail(f"cannot read {file}: {e.strerror}")
        except (ValueError, IndexError, KeyError, TypeError):
            fail(f"{file} does not end with a line of JSON from bench.py: write one with --json")
        draw_panel(axis, result)
        facts = result["about"]
        note = f"{facts['machine']}, {facts['dtype']}, {facts['commit']}"
        axis.set_xlabel("\n".join(filter(None, (axis.get_xlabel(), note))), fontsize=8)
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


def plot_train(axis, result: dict) -> None:
    """Draws seconds per step: against capacity, or stacked by stage."""
    rows = result["rows"]
    names = pick(rows, "name")
    by_flops = [row["by_flops"] * rows[0]["step"] for row in rows]
    axis.set(ylabel="seconds per step", title=f"training step, {rows[0]['batch']} x {rows[0]['seq']} tokens")
    if result["sweep"] == "capacity":
        capacity = [float(name.split()[1]) for name in names]
        axis.plot(capacity, pick(rows, "step"), "o-", color=COLORS[1], label="measured")
        axis.plot(capacity, by_flops, "k:", label="in proportion to FLOPs")
        axis.set(xlabel="capacity of every recursion", xlim=(0, 1.05), ylim=(0, None))
    else:
        bottom = [0.0] * len(rows)
        for stage, color in zip(("forward", "backward", "optimizer"), COLORS, strict=True):
            height = pick(rows, stage)
            axis.bar(names, height, bottom=bottom, color=color, label=stage, width=0.65)
            bottom = [low + high for low, high in zip(bottom, height, strict=True)]
        for i, row in enumerate(rows):
            label = "by FLOPs" if i == 0 else None
            axis.hlines(by_flops[i], i - 0.4, i + 0.4, "k", ":", label=label)
            axis.text(i, row["forward"] / 2, f"{row['ratio']:.2f}", ha="center", va="center")
        axis.set_ylim(0, 1.2 * max(bottom))
        axis.tick_params(axis="x", rotation=20)
    axis.legend(ncols=2, fontsize=8)


def plot_decode(axis, result: dict) -> None:
    """Draws tokens/s of every decoder, a bar for each batch size."""
    batches = list(dict.fromkeys(pick(result["rows"], "batch")))
    names = list(dict.fromkeys(pick(result["rows"], "name")))
    for i, B in enumerate(batches):
        rows = [row for row in result["rows"] if row["batch"] == B]
        offset = (i + 0.5) / len(batches) * 0.8 - 0.4
        y = [names.index(name) + offset for name in pick(rows, "name")]
        speeds = pick(rows, "tokens_per_second")
        bars = axis.barh(y, speeds, 0.72 / len(batches), color=COLORS[i % 3], label=f"batch {B}")
        axis.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="tokens per second, prefill included", xscale="log", title="greedy decoding")
    axis.margins(x=0.12)
    axis.legend()


def plot_serve(axis, result: dict) -> None:
    """Draws tokens/s against width where several were measured, else who was in the batches of the last engine."""
    widths = sorted(set(pick(result["rows"], "at")))
    if len(widths) == 1:
        plot_timeline(axis, result["rows"])
        return
    for i, name in enumerate(dict.fromkeys(pick(result["rows"], "name"))):
        rows = [row for row in result["rows"] if row["name"] == name]
        marker = "os^Dv"[i % 5]
        axis.plot(pick(rows, "at"), pick(rows, "tokens_per_second"), marker + "-", label=name)
    axis.set(xlabel="width", ylabel="tokens per second", ylim=(0, None), xticks=widths, title="serving")
    axis.legend()


def plot_timeline(axis, rows: list[dict]) -> None:
    """Draws a bar for each of the last stages of an engine: how many rows it had in which recursion."""
    row = next((row for row in reversed(rows) if "timeline" in row), None)
    if row is None:
        fail("a picture of serving needs several --widths, or a variant with a router")

    # where each bar stands, how wide it is, and what it is made of
    n = len(row["fractions"])
    start = 0.0
    starts = []
    durations = []
    stacks = []  # rows of a turn, then of recursions 0, 1, ...
    for seconds, stage, used, recursions in row["timeline"]:
        starts.append(1e3 * start)
        durations.append(1e3 * seconds)
        stacks.append([used] + [0] * n if stage == "turn" else [0, *recursions])
        start += seconds

    # one layer of the bars after the other
    bottom = [0] * len(stacks)
    for i, height in enumerate(zip(*stacks, strict=True)):
        label = f"recursion {i}" if i else "turn (recursion 1)"
        color = f"C{i - 1}" if i else "0.8"
        if any(height):
            axis.bar(starts, height, durations, bottom, align="edge", color=color, label=label)
        bottom = [low + high for low, high in zip(bottom, height, strict=True)]

    # how many rows a stage could have had
    axis.axhline(row["width"], color="k", ls=":", lw=1)
    axis.set(xlabel="milliseconds", ylabel="rows in the batch", title=f"{row['name']}: each bar is a stage's batch")
    axis.set_ylim(0, 1.25 * max(row["width"], row["turn_width"]))
    axis.legend(ncols=3, fontsize=8, loc="upper center")


def plot_cost(axis, result: dict) -> None:
    """Draws parameters, FLOPs and K/V against vanilla's, with a cross at the FLOPs that the paper reports."""
    preset = result["rows"][0]["preset"]
    rows = [row for row in result["rows"] if row["preset"] == preset]
    for i, key in enumerate(("params", "flops_paper", "kv_bytes")):
        x = [j + 0.27 * (i - 1) for j in range(len(rows))]
        height = [row[key] / rows[0][key] for row in rows]
        axis.bar(x, height, width=0.25, label=key.split("_")[0], color=COLORS[i])
    for j, row in enumerate(rows):
        if row["paper_ratio"]:
            axis.plot(j, row["paper_ratio"], "kx", ms=4)
    axis.set_xticks(range(len(rows)), pick(rows, "variant"), rotation=20)
    axis.set(ylabel="against vanilla", ylim=(0, 1.3), title=f"{preset}, T = {result['seq']}")
    axis.legend(ncols=4, fontsize=8)


PANELS = {"cost": plot_cost, "train": plot_train, "decode": plot_decode, "serve": plot_serve}


# ----------------------------------------------------------------------------------------------------------------------
# command line

COMMANDS = {
    "cost": report_cost,
    "train": measure_training,
    "decode": measure_decoding,
    "serve": measure_serving,
    "launches": report_launches,
    "gpu": report_gpu,
}
TINY = {  # what --quick changes of a command's flags
    "cost": {},
    "train": dict(batch=2, seq=64, rounds=2),
    "decode": dict(batch=[2], prompt=12, new=8, rounds=2),
    "serve": dict(new=16, rounds=2, seconds=1.0, lengths=[2, 8]),
    "launches": dict(width=4, new=16),
    "gpu": {},
}


def add_switch(parser: ArgumentParser, name: str, meaning: str) -> None:
    """Adds --name and --no-name, on by default."""
    parser.add_argument(f"--{name}", action=BooleanOptionalAction, default=True, help=f"{meaning} (default: yes)")


def build_parser() -> Parser:
    """Returns the parser of all commands."""
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # flags of several commands
    common = Parser(add_help=False)
    common.add_argument("--json", metavar="FILE", help="write the last line to FILE as well")
    common.add_argument("--quick", action="store_true", help="tiny sizes: under a minute, figures without meaning")
    common.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    common.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    model = Parser(add_help=False)
    model.add_argument("variants", nargs="*", metavar="VARIANT", help=f"vanilla, {', '.join(list(KINDS)[1:])} with -N")
    model.add_argument("--preset", default="135M", choices=list(PRESETS))
    model.add_argument("--layers", type=int, default=11, help="unrolled depth (default 11; 0: the preset's)")
    model.add_argument("--vocab", type=int, default=8192, help="default 8192; 0: the preset's")
    model.add_argument("--rounds", type=int, default=5)

    # one parser a command
    cost = commands.add_parser("cost", parents=[common], help="parameters, FLOPs, memory, communication: computed")
    cost.add_argument("presets", nargs="*", metavar="PRESET", help=", ".join(PRESETS))
    cost.add_argument("--seq", type=int, default=2048, help="context T (default 2048)")
    cost.add_argument("--devices", type=int, default=8)
    cost.add_argument("--batch", type=int, default=8, help="sequences per device (default 8)")

    train = commands.add_parser("train", parents=[common, model], help="compiled training step, variants interleaved")
    train.add_argument("--batch", type=int, default=8)
    train.add_argument("--seq", type=int, default=512)
    train.add_argument("--compile", choices=["whole", "none"], default="whole", help="the whole step as one graph")
    train.add_argument("--sweep", choices=["capacity", "T", "N"], help="scaling instead of variants")
    train.add_argument("--fresh", action="store_true", help="also compile time and peak memory, in fresh processes")
    train.add_argument("--checkpoint-recursions", action="store_true", help="recompute recursions in the backward pass")
    train.add_argument("--profile", action="store_true", help="also one step by kind of kernel")

    decode = commands.add_parser("decode", parents=[common, model], help="prefill and cached decoding")
    decode.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    decode.add_argument("--prompt", type=int, default=64, help="tokens (default 64)")
    decode.add_argument("--new", type=int, default=64, help="tokens to generate (default 64)")
    decode.add_argument(
        "--ablate", action="store_true", help="also the first without what makes it fast, piece by piece"
    )
    decode.add_argument("--int8", action="store_true", help="also every variant with int8 weights")
    decode.add_argument("--llama-cpp", metavar="FILE.gguf", help="also llama.cpp at batch 1, in bf16 and Q8_0")
    add_switch(decode, "compile", "compile, ours and theirs")
    add_switch(decode, "llama", "compare with transformers")
    add_switch(decode, "uncached", "also a full forward per token")

    serve = commands.add_parser("serve", parents=[common, model], help="the engine under load, against vanilla's")
    serve.add_argument("--run", metavar="RUN", help="serve a checkpoint of train.py, and a vanilla model of its size")
    serve.add_argument("--widths", type=int, nargs="+", default=[32], metavar="W", help="rows per batch (default 32)")
    serve.add_argument("--new", type=int, default=256, help="tokens per request, on average (default 256)")
    serve.add_argument("--slack", type=float, default=1.0, help="cache slots relative to capacity (default 1)")
    serve.add_argument("--seconds", type=float, default=4.0, help="length of a window (default 4)")
    serve.add_argument("--prompts", type=int, metavar="N", help="N requests with prompts instead of windows of a load")
    serve.add_argument(
        "--lengths",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="tokens of their prompts, and of what follows (default: 100 1000 on a GPU, 10 100 on a CPU)",
    )
    serve.set_defaults(rounds=None)  # 5, or 1 with --prompts
    add_switch(serve, "llama", "with --prompts, compare with transformers")
    add_switch(serve, "compile", "compile the stages")
    add_switch(serve, "equal-memory", "also as many slots as fit in the K/V memory of vanilla's")

    launches = commands.add_parser(
        "launches", parents=[common, model], help="kernels per stage of an H100, without one"
    )
    launches.add_argument("--width", type=int, default=32, help="rows per batch (default 32)")
    launches.add_argument("--new", type=int, default=256, help="as for serve (default 256)")
    stages = ["turn", "turn, top-k", "block", "prefill"]
    launches.add_argument(
        "--stages", nargs="+", choices=stages, default=stages, metavar="STAGE", help=", ".join(stages)
    )

    gpu = commands.add_parser("gpu", parents=[common], help="checks and measures a GPU: one file to send in")
    gpu.add_argument("--minutes", type=float, default=10, help="no part begins later than this (default 10)")

    panels = commands.add_parser("plot", help="JSON of the others -> PNG, a panel per file")
    panels.add_argument("files", nargs="+", metavar="FILE.json")
    panels.add_argument("-o", "--out", required=True, metavar="FILE.png")
    return parser


def read_flags(argv: list[str]) -> Namespace:
    """Returns the flags of one command; ends the program if they cannot be met."""
    args = build_parser().parse_args(argv)
    if args.command == "plot":
        return args
    args.argv = argv
    for name in ("batch", "seq", "prompt", "new", "rounds", "devices", "widths", "width", "prompts", "lengths"):
        value = getattr(args, name, None)
        if value is None:
            continue
        smallest = min(value) if isinstance(value, list) else value
        if smallest < 1:
            fail(f"--{name} {value} must be at least 1")
    if args.command == "gpu" and args.device == "auto":  # the CPU is for those who ask to see that it runs
        args.device = "cuda"
    args.device = open_device(args.device)
    if args.quick:
        vars(args).update(TINY[args.command])
        args.variants = getattr(args, "variants", None) or ["vanilla", "expert-2"]
        if args.command == "serve":
            args.widths = [min(width, 4) for width in args.widths]
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs one command; its last line of output is the result as JSON."""
    args = read_flags(argv or sys.argv[1:])
    if args.command == "plot":
        return plot(args)
    torch.manual_seed(0)

    # the command prints its tables; the JSON comes last
    result = dict(bench=args.command) | COMMANDS[args.command](args)
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    line = json.dumps(result)
    if args.json:
        try:
            Path(args.json).write_text(line + "\n")
        except OSError as e:
            fail(f"cannot write --json {args.json}: {e.strerror}")
    print(line)


if __name__ == "__main__":
    main()
