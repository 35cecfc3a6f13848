"""
What a Mixture-of-Recursions costs and how fast it is, beside its baselines, measured in one run.

    python bench.py cost 135M 360M                    # parameters, FLOPs, KV beside the paper's: computed, not run
    python bench.py cost 360M --devices 8 --batch 16  # what each of 8 devices holds and sends: does it fit
    python bench.py train                             # training step of five variants, interleaved
    python bench.py train vanilla expert-3 --fresh    # first compile, warm start, peak memory
    python bench.py train vanilla expert-3 --profile  # where the step goes
    python bench.py train --sweep capacity --seq 1024 --batch 4   # does time follow FLOPs? also --sweep T, --sweep N
    python bench.py decode --batch 1 8                # cached decoding, against transformers' Llama where installed
    python bench.py decode expert-3 --ablate --no-llama --no-uncached   # what fused attention, packing, exits are worth
    python bench.py serve                             # continuous depth-wise batching against vanilla's, untrained
    python bench.py serve --run out/NAME              # the same by what a checkpoint's routers decide
    python bench.py serve vanilla expert-3 --widths 8 16 32 64 --no-equal-memory       # tokens/s against width
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
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import model as model_file
from checkpoint import load_run
from cli import Parser, fail
from engine import Engine
from generate import Decoder, Graphs, generate
from model import PRESETS, Layer, MoR, MoRConfig, Pass
from train import DTYPES, matmul_peak

KINDS = {
    "vanilla": {},
    "recursive": {},
    "expert": dict(router="expert"),
    "share": dict(router="expert", kv="share"),
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
    """Configuration of `expert-3` and the like; n_layer in overrides is a wish that grows to what N divides."""
    kind, _, number = variant.partition("-")
    if kind not in KINDS or number.isdigit() == (kind == "vanilla"):
        fail(f"unknown variant {variant!r}: use vanilla, or {', '.join(KINDS)} with a number of recursions: expert-3")
    n = int(number or 1)
    if n > 1 and "n_layer" in overrides:
        overrides["n_layer"] = 2 + n * max(1, -(-(overrides["n_layer"] - 2) // n))
    try:
        return MoRConfig.preset(preset, block_size=T, n_recursion=n, **KINDS[kind], **overrides)
    except ValueError as e:
        fail(str(e))


def model_size(args: Namespace) -> dict[str, int]:
    """What the command line changes of the preset."""
    return QUICK if args.quick else {k: v for k, v in dict(n_layer=args.layers, vocab_size=args.vocab).items() if v}


def layers_name(c: MoRConfig) -> str:
    inner = f"{c.n_block}x{c.n_recursion}" if c.n_recursion > 1 else str(c.n_layer)
    return f"1+{inner}+1" if c.n_unshared else inner


def compile_model(model: MoR, how: str) -> None:
    """whole: one graph. layer: a graph per layer and shape. A recompilation is an error: it would be timed. Isolated,
    since Dynamo otherwise counts the graphs of a function, not of a model."""
    options = dict(fullgraph=True, dynamic=False, isolate_recompiles=True)
    if how == "whole":
        model.compile(recompile_limit=1, **options)
    for layer in model.modules() if how == "layer" else []:
        if isinstance(layer, Layer):
            layer.compile(recompile_limit=8, **options)


def training_step(model: MoR, B: int, T: int, dtype: torch.dtype) -> list[Callable[[], None]]:
    """Forward, backward and optimizer of a step on random tokens, as three calls. What a router has learned does not
    matter for their cost: how many tokens each recursion takes is fixed."""
    device = model.wte.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
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
# measuring


def stopwatch(stages: list[Callable], device: torch.device) -> list[float]:
    """Seconds of each stage, run one after the other."""
    cuda = device.type == "cuda"
    marks = []

    def mark():
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    if cuda:
        torch.cuda.synchronize()
    mark()
    for stage in stages:
        stage()
        mark()
    if cuda:
        torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in zip(marks, marks[1:], strict=False)]


def interleave(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list]:
    """Results of every case, taken in turns: A B C A B C."""
    results = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            results[name].append(case())
    return results


def warm_up(name: str, stages: list[Callable], device: torch.device) -> float:
    """Seconds of the first run, which compiles. The second, which still allocates, is not measured either."""
    print(f"{name}: ", end="", file=sys.stderr, flush=True)
    seconds = sum(stopwatch(stages, device))
    stopwatch(stages, device)
    print(f"warm after {seconds:.0f} s", file=sys.stderr, flush=True)
    return seconds


def spread(seconds: list[float]) -> float:
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def ratio(a: list[float], b: list[float]) -> float:
    """Median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def in_fresh_process(function: Callable, *args, env: dict[str, str]) -> Any:
    """function(*args) in a new interpreter that starts with these environment variables."""
    before = os.environ.copy()
    os.environ.update(env)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def first_step(config: MoRConfig, B: int, T: int, args: Namespace) -> dict[str, float | None]:
    """Seconds that the first training step takes longer than the second, and peak memory of the third."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = MoR(config).to(device).train()
    compile_model(model, args.compile)
    model.checkpoint_recursions = args.checkpoint_recursions
    stages = training_step(model, B, T, DTYPES[args.dtype])
    first, second = (sum(stopwatch(stages, device)) for _ in range(2))
    kept = 3 * sum(p.nbytes for p in model.parameters())  # weights and two AdamW moments
    return dict(start=first - second, peak_bytes=peak_memory(stages, kept, device))


def peak_memory(stages: list[Callable], kept: int, device: torch.device) -> int | None:
    """Bytes that a step needs at most, the `kept` ones included. CUDA: the allocator's count. Else growth of the
    resident set, whose peak Linux can reset: without interpreter, libraries and what compilation left. Right only
    where freed tensors leave the process at once (MALLOC_MMAP_THRESHOLD_). None without /proc."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        stopwatch(stages, device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def resident(field: str) -> int:
        return next(int(s.split()[1]) * 1024 for s in status.read_text().splitlines() if s.startswith(field))

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    stopwatch(stages, device)
    return kept + resident("VmHWM") - before


# ----------------------------------------------------------------------------------------------------------------------
# telling


def about(args: Namespace) -> dict[str, Any]:
    """What a figure needs beside it to mean something."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if commit and subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode:
        commit += "+changes"
    machine = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [s.split(":")[1].strip() for s in open("/proc/cpuinfo") if s.startswith("model name")]
        machine = names[0] if names else machine
    machine += f", {os.cpu_count()} cores"
    if args.device.startswith("cuda"):
        machine += f", {torch.cuda.get_device_name(args.device)}"
    return dict(
        commit=commit or None, machine=machine, torch=torch.__version__, device=args.device, dtype=args.dtype,
        threads=args.threads, command=" ".join(["python bench.py", *args.argv]), load=round(os.getloadavg()[0], 2),
    )  # fmt: skip


def disturbances(facts: dict, spreads: dict[str, float]) -> list[str]:
    """Signs that something else ran at the same time."""
    found = [f"rounds of {name} differ by {s:.0%} of their median" for name, s in spreads.items() if s > 0.15]
    if facts["load"] > 0.3 * os.cpu_count():
        found.append(f"load average {facts['load']} at the start: something else was running, or had just stopped")
    return found


def table(rows: list[dict], columns: str) -> None:
    """Rows as aligned text. columns: "heading=key|heading=key:format|heading=key:format/divisor|..." """
    grid = []
    for column in columns.split("|"):
        heading, _, rest = column.strip().partition("=")
        key, _, spec = rest.partition(":")
        spec, _, unit = spec.partition("/")
        cells = [row.get(key) for row in rows]
        cells = ["-" if c is None else format(c / float(unit) if unit else c, spec) for c in cells]
        width = max(map(len, (heading, *cells)))
        grid.append([cell.rjust(width) if spec else cell.ljust(width) for cell in (heading, *cells)])
    print("\n".join("  ".join(line) for line in zip(*grid, strict=True)))


# ----------------------------------------------------------------------------------------------------------------------
# cost


def activation_bytes(c: MoRConfig, B: int, T: int) -> int:
    """Estimate of what the compiled forward keeps for the backward pass under bf16 autocast. Per token and layer: the
    residual stream twice (fp32); normed inputs, queries, attention output, K, V and three tensors of the MLP (bf16)."""
    layer = 2 * 4 * c.d_model + 4 * 2 * c.d_model + 2 * 2 * c.n_kv_head * c.head_dim + 3 * 2 * c.d_ff
    slack = c.capacity_slack if c.router == "token" else 1.0
    return int(B * T * layer * (c.n_unshared + c.n_block * sum(min(1.0, slack * f) for f in c.capacities)))


def cost_row(preset: str, variant: str, T: int) -> dict[str, Any]:
    c = make_config(variant, preset, T)
    with torch.device("meta"):
        model = MoR(c)
    forward, kv = model.flops_per_token(T), model.kv_bytes(1, T, torch.bfloat16)
    routers = sum(p.numel() for name, p in model.named_parameters() if "router" in name)
    exact = model.flops_per_token(T, head=True) + 2 * routers
    return dict(
        name=f"{preset} {variant}", preset=preset, variant=variant, layers=layers_name(c), params=model.num_params(),
        params_with_embedding=model.num_params(embedding=True), flops=forward, flops_exact=exact,
        flops_training=3 * exact, attention=(model.flops_per_token(2 * T) - forward) / forward,  # proportional to T
        kv_per_token=kv / T, kv_bytes=kv,
        kv_shared_layers=sum(c.cache_slots(T, 1.0)) / (T * c.n_recursion),  # K/V of the shared layers against vanilla's
        kv_read=1.0 if c.kv == "share" else sum(c.capacities) / c.n_recursion,
        paper_params=PAPER_PARAMS.get(preset, {}).get(variant), paper_ratio=PAPER_FLOPS.get(preset, {}).get(variant),
    )  # fmt: skip


def plan_row(row: dict, args: Namespace, fsdp: bool) -> dict[str, Any]:
    """Bytes each device holds, and sends per step, as train.py runs: fp32 weights, gradients and AdamW moments; bf16
    activations and copies of the weights. FSDP shards all three, but holds weights and gradients whole while a step
    lasts: the shared block is used N times, and gathering it N times would send more than it saves."""
    P, n, shards = row["params_with_embedding"], args.devices, args.devices if fsdp else 1
    whole = 4 * P if fsdp else 0
    plan = dict(
        name=f"{row['name']} {'FSDP' if fsdp else 'DDP'}", preset=row["preset"], devices=n, batch=args.batch,
        weights=4 * P // shards + whole, gradients=4 * P // shards + whole, optimizer=8 * P // shards, casts=2 * P,
        activations=activation_bytes(make_config(row["variant"], row["preset"], args.seq), args.batch, args.seq),
    )  # fmt: skip
    plan["training"] = sum(plan[k] for k in ("weights", "gradients", "optimizer", "casts", "activations"))
    plan["sent"] = 2 * 4 * P * (n - 1) // n  # ring: all-reduce, or reduce-scatter and all-gather
    plan["kv_cache"] = args.batch * row["kv_bytes"]
    return plan | dict(serving=2 * P + plan["kv_cache"])


def cost(args: Namespace) -> dict[str, Any]:
    presets, rows = args.presets or (["nano"] if args.quick else ["360M"]), []
    for preset in presets:
        if preset not in PRESETS:
            fail(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
        variants = ["vanilla", "recursive-3", "expert-2", "expert-3", "expert-4", "share-3", "token-3"]
        group = [cost_row(preset, variant, args.seq) for variant in variants]
        for row in group:
            for key in ("flops", "flops_exact", "kv_bytes"):
                row[f"{key}_ratio"] = row[key] / group[0][key]
            row["paper_params_ratio"] = row["paper_params"] and row["paper_params"] / group[0]["params"]
        rows += group
    plans = [plan_row(row, args, fsdp) for row in rows for fsdp in (False, True)]
    print(f"forward FLOPs per token, T = {args.seq}: by the paper's convention (causal attention, no head), then exact")
    table(rows, "model=name|layers=layers|params M=params:.1f/1e6|paper=paper_params:.0f/1e6|MFLOPs=flops:.1f/1e6|"
          "ratio=flops_ratio:.3f|paper=paper_ratio:.3f|attention=attention:.1%|exact=flops_exact:.1f/1e6|"
          "ratio=flops_exact_ratio:.3f|KV B/token=kv_per_token:,.0f|KV MiB=kv_bytes:.1f/1048576|"
          "ratio=kv_bytes_ratio:.3f|shared layers=kv_shared_layers:.3f|read=kv_read:.3f")  # fmt: skip
    print(f"\nGiB per device: {args.devices} devices, {args.batch} sequences of {args.seq} tokens on each")
    gib = ":.2f/1073741824"
    table(plans, f"model=name|weights=weights{gib}|gradients=gradients{gib}|AdamW=optimizer{gib}|"
          f"bf16 copies=casts{gib}|activations=activations{gib}|training=training{gib}|sent per step=sent{gib}|"
          f"KV cache=kv_cache{gib}|serving=serving{gib}")  # fmt: skip
    return dict(about=about(args), seq=args.seq, rows=rows, plans=plans, warnings=[])


# ----------------------------------------------------------------------------------------------------------------------
# train


def train_cases(args: Namespace) -> dict[str, tuple[MoRConfig, int, int]]:
    """Name -> configuration, B, T. The first is what the others are compared with."""
    B, T = args.batch, args.seq

    def case(variant, T=T, **more):
        return make_config(variant, args.preset, T, **model_size(args), **more), B * args.seq // T, T

    if args.sweep == "capacity":
        levels = (1.0, 0.5) if args.quick else (1.0, 0.75, 0.5, 0.25)
        n = 2 if args.quick else 3
        return {f"capacity {c}": case(f"expert-{n}", capacity=(c,) * n) for c in levels}
    if args.sweep == "T":  # at equal tokens
        lengths = (T,) if args.quick else (T // 2, T, 2 * T, 4 * T)
        return {f"{v} T={t}": case(v, T=t) for t in lengths for v in ("vanilla", "expert-3") if 1 <= t <= B * T}
    if args.sweep == "N":
        return {v: case(v) for v in ("vanilla", "expert-2", "expert-3", "expert-4")[: 2 if args.quick else 4]}
    five = ["vanilla", "recursive-3", "expert-3", "token-3", "share-3"]
    return {v: case(v) for v in args.variants or (["vanilla", "expert-2"] if args.quick else five)}


def train(args: Namespace) -> dict[str, Any]:
    device, dtype, facts, cases = torch.device(args.device), DTYPES[args.dtype], about(args), train_cases(args)
    counters, peak, rows, steps = torch._dynamo.utils.counters, matmul_peak(device, dtype), [], {}
    for name, (config, B, T) in cases.items():
        model = MoR(config).to(device).train()
        compile_model(model, args.compile)
        model.checkpoint_recursions = args.checkpoint_recursions
        steps[name] = training_step(model, B, T, dtype)
        counters.clear()
        warmup = warm_up(name, steps[name], device)
        rows.append(dict(
            name=name, layers=layers_name(config), batch=B, seq=T, params=model.num_params(), warmup=warmup,
            flops=3 * model.flops_per_token(T, head=True) * B * T, graphs=counters["stats"]["unique_graphs"],
            breaks=sum(counters["graph_break"].values()),
        ))  # fmt: skip
    counters.clear()
    results = interleave({name: lambda s=s: stopwatch(s, device) for name, s in steps.items()}, args.rounds)
    peak = max(peak, matmul_peak(device, dtype))  # once more: disturbed at the start, it would flatter every row
    recompiles = counters["stats"]["unique_graphs"]
    totals = {name: [sum(stages) for stages in rounds] for name, rounds in results.items()}
    for row in rows:
        name, first = row["name"], rows[0]
        stages = zip(("forward", "backward", "optimizer"), zip(*results[name], strict=True), strict=True)
        row |= {stage: statistics.median(seconds) for stage, seconds in stages}
        row |= dict(step=statistics.median(totals[name]), spread=spread(totals[name]))
        row |= dict(tokens_per_second=args.batch * args.seq / row["step"], flops_per_second=row["flops"] / row["step"])
        row |= dict(of_peak=row["flops_per_second"] / peak, ratio=ratio(totals[name], totals[first["name"]]))
        passes = [[sum(stages[:2]) for stages in results[n]] for n in (name, first["name"])]
        row |= dict(ratio_passes=ratio(*passes), by_flops=row["flops"] / first["flops"])
        row["off"] = row["ratio"] / row["by_flops"]
        if args.profile:
            row["profile"] = profile(steps[name])
    steps.clear()
    for row in rows if args.fresh else []:
        row |= fresh_starts(*cases[row["name"]], args)
        row["peak_ratio"] = row["peak_bytes"] and row["peak_bytes"] / rows[0]["peak_bytes"]
    print(f"{args.batch * args.seq} tokens a step, {args.dtype}, {args.rounds} rounds, {recompiles} recompilations;"
          f" matmul peak {peak / 1e12:.2f} TFLOP/s; ratios are to {rows[0]['name']}")  # fmt: skip
    table(rows, "variant=name|layers=layers|params M=params:.1f/1e6|step s=step:.3f|spread=spread:.0%|"
          "forward=forward:.3f|backward=backward:.3f|optimizer=optimizer:.3f|tok/s=tokens_per_second:,.0f|"
          "TFLOP/s=flops_per_second:.3f/1e12|of peak=of_peak:.1%|ratio=ratio:.3f|fwd+bwd=ratio_passes:.3f|"
          "by FLOPs=by_flops:.3f|ratio/FLOPs=off:.2f|warm-up s=warmup:.1f|graphs=graphs:d|breaks=breaks:d")  # fmt: skip
    if args.fresh:
        mib = ":,.0f/1048576"
        print("\nin new processes: seconds with an empty, then with a filled compile cache on disk; MiB at the peak")
        table(rows, f"variant=name|first compile=first_compile:.1f|warm start=warm_start:.1f|peak=peak_bytes{mib}|"
              f"ratio=peak_ratio:.3f|planned=planned_bytes{mib}")  # fmt: skip
    if args.profile:
        print("\nseconds of one step by kind of kernel")
        kinds = "|".join(f"{kind}={kind}:.3f" for kind in KERNELS)
        table([dict(name=r["name"]) | r["profile"] for r in rows], f"variant=name|{kinds}")
    return dict(
        about=facts, preset=args.preset, compile=args.compile, sweep=args.sweep, rounds=args.rounds, peak_flops=peak,
        recompiles=recompiles, rows=rows, warnings=disturbances(facts, {r["name"]: r["spread"] for r in rows}),
    )  # fmt: skip


def fresh_starts(config: MoRConfig, B: int, T: int, args: Namespace) -> dict[str, Any]:
    """A start with an empty compile cache on disk, then one that finds it filled, which also measures memory."""
    with tempfile.TemporaryDirectory() as cache:
        env = {"TORCHINDUCTOR_CACHE_DIR": cache}
        cold = in_fresh_process(first_step, config, B, T, args, env=env)
        lean = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        warm = in_fresh_process(first_step, config, B, T, args, env=env | lean)
    with torch.device("meta"):
        P = MoR(config).num_params(embedding=True)
    planned = (4 + 4 + 8 + 2) * P + activation_bytes(config, B, T)  # plan_row's, on one device
    starts = dict(first_compile=cold["start"], warm_start=warm["start"])
    return starts | dict(peak_bytes=warm["peak_bytes"], planned_bytes=planned)


KERNELS = {  # kind -> what its kernels are called; the first that fits
    "attention backward": ("attention_backward", "attention_for_cpu_backward", "attend_on_cpu_backward"),
    "attention": ("attention", "attend_on_cpu"),
    "matmul": ("mm", "linear", "gemm", "addmv"),
    "optimizer": ("adam",),
    "fused": ("fused", "triton", "compiled"),  # on the CPU, fused kernels count as time of the region they are in
    "other": ("",),
}


def profile(stages: list[Callable]) -> dict[str, float]:
    """Seconds of one step by kind of kernel, each counted without what it calls."""
    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as prof:
        for stage in stages:
            stage()
    seconds = dict.fromkeys(KERNELS, 0.0)
    for event in prof.key_averages():
        kind = next(k for k, names in KERNELS.items() if any(name in event.key.lower() for name in names))
        seconds[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    return seconds


# ----------------------------------------------------------------------------------------------------------------------
# decode


class BalancedRouter(nn.Module):
    """Stands in for the router of an untrained model: decides by a hash of the hidden state, so that a fraction
    capacity_r of all tokens runs recursion r. Like a real one it is causal, static, and reads its token's stream."""

    def __init__(self, c: MoRConfig, r: int | None):
        super().__init__()
        self.go_on = None if r is None else c.capacities[r] / c.capacities[max(0, r - 1)]  # expert: P(runs r | ran r-1)
        self.register_buffer("border", 1 - torch.tensor(c.capacities))  # token: depth is the number of borders below u
        self.register_buffer("projection", torch.randn(c.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> logits fp32: [B, T, 1] for expert choice, [B, T, N] for token choice."""
        u = (x.float() * self.projection).sum(-1, keepdim=True) * 1e3
        u = u - u.floor()  # uniform in [0, 1)
        if self.go_on is not None:
            return self.go_on - u
        return torch.where(u >= self.border, self.border, -1.0).float() * 100  # the last border below u wins


def balance(model: MoR) -> MoR:
    c = model.config
    if c.router == "expert":
        model.routers = nn.ModuleList(BalancedRouter(c, r) for r in range(c.n_recursion))
    if c.router == "token":
        model.router = BalancedRouter(c, None)
    return model


def attend_cache_by_sdpa(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """model.attend_cache as torch's own attention does it."""
    mask = torch.arange(k.size(1), device=q.device) < length[:, None]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True).transpose(1, 2)


def decode_ours(
    model: MoR, batches: Tensor, args: Namespace, replaced: tuple = ("linear", model_file.linear), **options
) -> Callable[[], dict]:
    """sample.generate, with cache and graphs kept between calls; each call takes the next batch of prompts [B, P].
    replaced: a function of model.py by name, and what stands in for it."""
    _, B, P = batches.shape
    decoder = Decoder(model, B, P + args.new, **dict(compile=args.compile, freeze=args.freeze) | options)
    turns = iter(batches.tolist())

    def case():
        prompts = next(turns)
        with patch.object(model_file, *replaced):  # for when it compiles
            start = time.perf_counter()
            out = generate(model, prompts, args.new, decoder=decoder)
            seconds = time.perf_counter() - start
        depth = statistics.mean(d for row in out.depth for d in row[P:])
        # as many steps as tokens: the last one only tells the depth of the last token
        return dict(seconds=seconds, prefill=out.prefill_seconds, step=out.seconds / args.new, depth=depth,
                    kv_bytes=decoder.cache.nbytes, tokens=out.tokens)  # fmt: skip

    return case


def decode_uncached(model: MoR, batches: Tensor, args: Namespace) -> Callable[[], dict]:
    """A full forward per token. In one graph, at the final length: what follows a token does not change it."""
    (_, B, P), turns = batches.shape, iter(batches)

    def next_token(idx: Tensor, at: Tensor) -> Tensor:
        position = torch.arange(idx.size(1), device=idx.device)[None]
        h, _ = model.backbone(idx, Pass(position, max_depth=model.config.n_recursion))
        return model.head(h.index_select(1, at)[:, 0]).argmax(-1)

    graphs = Graphs(args.compile, args.freeze, torch.device(args.device))

    @torch.no_grad()
    def case():
        start = time.perf_counter()
        idx = torch.zeros(B, P + args.new, dtype=torch.long, device=args.device)
        idx[:, :P] = next(turns)
        for i in range(P, P + args.new):
            idx[:, i] = graphs.run(("token",), next_token, idx, torch.tensor([i - 1], device=args.device))
        return dict(tokens=idx[:, P:].tolist(), seconds=time.perf_counter() - start)

    return case


def llama(c: MoRConfig) -> nn.Module:
    """transformers' model of the dimensions of a vanilla configuration."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        fail("the comparison needs the package transformers: pip install it, or give --no-llama")
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=True,
    ))  # fmt: skip


def decode_llama(model: nn.Module, batches: Tensor, args: Namespace, compiled: bool) -> Callable[[], dict]:
    """transformers' generate with its static cache."""
    from transformers import CompileConfig

    options = dict(cache_implementation="static", do_sample=False, eos_token_id=None, pad_token_id=0)
    options["disable_compile"] = not compiled
    if compiled:
        options["compile_config"] = CompileConfig(fullgraph=True, dynamic=False, mode="default")
        options["compile_config"]._compile_all_devices = True  # it leaves CPUs out unless told
    turns = iter(batches.to(model.device))

    def call(idx: Tensor, n: int) -> list:
        return model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, **options).tolist()

    def case():
        idx, marks = next(turns), [time.perf_counter()]
        for n in (1, args.new):  # one token is the prefill
            tokens = call(idx, n)
            marks.append(time.perf_counter())
        prefill, seconds = marks[1] - marks[0], marks[2] - marks[1]
        step = (seconds - prefill) / max(1, args.new - 1)
        return dict(tokens=[row[idx.size(1) :] for row in tokens], seconds=seconds, prefill=prefill, step=step)

    return case


def decode(args: Namespace) -> dict[str, Any]:
    device, dtype, facts, length = torch.device(args.device), DTYPES[args.dtype], about(args), args.prompt + args.new
    names = args.variants or (["vanilla", "expert-2"] if args.quick else ["vanilla", "expert-3", "token-3"])
    configs = {name: make_config(name, args.preset, length, **model_size(args)) for name in names}
    vanilla = make_config("vanilla", args.preset, length, **model_size(args))
    theirs = llama(vanilla).to(device, dtype).eval() if args.llama else None
    models, rows, first = {}, [], names[0]
    for name, config in configs.items():
        model = balance(MoR(config))
        if theirs is not None and name == "vanilla":  # the same weights should give the same tokens
            model.load_reference_state_dict(theirs.state_dict())
        models[name] = model.to(device, dtype).eval()
    for B in args.batch:
        # other prompts each round (two warm up), or routing's depths would be those of one text
        batches = torch.randint(vanilla.vocab_size, (args.rounds + 2, B, args.prompt))
        cases = {name: decode_ours(model, batches, args) for name, model in models.items()}
        if args.ablate:
            without = {"SDPA": dict(replaced=("attend_cache", attend_cache_by_sdpa)), "not packed": dict(freeze=False)}
            if B == 1:
                without |= {"F.linear": dict(replaced=("linear", F.linear))}
            if configs[first].router != "none":
                without |= {"early exit": dict(early_exit=True), "one graph": dict(early_exit=False)}
            for what, options in without.items():
                cases[f"{first}, {what}"] = decode_ours(models[first], batches, args, **options)
        if args.uncached:
            cases[f"{first}, uncached"] = decode_uncached(models[first], batches, args)
        if theirs is not None:
            cases["transformers"] = decode_llama(theirs, batches, args, compiled=False)
        if theirs is not None and args.compile:
            cases["transformers, compiled"] = decode_llama(theirs, batches, args, compiled=True)
        warmup = {name: warm_up(name, [case], device) for name, case in cases.items()}
        results, base = interleave(cases, args.rounds), next(iter(cases))
        seconds = {name: [r["seconds"] for r in rounds] for name, rounds in results.items()}
        for name, rounds in results.items():
            median, variant = statistics.median(seconds[name]), name.split(",")[0]
            row = dict(name=name, batch=B, prompt=args.prompt, new=args.new, warmup=warmup[name], seconds=median)
            row |= dict(spread=spread(seconds[name]), tokens_per_second=B * args.new / median)
            row |= dict(speedup=ratio(seconds[base], seconds[name]))
            if "depth" in rounds[0]:
                row |= dict(depth=statistics.mean(r["depth"] for r in rounds), kv_bytes=rounds[0]["kv_bytes"])
            if "step" in rounds[0]:
                row["decode_tokens_per_second"] = B / statistics.median(r["step"] for r in rounds)
                row["prefill_tokens_per_second"] = B * args.prompt / statistics.median(r["prefill"] for r in rounds)
            if variant in (first, "transformers"):
                ours, other = (torch.tensor([r["tokens"] for r in results[of]]) for of in (base, name))
                row["same_tokens"] = (ours == other).double().mean().item()
            elif B == 1:
                row["bound"] = flops(configs[first], length) / flops(configs[variant], length)
            rows.append(row)
    print(f"{args.dtype}, greedy, {args.new} tokens after {args.prompt}, balanced routing; a call is prefill and"
          f" decoding; ratios are to {rows[0]['name']}")  # fmt: skip
    table(rows, "decoder=name|batch=batch:d|call tok/s=tokens_per_second:,.0f|spread=spread:.0%|ratio=speedup:.2f|"
          "bound=bound:.2f|decode tok/s=decode_tokens_per_second:,.0f|prefill tok/s=prefill_tokens_per_second:,.0f|"
          "depth=depth:.2f|KV MiB=kv_bytes:.2f/1048576|same tokens=same_tokens:.2f|warm-up s=warmup:.1f")  # fmt: skip
    spreads = {f"{r['name']} at batch {r['batch']}": r["spread"] for r in rows}
    return dict(about=facts, preset=args.preset, routing="balanced", freeze=args.freeze, rounds=args.rounds, rows=rows,
                warnings=disturbances(facts, spreads))  # fmt: skip


def flops(config: MoRConfig, T: int) -> float:
    """Forward, per token, head included; decoding one row reads weights in proportion to them."""
    with torch.device("meta"):
        return MoR(config).flops_per_token(T, head=True)


# ----------------------------------------------------------------------------------------------------------------------
# serve


def serve_models(args: Namespace) -> tuple[dict[str, MoR], int]:
    """Models by name, the vanilla one first, and the token that an empty prompt becomes."""
    device, dtype, T = args.device, DTYPES[args.dtype], args.new * 3 // 2
    if not args.run:
        names = args.variants or ["vanilla", "expert-2", "expert-3", "expert-4"]
        names = [n for n in names if n != "vanilla"][: 1 if args.quick else None]
        configs = {n: make_config(n, args.preset, T, **model_size(args)) for n in ["vanilla", *names]}
        return {name: balance(MoR(c)).to(device, dtype).eval() for name, c in configs.items()}, 0
    model, meta, _ = load_run(args.run, device, dtype)
    c = model.config
    if c.block_size < T:
        fail(f"--run {args.run} has a context of {c.block_size} tokens: give --new {c.block_size * 2 // 3} or less")
    same = {f: getattr(c, f) for f in "vocab_size block_size n_layer n_head n_kv_head d_model d_ff".split()}
    vanilla = MoR(MoRConfig(**same)).to(device, dtype).eval()
    return {"vanilla": vanilla, Path(args.run).name: model}, meta["eot"]


class Service:
    """An engine under load: empty prompts, output lengths ~ N(new, new/8), a queue of 8 times the slots.

    Tokens are drawn: greedy requests of an untrained model would all be one text, with its depths."""

    def __init__(self, model: MoR, slots: int, width: int, turn_width: int, eot: int, args: Namespace):
        options = dict(turn_width=turn_width, slack=args.slack, compile=args.compile, freeze=args.freeze)
        self.engine, self.rng = Engine(model, slots, width, args.new * 3 // 2, **options), random.Random(0)
        self.new, self.eot, self.served = args.new, eot, 0
        self.windows: list[dict] = []

    def refill(self) -> None:
        def hear(request, token):
            self.served += 1

        while len(self.engine.waiting) < 8 * self.engine.slots:
            n = min(max(1, round(self.rng.gauss(self.new, self.new / 8))), self.engine.cache.max_len - 1)
            self.engine.submit([self.eot], n, temperature=1.0, seed=self.rng.getrandbits(32), on_token=hear)

    def warm_up(self) -> None:
        """Compiles, then serves first requests of uneven lengths, so that a window finds requests of all ages."""
        self.refill()
        first = list(self.engine.waiting)[: self.engine.slots]
        for request in first:
            request.max_new_tokens = self.rng.randint(1, request.max_new_tokens)
        while any(request.status != "done" for request in first):
            self.refill()
            self.engine.step()

    def window(self, seconds: float) -> None:
        """Serves for some seconds and keeps what happened; nothing is left out of the time."""
        engine = self.engine
        engine.history = deque()  # without the engine's bound: every stage of the window counts
        before, start = self.served, time.perf_counter()
        while time.perf_counter() < start + seconds:
            self.refill()
            engine.step()
        wall, tokens = time.perf_counter() - start, self.served - before
        self.windows.append(dict(seconds=wall, speed=tokens / wall, runs=list(engine.history)))


def serve_row(name: str, service: Service, vanilla: dict | None, args: Namespace) -> dict[str, Any]:
    """What the windows of one engine say. T/2 keys per token: requests of T tokens are on average half done."""
    engine, model, T, windows = service.engine, service.engine.model, service.new, service.windows
    c, runs, cache = model.config, [run for window in windows for run in window["runs"]], engine.cache
    turns, blocks = ([run for run in runs if run.stage == stage] for stage in ("turn", "block"))
    rows = sum(run.rows for run in turns)
    fractions = [1.0] + [sum(run.recursions[r] for run in blocks) / rows for r in range(1, c.n_recursion)]
    if c.router == "none":
        fractions = [1.0] * c.n_recursion
    flops = model.flops_per_token(T, head=True, fractions=fractions)
    first = [1.0] + [0.0] * (c.n_recursion - 1) if blocks else fractions  # what a turn runs
    turn_flops = model.flops_per_token(T, head=True, fractions=first)
    # weights are read once per stage, K/V once per token: T/2 keys per layer, fewer where fewer tokens went
    item, per_key = cache.k[0].itemsize, 2 * c.n_kv_head * c.head_dim
    block_bytes = item * sum(p.numel() for p in model.block.parameters())
    turn_bytes = item * sum(p.numel() for p in model.parameters())
    kept = fractions if c.kv == "share" else [f * f for f in fractions]
    kv_read = item * per_key * T / 2 * (c.n_unshared + c.n_block * sum(kept))
    read = turn_bytes / engine.turn_width + block_bytes * sum(fractions[1:]) / engine.width + kv_read
    speeds = [window["speed"] for window in windows]
    row = dict(
        name=name, layers=layers_name(c), width=engine.width, turn_width=engine.turn_width, slots=engine.slots,
        kv_bytes=cache.nbytes * engine.slots // cache.batch, tokens_per_second=statistics.median(speeds),
        spread=spread(speeds), speeds=speeds, depth=sum(fractions), fractions=fractions, flops=flops, bytes_read=read,
        turn_use=statistics.mean(run.rows for run in turns) / engine.turn_width,
        turn_seconds=statistics.median(run.seconds for run in turns),
        host=1 - sum(run.seconds for run in runs) / sum(window["seconds"] for window in windows),
        overflow=int(cache.overflow.sum()),
    )  # fmt: skip
    if blocks:
        row["block_use"] = statistics.mean(run.rows for run in blocks) / engine.width
        row["block_seconds"] = statistics.median(run.seconds for run in blocks)
        row["timeline"] = [[round(run.seconds, 6), run.stage, run.rows, run.recursions] for run in runs[-150:]]
    base = vanilla or row
    row |= dict(ratio=ratio(speeds, base["speeds"]), bound=base["flops"] / flops, bound_bytes=base["bytes_read"] / read)
    row["of_bound"] = row["ratio"] / row["bound"]
    # what a full stage should take if it did its FLOPs as fast as vanilla's does
    pace = base["turn_seconds"] / (base["flops"] * base["turn_width"])
    row["turn_expected"] = pace * turn_flops * engine.turn_width
    if blocks:
        row["block_expected"] = pace * (flops - turn_flops) / sum(fractions[1:]) * engine.width
    return row


def serve(args: Namespace) -> dict[str, Any]:
    device, facts, routing = torch.device(args.device), about(args), "trained" if args.run else "balanced"
    models, eot = serve_models(args)
    services: dict[tuple[int, str], Service] = {}
    for W in args.widths:
        for name, model in models.items():
            if model.config.router == "none":  # recursive: its recursions never wait for one another
                services[W, name] = Service(model, W, W, W, eot, args)
                continue
            services[W, name] = Service(model, 2 * W - 1, W, W, eot, args)
            if args.equal_memory:
                caches = [services[W, n].engine.cache for n in ("vanilla", name)]
                slots = W * (caches[0].nbytes // caches[0].batch) // (caches[1].nbytes // caches[1].batch)
                turn = (slots + 1) // 2
                services[W, f"{name}, equal memory"] = Service(model, slots, slots + 1 - turn, turn, eot, args)
    warmup = {}
    for (W, name), service in services.items():
        warmup[W, name] = sum(stopwatch([service.warm_up], device))
        print(f"{name}, width {W}: warm after {warmup[W, name]:.0f} s", file=sys.stderr, flush=True)
    interleave({case: lambda s=s: s.window(args.seconds) for case, s in services.items()}, args.rounds)
    rows, vanilla = [], {}
    for (W, name), service in services.items():
        rows.append(serve_row(name, service, vanilla.get(W), args) | dict(at=W, warmup=warmup[W, name]))
        vanilla.setdefault(W, rows[-1])
    print(f"{args.dtype}, {routing} routing, empty prompts, output lengths ~ N({args.new}, {args.new // 8}), all time"
          f" counted; {args.rounds} windows of {args.seconds:g} s, interleaved; ratios are to vanilla")  # fmt: skip
    ms = ":.2f/1e-3"
    table(rows, "variant=name|layers=layers|turn=turn_width:d|block=width:d|slots=slots:d|KV MiB=kv_bytes:.1f/1048576|"
          "tok/s=tokens_per_second:,.0f|spread=spread:.0%|ratio=ratio:.3f|by FLOPs=bound:.3f|of it=of_bound:.1%|"
          "by bytes=bound_bytes:.3f|depth=depth:.2f|overflow=overflow:d|warm-up s=warmup:.0f")  # fmt: skip
    print("\nuseful rows in a stage's batch; milliseconds of a stage, and if it did its FLOPs at vanilla's pace; time"
          " between stages")  # fmt: skip
    table(rows, f"variant=name|turn full=turn_use:.1%|block full=block_use:.1%|turn ms=turn_seconds{ms}|by FLOPs="
          f"turn_expected{ms}|block ms=block_seconds{ms}|by FLOPs=block_expected{ms}|host=host:.1%")  # fmt: skip
    warnings = disturbances(facts, {f"{r['name']} at {r['at']}": r["spread"] for r in rows})
    return dict(about=facts, preset=args.preset, routing=routing, run=args.run, new=args.new, freeze=args.freeze,
                rounds=args.rounds, seconds=args.seconds, rows=rows, warnings=warnings)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# plot

COLORS = ("#8fb8de", "#3b75af", "#c9c9c9")


def plot(args: Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if Path(args.out).suffix != ".png" or not Path(args.out).absolute().parent.is_dir():
        fail(f"-o {args.out} must be a .png file in a directory that exists")
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9}
    columns = min(2, len(args.files))
    lines = -(-len(args.files) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 3.8 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(args.files) :]:
        axis.axis("off")
    for file, axis in zip(args.files, axes.flat, strict=False):
        try:
            result = json.loads(Path(file).read_text().splitlines()[-1])
            panel = dict(cost=plot_cost, train=plot_train, decode=plot_decode, serve=plot_serve)[result["bench"]]
        except OSError as e:
            fail(f"cannot read {file}: {e.strerror}")
        except (ValueError, IndexError, KeyError, TypeError):
            fail(f"{file} does not end with a line of JSON from bench.py: write one with --json")
        panel(axis, result)
        facts = result["about"]
        note = f"{facts['machine']}, {facts['dtype']}, {facts['commit']}"
        axis.set_xlabel("\n".join(filter(None, (axis.get_xlabel(), note))), fontsize=8)
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


def plot_train(axis, result: dict) -> None:
    rows, names = result["rows"], [r["name"] for r in result["rows"]]
    step, by_flops = [r["step"] for r in rows], [r["by_flops"] * rows[0]["step"] for r in rows]
    axis.set(ylabel="seconds per step", title=f"training step, {rows[0]['batch']} x {rows[0]['seq']} tokens")
    if result["sweep"] == "capacity":
        x = [float(name.split()[1]) for name in names]
        axis.plot(x, step, "o-", color=COLORS[1], label="measured")
        axis.plot(x, by_flops, "k:", label="in proportion to FLOPs")
        axis.set(xlabel="capacity of every recursion", xlim=(0, 1.05), ylim=(0, None))
    else:
        bottom = [0.0] * len(rows)
        for stage, color in zip(("forward", "backward", "optimizer"), COLORS, strict=True):
            axis.bar(names, [r[stage] for r in rows], bottom=bottom, color=color, label=stage, width=0.65)
            bottom = [b + r[stage] for b, r in zip(bottom, rows, strict=True)]
        axis.hlines(by_flops, *([i + d for i in range(len(rows))] for d in (-0.4, 0.4)), "k", ":", label="by FLOPs")
        for i, r in enumerate(rows):
            axis.text(i, r["forward"] / 2, f"{r['ratio']:.2f}", ha="center", va="center")
        axis.set_ylim(0, 1.2 * max(bottom))
        axis.tick_params(axis="x", rotation=20)
    axis.legend(ncols=2, fontsize=8)


def plot_decode(axis, result: dict) -> None:
    batches, names = (list(dict.fromkeys(r[key] for r in result["rows"])) for key in ("batch", "name"))
    for i, B in enumerate(batches):
        rows = [r for r in result["rows"] if r["batch"] == B]
        y = [names.index(r["name"]) + (i + 0.5) / len(batches) * 0.8 - 0.4 for r in rows]
        speed = [r["tokens_per_second"] for r in rows]
        bars = axis.barh(y, speed, 0.72 / len(batches), color=COLORS[i % 3], label=f"batch {B}")
        axis.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="tokens per second, prefill included", xscale="log", title="greedy decoding")
    axis.margins(x=0.12)
    axis.legend()


def plot_serve(axis, result: dict) -> None:
    """Tokens/s against width where several were measured, else who was in the batches of the last engine."""
    rows, widths = result["rows"], sorted({r["at"] for r in result["rows"]})
    if len(widths) > 1:
        for i, name in enumerate(dict.fromkeys(r["name"] for r in rows)):
            mine = [r for r in rows if r["name"] == name]
            axis.plot([r["at"] for r in mine], [r["tokens_per_second"] for r in mine], "os^Dv"[i % 5] + "-", label=name)
        axis.set(xlabel="width", ylabel="tokens per second", ylim=(0, None), xticks=widths, title="serving")
        axis.legend()
        return
    row = next((r for r in reversed(rows) if "timeline" in r), None)
    if row is None:
        fail("a picture of serving needs several --widths, or a variant with a router")
    at, starts, widths_of, stacks = 0.0, [], [], []
    for seconds, stage, used, recursions in row["timeline"]:
        starts, widths_of = [*starts, 1e3 * at], [*widths_of, 1e3 * seconds]
        stacks.append([used, *[0] * len(row["fractions"])] if stage == "turn" else [0, *recursions])
        at += seconds
    bottom = [0] * len(stacks)
    for r, rows_at in enumerate(zip(*stacks, strict=True)):
        label, color = f"recursion {r}" if r else "turn (recursion 1)", str(0.8) if not r else f"C{r - 1}"
        if any(rows_at):
            axis.bar(starts, rows_at, widths_of, bottom, align="edge", color=color, label=label)
        bottom = [b + n for b, n in zip(bottom, rows_at, strict=True)]
    axis.axhline(row["width"], color="k", ls=":", lw=1)
    axis.set(xlabel="milliseconds", ylabel="rows in the batch", title=f"{row['name']}: each bar is a stage's batch")
    axis.set_ylim(0, 1.25 * max(row["width"], row["turn_width"]))
    axis.legend(ncols=3, fontsize=8, loc="upper center")


def plot_cost(axis, result: dict) -> None:
    rows = [r for r in result["rows"] if r["preset"] == result["rows"][0]["preset"]]
    paper = {"params": "paper_params_ratio", "flops": "paper_ratio"}
    for i, (label, key) in enumerate((("parameters", "params"), ("forward FLOPs", "flops"), ("KV cache", "kv_bytes"))):
        x = [j + 0.27 * (i - 1) for j in range(len(rows))]
        axis.bar(x, [r[key] / rows[0][key] for r in rows], width=0.25, label=label, color=COLORS[i])
        known = [(at, r[paper[key]]) for at, r in zip(x, rows, strict=True) if key in paper and r.get(paper[key])]
        axis.plot([at for at, _ in known], [value for _, value in known], "kx", ms=4, label="" if i else "paper")
    axis.set_xticks(range(len(rows)), [r["variant"] for r in rows], rotation=20)
    axis.set(ylabel="against vanilla", ylim=(0, 1.3), title=f"{rows[0]['preset']}, T = {result['seq']}")
    axis.legend(ncols=4, fontsize=8)


# ----------------------------------------------------------------------------------------------------------------------
# command line


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--json", metavar="FILE", help="write the last line to FILE as well")
    common.add_argument("--quick", action="store_true", help="tiny sizes: under a minute, figures without meaning")
    common.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--threads", type=int, default=torch.get_num_threads())
    model = Parser(add_help=False)
    model.add_argument("variants", nargs="*", metavar="VARIANT", help=f"vanilla, {', '.join(list(KINDS)[1:])} with -N")
    model.add_argument("--preset", default="135M", choices=list(PRESETS))
    model.add_argument("--layers", type=int, default=11, help="unrolled depth (default 11; 0: the preset's)")
    model.add_argument("--vocab", type=int, default=8192, help="default 8192; 0: the preset's")
    model.add_argument("--rounds", type=int, default=5)

    sub = commands.add_parser("cost", parents=[common], help="parameters, FLOPs, memory, communication: computed")
    sub.add_argument("presets", nargs="*", metavar="PRESET", help=", ".join(PRESETS))
    sub.add_argument("--seq", type=int, default=2048, help="context T (default 2048)")
    sub.add_argument("--devices", type=int, default=8)
    sub.add_argument("--batch", type=int, default=8, help="sequences per device (default 8)")

    sub = commands.add_parser("train", parents=[common, model], help="compiled training step, variants interleaved")
    sub.add_argument("--batch", type=int, default=8)
    sub.add_argument("--seq", type=int, default=512)
    sub.add_argument("--compile", choices=["whole", "layer", "none"], default="whole", help="what is one graph")
    sub.add_argument("--sweep", choices=["capacity", "T", "N"], help="scaling instead of variants")
    sub.add_argument("--fresh", action="store_true", help="also compile time and peak memory, in fresh processes")
    sub.add_argument("--checkpoint-recursions", action="store_true", help="recompute recursions in the backward pass")
    sub.add_argument("--profile", action="store_true", help="also one step by kind of kernel")

    sub = commands.add_parser("decode", parents=[common, model], help="prefill and cached decoding")
    sub.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    sub.add_argument("--prompt", type=int, default=64, help="tokens (default 64)")
    sub.add_argument("--new", type=int, default=64, help="tokens to generate (default 64)")
    switches = dict(compile="compile, ours and theirs", freeze="let the compiler pack our weights",
                    llama="compare with transformers", uncached="also a full forward per token")  # fmt: skip
    for name, meaning in switches.items():
        sub.add_argument(f"--{name}", action=BooleanOptionalAction, default=True, help=f"{meaning} (default: yes)")
    sub.add_argument("--ablate", action="store_true", help="also the first without what makes it fast, piece by piece")

    sub = commands.add_parser("serve", parents=[common, model], help="the engine under load, against vanilla's")
    sub.add_argument("--run", metavar="RUN", help="serve a checkpoint of train.py, and a vanilla model of its size")
    sub.add_argument("--widths", type=int, nargs="+", default=[32], metavar="W", help="rows per batch (default 32)")
    sub.add_argument("--new", type=int, default=256, help="tokens per request, on average (default 256)")
    sub.add_argument("--slack", type=float, default=1.0, help="cache slots relative to capacity (default 1)")
    sub.add_argument("--seconds", type=float, default=4.0, help="length of a window (default 4)")
    switches = {"compile": "compile the stages", "freeze": "let the compiler pack weights",
                "equal-memory": "also as many slots as fit in the K/V memory of vanilla's"}  # fmt: skip
    for name, meaning in switches.items():
        sub.add_argument(f"--{name}", action=BooleanOptionalAction, default=True, help=f"{meaning} (default: yes)")

    sub = commands.add_parser("plot", help="JSON of the others -> PNG, a panel per file")
    sub.add_argument("files", nargs="+", metavar="FILE.json")
    sub.add_argument("-o", "--out", required=True, metavar="FILE.png")

    args = parser.parse_args(argv)
    if args.command == "plot":
        return plot(args)
    args.argv = sys.argv[1:] if argv is None else argv
    for name in ("batch", "seq", "prompt", "new", "rounds", "devices", "threads", "widths"):
        value = getattr(args, name, 1)
        if min(value if isinstance(value, list) else [value]) < 1:
            fail(f"--{name} {value} must be at least 1")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {args.device} cannot be used here: {str(e).splitlines()[0]}")
    if args.quick:
        tiny = dict(
            train=dict(batch=2, seq=64, rounds=2), decode=dict(batch=[2], prompt=12, new=8, rounds=2),
            serve=dict(widths=[min(w, 4) for w in getattr(args, "widths", [])], new=16, rounds=2, seconds=1.0),
        )  # fmt: skip
        vars(args).update(tiny.get(args.command, {}))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = dict(bench=args.command) | dict(cost=cost, train=train, decode=decode, serve=serve)[args.command](args)
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
