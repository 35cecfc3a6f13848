"""train.py in one process: command line, data order, schedules, resume, checkpoints, faults."""

import base64
import errno
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import types
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, relative
from test_checkpoint import golden_weights, write_directory

import checkpoint
import cli
import train
from model import MoRConfig
from prepare import Shards

VOCAB, EOT = 40, 39
TINY = "--vocab-size 40 --block-size 16 --n-layer 5 --n-head 2 --n-kv-head 1 --d-model 16 --d-ff 24".split()
SHORT = "--dtype fp32 --device cpu --batch-tokens 64 --micro-batch 2 --eval-tokens 320 --log-every 1".split()


def write_data(directory, train_tokens=3000, val_tokens=700, **meta):
    """A directory as prepare.py would write it: a Markov chain with a document border now and then."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train_tokens), ("val", val_tokens)):
        steps = rng.choice([1, 2, 7], count, p=[0.7, 0.2, 0.1])
        tokens = (steps.cumsum() % EOT).astype("<u2")
        tokens[rng.random(count) < 0.02] = EOT
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        (directory / f"{split}_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())
    counts = dict(
        train_tokens=train_tokens, val_tokens=val_tokens, train_bytes=2 * train_tokens, val_bytes=2 * val_tokens
    )
    meta = dict(vocab_size=VOCAB, tokenizer="none", eot=EOT) | counts | meta
    (directory / "meta.json").write_text(json.dumps(meta))
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


PLOT = train.plot


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without the picture and the measurement of the machine; train.main() takes over the signals: give them back."""
    monkeypatch.setattr(train, "plot", lambda *args: None)
    monkeypatch.setattr(train, "matmul_peak", lambda *args: 1e11)
    before = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def flags(data, out, *more, compile=False):
    return [
        *TINY,
        *SHORT,
        "--data",
        str(data),
        "--out",
        str(out),
        *([] if compile else ["--no-compile"]),
        *map(str, more),
    ]


def command(*args):
    return [sys.executable, str(ROOT / "train.py"), *map(str, args)]


def losses(out):
    return {row["step"]: row["loss"] for row in train.read_metrics(out) if "loss" in row}


def refused(capfd, argv) -> str:
    """Runs train.py with a user's mistake -> the one line it prints."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in argv])
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---------------------------------------------------------------------------------------------------------------------
# a run


def test_compiled_run_from_the_command_line(data, tmp_path):
    out = tmp_path / "run"
    more = "--steps 12 --eval-every 6 --capacity-warmup 4 --doc-mask --lr 1e-2 --n-recursion 2 --n-layer 4".split()
    done = subprocess.run(command(*flags(data, out, *more, compile=True)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for what in ("capacity warm-up graph in", "training graph in", "% of peak", "eta", "bigram", "peak memory"):
        assert what in done.stdout, done.stdout
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    config = json.loads((out / "config.json").read_text())
    assert MoRConfig(**config["model"]).n_recursion == 2 and config["data"]["tokenizer"] == "none"
    rows = train.read_metrics(out)
    assert [r["step"] for r in rows if "lm" in r] == [*range(1, 13)]
    assert [r["step"] for r in rows if "val_loss" in r] == [6, 12]
    last = rows[-1]
    assert {"val_loss", "val_topk", "val_loss_bpb", "agreement", "dead", "maxvio", "entropy", "selected"} <= last.keys()
    assert last["val_loss"] < math.log(VOCAB) and last["val_loss_bpb"] == pytest.approx(
        last["val_loss"] / math.log(2) / 2
    )
    assert rows[0]["depth"] == pytest.approx(2.0)  # capacities start at 1
    checkpoint = torch.load(out / "ckpt_000012.pt", weights_only=True)
    assert (
        not any(k.startswith(("_orig_mod", "module")) for k in checkpoint["model"]) and checkpoint["config"] == config
    )


VARIANTS = {
    "vanilla": "--router none --n-recursion 1",
    "recursive": "--router none",
    "token": "--router token",
    "token bias": "--router token --balance bias --z-coef 1e-3",
    "aux router": "--causality aux_router",
    "no causality": "--causality none",
    "shared kv": "--kv share --checkpoint-recursions --schedule cosine",
    "capacity": "--capacity 1,0.5,0.25 --doc-mask",
    "no choice": "--capacity 1,1,1",
    "random": "--router random",
    "position": "--router position --kv share --qk-norm",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train(data, tmp_path, name):
    train.main(flags(data, tmp_path, "--steps", 4, "--eval-every", 2, *VARIANTS[name].split()))
    rows = train.read_metrics(tmp_path)
    assert ("val_loss" in rows[-1]) == (name != "no causality")
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert all(0 < row["loading"] < 1 for row in rows if "loss" in row)


def test_learns(data, tmp_path, capsys):
    train.main(flags(data, tmp_path, "--steps", 60, "--lr", "1e-2", "--eval-every", 60, "--log-every", 30))
    assert train.read_metrics(tmp_path)[-1]["val_loss"] < 2.7  # 3.69 without learning; the chain itself has 0.8
    assert "a bigram model of the same tokens: 0.8" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# recipes, sizes, budgets


@pytest.fixture(scope="session")
def long_data(tmp_path_factory):
    """Enough for one batch of the paper's."""
    return write_data(tmp_path_factory.mktemp("long"), train_tokens=2_200_000, val_tokens=3000)


def test_recipes_have_the_paper_s_flops(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--recipes"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    head, rows = lines[0].split(), {line.split()[0]: line.split() for line in lines[1 : 1 + len(train.RECIPES)]}
    assert rows.keys() == train.RECIPES.keys()
    for name in ("vanilla", "mor-2", "mor-3", "mor-4", "mor-3-share"):
        assert float(rows[name][head.index("EFLOPs")]) == pytest.approx(16.5, rel=1e-3)
    assert rows["mor-4"][head.index("layers")] == "34" and rows["mor-4"][head.index("params")] == "98M"


@pytest.mark.parametrize("name", train.RECIPES)
def test_recipes_can_be_started(name, long_data, tmp_path, capsys):
    train.main(["--recipe", name, "--data", str(long_data), "--out", str(tmp_path / "run"), "--dry-run"])
    out = capsys.readouterr().out
    assert f"{train.RECIPES[name][0]} steps of 2097152 tokens" in out
    assert "SmolLM's tokenizer of 49152 tokens" in out  # which these data do not have
    assert not (tmp_path / "run").exists()


def test_flags_change_a_recipe():
    cfg, given = train.read_flags(["--recipe", "mor-2", "--steps", "4e3", "--n-recursion", "4", "--lr", "1e-3"])
    assert (cfg.steps, cfg.lr, cfg.preset, given["n_recursion"], given["router"]) == (4000, 1e-3, "360M", 4, "expert")
    assert (cfg.warmup, cfg.cooldown, cfg.schedule) == (86, 2524, "trapezoid")
    assert train.read_flags(["--recipe", "ablation"])[0].schedule == "cosine"


def test_sizes_bring_their_batch(long_data, tmp_path, capsys):
    common = ["--data", str(long_data), "--out", str(tmp_path), "--dry-run"]
    train.main(["--preset", "360M", *common])
    out = capsys.readouterr().out
    assert "9438 steps of 2097152 tokens" in out and "warning" not in out
    train.main(["--preset", "360M", *common, "--batch-tokens", "2048"])
    assert "--batch-tokens 2048 is far below the 2097152 that 360M is trained with" in capsys.readouterr().out
    train.main(common)
    out = capsys.readouterr().out
    assert "800 steps of 2048 tokens" in out and "warning" not in out


def test_the_lines_of_the_manual_start(long_data, tmp_path, capsys, monkeypatch):
    """Every command in the docstring, up to the plan of what it would train."""
    monkeypatch.chdir(tmp_path)
    lines = [line.split("#")[0] for line in train.__doc__.splitlines() if "train.py" in line]
    lines = [line.split("train.py")[1].split() for line in lines if line.startswith("    ")]
    started = []
    for line in lines:
        if "--recipes" not in line and "--init-from" not in line:
            train.main([*line, "--data", str(long_data), "--dry-run"])
            started.append(capsys.readouterr().out)
    assert len(started) == 7 and all("steps of" in out for out in started)
    recipes = [out for out in started if "warning" in out]
    assert len(recipes) == 1 and "tokenizer" in recipes[0]  # these data have another than the paper's
    assert started[4].count("steps of") == 4  # a plateau, and three budgets


def test_budgets_from_one_plateau(data, tmp_path, capsys):
    """Each budget is the run of that many steps with its cool-down, to the bit; the same command continues."""
    common = ("--warmup", 2, "--lr", 0.01, "--eval-every", 100)
    command = flags(data, tmp_path / "all", "--budgets", "10,20", *common)
    train.main(command)
    assert (tmp_path / "all" / "ckpt_000008.pt").exists() and (tmp_path / "all" / "ckpt_000016.pt").exists()
    told = capsys.readouterr().out
    assert "budget 10: validation" in told and "budget 20: validation" in told
    for steps in (10, 20):
        out = tmp_path / str(steps)
        train.main(flags(data, out, "--steps", steps, "--cooldown", 0.2, *common))
        cool = losses(tmp_path / "all" / f"budget_{steps}")
        assert cool == {s: v for s, v in losses(out).items() if s > 0.8 * steps} and len(cool) == steps // 5
    before = (tmp_path / "all" / "budget_20" / "ckpt_000020.pt").read_bytes()
    train.main(command)
    assert (tmp_path / "all" / "budget_20" / "ckpt_000020.pt").read_bytes() == before


def test_budgets_in_flops(data, tmp_path):
    cfg, given = train.read_flags(
        flags(data, tmp_path, "--budgets", "1e10,3e10", "--n-recursion", 1, "--router", "none")
    )
    config = MoRConfig.preset("nano", **given)
    plateau, small, large = train.plan_budgets(cfg, config)
    cost = train.MoR(config).flops_per_token(16, convention="paper") * 64
    totals = [train.step_of(checkpoint.Path(run.cooldown_from)) + run.steps for run in (small, large)]
    assert totals == [round(1e10 / cost), round(3e10 / cost)]
    assert plateau.keep_at == tuple(train.step_of(checkpoint.Path(run.cooldown_from)) for run in (small, large))
    assert plateau.warmup == round(0.05 * totals[0]) and small.steps == round(0.2 * totals[0])


def test_named_steps_are_saved_and_kept(data, tmp_path):
    train.main(flags(data, tmp_path, "--steps", 8, "--eval-every", 4, "--keep", 1, "--keep-at", "1,3"))
    steps = sorted(train.step_of(path) for path in tmp_path.glob("ckpt_*.pt"))
    assert {1, 3, 8} <= set(steps) and len(steps) <= 4


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


MISTAKES = {
    "unknown flag": (["--learning-rate", "1"], "unrecognized arguments"),
    "abbreviation": (["--step", "3"], "unrecognized arguments"),
    "not a number": (["--steps", "many"], "--steps"),
    "zero": (["--steps", "0"], "--steps 0 must be at least 1"),
    "rate": (["--lr", "nan"], "--lr nan must be a finite number > 0"),
    "choice": (["--schedule", "linear"], "choose from"),
    "preset": (["--preset", "7B"], "choose from"),
    "model": (["--n-layer", "6"], "use n_layer=8"),
    "vocabulary": (["--vocab-size", "10"], "a vocabulary of 10 is below the 40 of"),
    "batch": (["--batch-tokens", "65"], "must be a multiple of the block size 16: use 64"),
    "large batch": (["--batch-tokens", "32000"], "less than one batch"),
    "block": (["--block-size", "1024", "--batch-tokens", "1024"], "not one block of 1024"),
    "schedule": (["--warmup", "5", "--cooldown", "6", "--steps", "10"], "do not fit"),
    "fsdp alone": (["--parallel", "fsdp"], "torchrun"),
    "device": (["--device", "mps"], "sees no such device"),
    "no such data": (["--data", "/nowhere"], "/nowhere"),
    "no such checkpoint": (["--resume", "/nowhere.pt"], "/nowhere.pt does not exist"),
    "capacity": (["--capacity", "1,half"], "'1,half' must be numbers"),
    "two sizes": (["--init-from", "x", "--preset", "nano"], "leave --preset out"),
    "no such weights": (["--init-from", "/nowhere"], "/nowhere/config.json"),
    "no such package": (["--wandb"], "pip install wandb"),
    "unwritable": (["--out", "/proc/run"], "cannot write to --out /proc/run"),
    "half a step": (["--steps", "1.5e0"], "1.5e0 must be a whole number"),
    "infinite steps": (["--steps", "inf"], "inf must be a whole number"),
    "two steps": (["--steps", "1,2"], "1,2 must be a whole number"),
    "seed": (["--seed", "18446744073709551616"], "--seed"),
    "negative seed": (["--seed", "-1"], "--seed -1 must be at least 0"),
    "fp16": (["--dtype", "fp16"], "use bf16"),
    "half": (["--dtype", "half"], "loses gradients below 6e-8"),
    "recipe": (["--recipe", "mor-9"], "choose from"),
    "recipe of weights": (["--init-from", "x", "--recipe", "mor-2"], "has a size of its own"),
    "warm-up of token choice": (["--router", "token", "--capacity-warmup", "4"], "--capacity-warmup 4 needs --router"),
    "warm-up of none": (["--router", "none", "--capacity-warmup", "4"], "needs --router expert, not none"),
    "auxiliary rate": (["--aux-lr-factor", "10"], "needs --causality aux_router, not aux_loss"),
    "kept": (["--keep-at", "0,4"], "--keep-at 0,4 must be positive numbers"),
    "budgets of a cosine": (["--budgets", "8,12", "--schedule", "cosine"], "--budgets needs --schedule trapezoid"),
    "budgets that cool down": (["--budgets", "8,12", "--cooldown-from", "x"], "no --cooldown-from"),
    "small FLOPs": (["--budgets", "1e9,2e9", "--warmup", "700"], "too few to cool down from"),
    "small budget": (["--budgets", "2,12"], "too few to cool down from"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(data, tmp_path, capfd, monkeypatch, name):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    more, message = MISTAKES[name]
    assert message in refused(capfd, flags(data, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_batch_must_divide_among_the_processes(data, tmp_path, capfd, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert "3 processes cannot share its 4 sequences" in refused(capfd, flags(data, tmp_path / "run"))


@pytest.mark.parametrize("stray", [dict(WORLD_SIZE="8"), dict(WORLD_SIZE="8", RANK="3"), dict(LOCAL_RANK="x")])
def test_part_of_an_environment_of_torchrun_is_ignored(data, tmp_path, monkeypatch, stray):
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    train.main(flags(data, tmp_path, "--steps", 1))
    assert len(losses(tmp_path)) == 1


def test_environment_that_is_not_of_torchrun(data, tmp_path, capfd, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "two"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert "WORLD_SIZE=two" in refused(capfd, flags(data, tmp_path / "run"))


@pytest.mark.parametrize("missing", ["compiler", "the compiler that CXX names", "Python.h"])
def test_compiling_needs_a_compiler(data, tmp_path, capfd, monkeypatch, missing):
    if missing == "Python.h":
        monkeypatch.setattr(cli.sysconfig, "get_path", lambda name, scheme=None: str(tmp_path))
    elif missing == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CXX", "no-such-compiler")
    message = refused(capfd, flags(data, tmp_path / "run", compile=True))
    assert "--no-compile" in message and "apt-get install" in message and not (tmp_path / "run").exists()
    train.main(flags(data, tmp_path / "run", "--steps", 1))  # which needs none


def test_bad_data(tmp_path, capfd):
    data = write_data(tmp_path / "ids", vocab_size=39)
    assert "ids beyond the vocabulary of 39" in refused(capfd, flags(data, tmp_path / "run"))
    data = write_data(tmp_path / "cut")
    os.truncate(data / "train_000000.bin", 3000)
    assert "train_000000.bin" in refused(capfd, flags(data, tmp_path / "run"))


# ---------------------------------------------------------------------------------------------------------------------
# data


def test_every_block_once_per_epoch(data):
    shards = Shards(data, "train")
    blocks = train.Blocks(shards, 16, seed=3)
    n = blocks.count
    assert n == (3000 - 1) // 16
    every = [np.concatenate(list(blocks.batches(epoch * n, n, 1))) for epoch in (0, 1)]
    plain = np.stack([shards.tokens(i * 16, 17) for i in range(n)])
    for rows in every:
        assert Counter(map(bytes, rows)) == Counter(map(bytes, plain))
    assert (every[0] != every[1]).any()
    assert (every[0] != np.concatenate(list(train.Blocks(shards, 16, seed=4).batches(0, n, 1)))).any()


def test_batches_do_not_depend_on_the_number_of_processes(data):
    shards = Shards(data, "train")

    def global_batch(size):
        parts = [train.Blocks(shards, 16, 0).batches(180 + rank * 12 // size, 12 // size, 2) for rank in range(size)]
        return np.concatenate([rows for part in parts for rows in part])

    assert (global_batch(1) == global_batch(2)).all() and (global_batch(1) == global_batch(3)).all()


def test_segments_open_at_end_of_text():
    rows = np.array([[5, 6, EOT, 7, 8, EOT, 9]])
    idx, targets, segments = train.to_device(rows, EOT, torch.device("cpu"))
    assert segments.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert targets.tolist() == [[6, EOT, 7, 8, EOT, 9]] and idx.tolist() == [[5, 6, EOT, 7, 8, EOT]]


def test_loading_is_not_the_bottleneck(tmp_path):
    data = write_data(tmp_path, train_tokens=2_000_000)
    blocks = train.Blocks(Shards(data, "train"), 256, 0)
    start = time.perf_counter()
    for rows in blocks.batches(0, 4096, 32):
        train.to_device(rows, EOT, torch.device("cpu"))
    assert 4096 * 256 / (time.perf_counter() - start) > 1e6  # tokens/s; a nano model takes 1e4 here, an H100 1e6


def test_bigram_against_counting(data):
    train_shards, rows = Shards(data, "train"), Shards(data, "val").blocks(16, 320)
    tokens = train_shards.tokens(0, len(train_shards)).tolist()
    pairs, contexts, words = Counter(zip(tokens, tokens[1:], strict=False)), Counter(tokens[:-1]), Counter(tokens)
    kinds = Counter(a for a, _ in pairs)
    total = 0.0
    for row in rows.tolist():
        for a, b in zip(row, row[1:], strict=False):
            unigram = (words[b] + 1) / (len(tokens) + VOCAB)
            total -= math.log((pairs[a, b] + kinds[a] * unigram) / (contexts[a] + kinds[a]) if contexts[a] else unigram)
    assert train.bigram_nll(train_shards, rows, VOCAB) == pytest.approx(total / rows[:, 1:].size)


# ---------------------------------------------------------------------------------------------------------------------
# schedules and the step


def test_schedules():
    cfg = train.TrainConfig(lr=1.0, steps=100, warmup=5, cooldown=20, capacity_warmup=10)
    assert [train.learning_rate(cfg, s) for s in (0, 4, 5, 80, 90, 99)] == pytest.approx([0.2, 1, 1, 1, 0.5, 0.05])
    cosine = train.TrainConfig(lr=1.0, steps=100, warmup=0, schedule="cosine")
    assert [train.learning_rate(cosine, s) for s in (0, 50, 100)] == pytest.approx([1, 0.55, 0.1])
    config = MoRConfig.preset("nano", n_recursion=3, router="expert")
    capacities = [train.warm_capacities(cfg, s, config, torch.device("cpu")) for s in (0, 5, 10)]
    assert capacities[0].tolist() == [1, 1, 1] and capacities[2] is None
    assert capacities[1].tolist() == pytest.approx([1, 5 / 6, 2 / 3])


def test_weight_decay_on_matrices_only():
    model = train.MoR(MoRConfig.preset("nano", n_recursion=3, router="expert", d_model=32, d_ff=48, vocab_size=50))
    decayed, plain = train.make_optimizer(model, train.TrainConfig()).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0 and all(p.dim() == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_accumulation_weighs_tokens_not_micro_batches(data, tmp_path, monkeypatch):
    """Micro-batches with different numbers of valid targets: the sum is the gradient of the mean over all of them."""
    original, batches = train.to_device, []

    def with_holes(rows, eot, device):
        idx, targets, segments = original(rows, eot, device)
        for row, first in zip(targets, rows[:, 0], strict=True):
            row[int(first) % 16 :] = -100  # the same holes however the rows are batched
        batches.append(idx)
        return idx, targets, segments

    monkeypatch.setattr(train, "to_device", with_holes)
    for size in (1, 4):
        more = ("--router", "none", "--steps", 5, "--eval-every", 9, "--micro-batch", size)
        train.main(flags(data, tmp_path / str(size), *more))
    one, four = losses(tmp_path / "1"), losses(tmp_path / "4")
    assert len(one) == 5 and one == pytest.approx(four, abs=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nonfinite_updates_are_skipped_and_named(data, tmp_path, capfd, monkeypatch, optimizer):
    common = ("--eval-every", 2, "--optimizer", optimizer)
    train.main(flags(data, tmp_path, "--steps", 4, *common))
    before = torch.load(tmp_path / "ckpt_000004.pt", weights_only=True)
    original = train.MoR.losses

    def poisoned(self, *args):
        loss, terms = original(self, *args)
        return loss * math.nan, {k: v * (math.nan if k == "aux" else 1) for k, v in terms.items()}

    with monkeypatch.context() as patch:
        patch.setattr(train.MoR, "losses", poisoned)
        message = refused(capfd, flags(data, tmp_path, "--steps", 20, "--max-skipped", 3, *common))
    assert "3 updates in a row" in message and "aux 3 times" in message and "ckpt_000006.pt" in message
    after = torch.load(tmp_path / "ckpt_000006.pt", weights_only=True)
    assert after["skipped"] == 2 and all(torch.equal(before["model"][k], after["model"][k]) for k in before["model"])
    for name, there in before["optimizer"]["state"].items():
        assert all(torch.equal(there[k], after["optimizer"]["state"][name][k]) for k in there)
    train.main(flags(data, tmp_path, "--steps", 8, *common))  # and goes on once the cause is gone
    assert math.isfinite(losses(tmp_path)[8])


@pytest.mark.parametrize("shape", [(24, 24), (64, 160), (192, 64)])
@pytest.mark.parametrize("rank", [2, 16])
def test_orthogonalized_as_newton_schulz_says(shape, rank):
    """Against the iterations on x in fp64, one matrix at a time; bf16 rounds less than there."""

    def iterate(x):
        x = x.mT if x.size(0) > x.size(1) else x
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return (x if x.shape == shape else x.mT).double()

    g = torch.Generator().manual_seed(0)
    low = torch.randn(3, shape[0], rank, generator=g) @ torch.randn(3, rank, shape[1], generator=g)
    x = low + 0.1 * torch.randn(3, *shape, generator=g)  # few large singular values, as gradients have
    exact = torch.stack([iterate(each) for each in x.double()])
    assert relative(train.orthogonalize(x), exact) < 1e-4
    rounded = torch.stack([iterate(each) for each in x.bfloat16()])
    assert relative(train.orthogonalize(x.bfloat16()), exact) < relative(rounded, exact)


def test_vocabulary_of_new_models_is_a_multiple_of_128(data, tmp_path):
    """Data of 40 kinds of token. A run, or a plateau, from before that has 40 goes on with 40."""

    def start(out, *more):
        train.main([flag for flag in flags(data, tmp_path / out, *more) if flag not in ("--vocab-size", "40")])
        return json.loads((tmp_path / out / "config.json").read_text())["model"]["vocab_size"]

    steps = ("--steps", 2, "--warmup", 0, "--cooldown", 0)
    assert start("new", *steps) == 128 and start("new", "--steps", 3, *steps[2:]) == 128
    train.main(flags(data, tmp_path / "old", *steps))
    assert start("old", "--steps", 3, *steps[2:]) == 40
    plateau = tmp_path / "old" / "ckpt_000002.pt"
    assert start("cool", "--steps", 1, "--cooldown-from", plateau) == 40
    other = write_data(tmp_path / "data", vocab_size=256)
    cfg = train.TrainConfig(data=str(other), out=str(tmp_path / "old"))
    assert [train.choose_vocabulary(cfg, n) for n in (256, 128, 129, 50257)] == [256, 128, 256, 50304]
    assert math.isfinite(losses(tmp_path / "new")[3])


def test_micro_batches_fit_the_card(monkeypatch, capfd):
    """By the plan: 18 bytes a parameter, and activations that grow with the micro-batch."""
    config = MoRConfig.preset("360M", n_recursion=3, router="expert")
    with torch.device("meta"):
        P = train.MoR(config).num_params(embedding=True)
    each = train.estimate_activations(config, 1, 2048)
    cuda = torch.device("cuda")

    def fit(room, size=1, **settings):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room / 0.9, room / 0.9))
        cfg = train.TrainConfig(preset="360M", batch_tokens=2**21, **settings)
        return train.fit_micro_batch(cfg, config, train.World(cuda, size=size))

    monkeypatch.setattr(train.dist, "all_reduce", lambda *args: None)
    assert fit(18 * P + 40.5 * each) == 32 and not capfd.readouterr().out
    assert fit(18 * P + 5.5 * each) == 5
    assert re.search(r"micro-batches of 5: 32 sequences at once need [\d.]+ GiB", capfd.readouterr().out)
    assert fit(18 * P + 5.5 * each, checkpoint_recursions=True) > 5
    assert fit(18 * P + 5.5 * each, size=8, parallel="fsdp") > 5
    with pytest.raises(SystemExit):
        fit(18 * P)
    err = capfd.readouterr().err
    assert err.startswith("error: a single sequence of 2048 tokens needs") and "--checkpoint-recursions" in err
    assert train.fit_micro_batch(train.TrainConfig(), config, train.World(torch.device("cpu"))) == 32


def test_muon_is_that_of_torch_and_adamw_elsewhere():
    """Ten steps on random gradients. torch's iterations are in bf16; the matrices differ by as much as that rounds."""
    config = MoRConfig.preset("nano", n_recursion=3, router="expert", d_model=32, d_ff=48, vocab_size=50)
    ours = train.MoR(config)
    theirs = train.MoR(config)
    theirs.load_state_dict(ours.state_dict())
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    cfg = train.TrainConfig(optimizer="muon", dtype="bf16", lr=0.01)
    optimizer = train.make_optimizer(ours, cfg)
    named = dict(theirs.named_parameters())
    layers = {name for name, p in named.items() if p.dim() == 2 and name.split(".")[0] in ("first", "block", "last")}
    assert len(layers) == 4 * 7  # 1 + 2x3 + 1 layers have four of their own, of seven matrices each
    decayed = [p for name, p in named.items() if p.dim() == 2 and name not in layers]
    vectors = [p for p in named.values() if p.dim() == 1]
    groups = [dict(params=decayed, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    muon = torch.optim.Muon([named[name] for name in layers], lr=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for each in (optimizer, adamw, muon):
            each.step()
    for name, p in ours.named_parameters():
        moved = relative(p - before[name], named[name] - before[name])
        assert moved < (0.03 if name in layers else 1e-4), name


def test_tensorboard_and_wandb(data, tmp_path, monkeypatch):
    """Both get the numbers of metrics.jsonl; stand-ins, as the packages are optional."""
    board, weights_and_biases, told, closed = types.ModuleType("board"), types.ModuleType("wandb"), {}, []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            assert directory == str(tmp_path) and purge_step == 1

        def add_scalar(self, name, value, step):
            told.setdefault(step, {})[name] = value

        def close(self):
            closed.append("tensorboard")

    board.SummaryWriter, logged = SummaryWriter, []
    weights_and_biases.init = lambda config, **about: logged.append(config["steps"])
    weights_and_biases.log = lambda row, step: logged.append((step, row))
    weights_and_biases.finish = lambda: closed.append("wandb")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", weights_and_biases)
    monkeypatch.setattr(train, "find_spec", lambda name: True)
    train.main(flags(data, tmp_path, "--steps", 2, "--tensorboard", "--wandb"))
    rows = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in train.read_metrics(tmp_path)]
    assert logged == [2, *((row["step"], row) for row in rows)] and closed == ["tensorboard", "wandb"]
    assert told == {1: rows[0], 2: rows[1] | rows[2]}


@pytest.fixture
def tracker(monkeypatch):
    """A stand-in for wandb that remembers how it was called."""
    wandb, calls = types.ModuleType("wandb"), []
    wandb.init = lambda **about: calls.append(about)
    wandb.log, wandb.finish = lambda row, step: None, lambda: None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(train, "is_installed", lambda name: True)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    wandb.calls = calls
    return wandb


def test_a_resumed_run_is_the_same_run_of_wandb(data, tmp_path, tracker, monkeypatch):
    command = flags(data, tmp_path / "a", "--steps", 1, "--wandb", "--wandb-project", "mine")
    train.main(command)
    train.main([*command, "--steps", "2"])
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "named")
    train.main(flags(data, tmp_path / "b", "--steps", 1, "--wandb"))
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    train.main(flags(data, tmp_path / "c", "--steps", 1, "--wandb"))
    assert [call["project"] for call in tracker.calls] == ["mine", "mine", "theirs", "theirs"]
    assert [call["name"] for call in tracker.calls] == ["a", "a", "named", "named"]
    ids = [call["id"] for call in tracker.calls]
    assert ids[0] == ids[1] != ids[2] and ids[3] == "chosen"
    assert all(call["resume"] == "allow" for call in tracker.calls)


def test_wandb_without_a_key_is_one_line(data, tmp_path, tracker, capfd):
    def refuse(**about):
        raise RuntimeError("No API key configured.\nUse wandb login")

    tracker.init = refuse
    message = refused(capfd, flags(data, tmp_path, "--steps", 1, "--wandb"))
    assert "No API key configured" in message and "WANDB_API_KEY" in message


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_folder_is_no_package(name, data, tmp_path, capfd, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert train.find_spec(name) is not None
    assert f"pip install {name}" in refused(capfd, flags(data, tmp_path / "run", f"--{name}"))


def test_dropped_tokens_are_counted_and_warned_about(data, tmp_path, capsys):
    common = ("--router", "token", "--steps", 3, "--balance", "none", "--router-func", "sigmoid")
    train.main(flags(data, tmp_path / "few", *common, "--capacity", "1,0.2,0.1", "--capacity-slack", 1))
    rows = [row for row in train.read_metrics(tmp_path / "few") if "loss" in row]
    assert max(row["dropped"] for row in rows) > 0.01
    assert capsys.readouterr().out.count("find no slot at a depth that they chose: raise --capacity-slack 1;") == 1
    train.main(flags(data, tmp_path / "all", *common, "--capacity-slack", 3))
    rows = [row for row in train.read_metrics(tmp_path / "all") if "loss" in row]
    assert [row["dropped"] for row in rows] == [0, 0, 0]
    assert "find no slot" not in capsys.readouterr().out


def test_balancing_counts_what_tokens_chose(data, tmp_path, monkeypatch):
    """With scarce slots what ran is another thing."""
    chosen, ran, told = [], [], []
    forward = train.Run.forward

    def recording(run, *args):
        out = forward(run, *args)
        chosen.append([int((out.choice == d).sum()) for d in (1, 2, 3)])
        ran.append([int((out.depth == d).sum()) for d in (1, 2, 3)])
        return out

    monkeypatch.setattr(train.Run, "forward", recording)
    monkeypatch.setattr(train.MoR, "update_balance_bias", lambda model, *args: told.append(args))
    scarce = ("--capacity", "1,0.2,0.1", "--capacity-slack", 1, "--balance-rate", 0.02)
    train.main(flags(data, tmp_path, "--router", "token", "--balance", "bias", "--steps", 3, *scarce))
    halves = np.array(chosen).reshape(3, 2, 3).sum(1).tolist()  # two micro-batches a step
    assert [counts.tolist() for counts, _ in told] == halves and chosen != ran
    assert {rate for _, rate in told} == {0.02}


def test_auxiliary_router_learns_at_a_rate_of_its_own(data, tmp_path):
    more = ("--steps", 3, "--causality", "aux_router", "--aux-lr-factor", 10, "--lr", 1e-3)
    train.main(flags(data, tmp_path, *more, "--warmup", 0, "--cooldown", 0))
    groups = torch.load(tmp_path / "ckpt_000003.pt", weights_only=True)["optimizer"]["param_groups"]
    rates = {name: group["lr"] for group in groups for name in group["params"]}
    assert {name for name, rate in rates.items() if rate == pytest.approx(1e-2)} == {
        f"aux_routers.{r}.net.weight" for r in range(3)
    }
    assert all(rate == pytest.approx(1e-3) for name, rate in rates.items() if not name.startswith("aux"))


def test_router_warnings():
    config = MoRConfig.preset("nano", n_recursion=3, router="expert")
    healthy = dict(selected=[1, 0.6, 0.3], dead=0.0)
    assert train.router_warnings(healthy, config) == []
    assert "recursion 2 takes 0.0%" in train.router_warnings(healthy | dict(selected=[1, 0.6, 0.0]), config)[0]
    assert "90% of the positions" in train.router_warnings(healthy | dict(dead=0.9), config)[0]
    token = MoRConfig.preset("nano", n_recursion=3, router="token")
    assert "choose depth 2" in train.router_warnings(dict(selected=[1, 0.5, 0.5]), token)[0]


# ---------------------------------------------------------------------------------------------------------------------
# stopping and resuming


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    out = tmp_path_factory.mktemp("straight")
    train.main(flags(data, out, "--steps", 12, "--eval-every", 4))
    return out


def same_as(straight, out):
    assert losses(out) == losses(straight)
    one, two = (torch.load(d / "ckpt_000012.pt", weights_only=True) for d in (straight, out))
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    assert all(one[k] == two[k] for k in train.PROGRESS)
    rows = [[r for r in train.read_metrics(d) if "val_loss" in r] for d in (straight, out)]
    assert rows[0] == rows[1]


def test_resume_with_muon_is_exact(data, tmp_path, capfd):
    common = ("--eval-every", 4, "--keep", 9, "--optimizer", "muon")
    train.main(flags(data, tmp_path / "whole", "--steps", 8, *common))
    half = tmp_path / "whole" / "ckpt_000004.pt"
    train.main(flags(data, tmp_path / "half", "--steps", 8, *common, "--resume", half))
    assert losses(tmp_path / "half") == {s: v for s, v in losses(tmp_path / "whole").items() if s > 4}
    whole, resumed = (torch.load(tmp_path / d / "ckpt_000008.pt", weights_only=True) for d in ("whole", "half"))
    assert all(torch.equal(whole["model"][k], resumed["model"][k]) for k in whole["model"])
    capfd.readouterr()
    other = flags(data, tmp_path / "x", "--steps", 8, "--resume", half)
    assert "--optimizer muon, this is adamw" in refused(capfd, other)


@pytest.mark.parametrize("last", [6, 8])
def test_resume_is_exact(data, tmp_path, straight, monkeypatch, capsys, last):
    step = train.train_step

    def stopping(run):  # Ctrl-C in the middle of a step: 6 is not to be saved or evaluated otherwise, 8 is
        if run.progress["step"] == last - 1:
            signal.raise_signal(signal.SIGINT)
        return step(run)

    monkeypatch.setattr(train, "train_step", stopping)
    train.main(flags(data, tmp_path, "--steps", 12, "--eval-every", 4))
    assert f"stopped after step {last}; the same command continues" in capsys.readouterr().out
    monkeypatch.undo()
    train.main(flags(data, tmp_path, "--steps", 12, "--eval-every", 4))
    assert "continuing from" in capsys.readouterr().out
    same_as(straight, tmp_path)


def test_resume_is_exact_compiled_bf16(data, tmp_path):
    """As `make demo` runs: compiled, bf16, two threads with work for both (the gradient of an embedding is a sum over
    tokens, whose order must not depend on them), with a capacity warm-up that the restart falls into."""
    args = [*flags(data, tmp_path / "a", compile=True), *"--steps 12 --save-every 4 --keep 9 --dtype bf16".split()]
    args += "--batch-tokens 2048 --micro-batch 128 --capacity-warmup 6 --eval-every 100".split()
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run(command(*args), check=True, env=env, timeout=900)
    more = ["--out", tmp_path / "b", "--resume", tmp_path / "a" / "ckpt_000004.pt"]
    subprocess.run(command(*args, *more), check=True, env=env, timeout=900)
    assert losses(tmp_path / "b") == {s: v for s, v in losses(tmp_path / "a").items() if s > 4}


def run_and_kill(data, out, delay):
    """Runs train.py and kill -9s it `delay` seconds after it begins to write a checkpoint; None lets it finish."""
    before = set(out.glob("ckpt_*"))
    argv = command(*flags(data, out, "--steps", 12, "--eval-every", 4, "--save-every", 1))
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        if delay is not None:
            deadline = time.monotonic() + 120
            while set(out.glob("ckpt_*")) <= before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(delay)
            process.kill()
        error = process.communicate(timeout=300)[1]
    return process.returncode, error


def test_kill_and_resume_is_exact(data, tmp_path, straight):
    assert run_and_kill(data, tmp_path, 0.05)[0] == -signal.SIGKILL
    code, error = run_and_kill(data, tmp_path, None)
    assert code == 0, error
    assert losses(tmp_path) == losses(straight)


@pytest.mark.soak
def test_twenty_kills(data, tmp_path, straight):
    rng = np.random.default_rng()
    kills = during_save = 0
    for trial in range(20):
        out = tmp_path / str(trial)
        for _ in range(3):
            good = list(out.glob("ckpt_*.pt"))
            delay = rng.choice([0, rng.uniform(0, 0.1)])  # half of the kills aim at the save itself
            kills += run_and_kill(data, out, delay)[0] == -signal.SIGKILL
            during_save += bool(list(out.glob("*.pt.tmp")))
            for path in out.glob("ckpt_*.pt"):
                checkpoint.read_checkpoint(path)
            assert not good or list(out.glob("ckpt_*.pt"))
        code, error = run_and_kill(data, out, None)
        assert code == 0, error
        assert losses(out) == losses(straight)
    print(f"{kills} kills, {during_save} during a save")
    assert during_save


def test_sigterm_saves_and_exits_0(data, tmp_path):
    argv = command(*flags(data, tmp_path, "--steps", 100000, "--save-every", 100000, "--eval-every", 100000))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.terminate()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "the same command continues" in out and "stopping after this step" in err
    assert len(list(tmp_path.glob("ckpt_*.pt"))) == 1


def start_endless(data, out, **how):
    argv = command(*flags(data, out, "--steps", 100000, "--save-every", 100000, "--eval-every", 100000))
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)
    for line in process.stdout:
        if line.startswith("step"):
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("reader", ["stays", "leaves"])
def test_a_closed_terminal_saves(data, tmp_path, reader):
    """Also when what is printed finds no reader any more. (The tests may run under nohup, which is inherited.)"""
    process = start_endless(data, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    if reader == "leaves":
        process.stdout.close()
        process.stderr.close()
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=120)
    assert len(list(tmp_path.glob("ckpt_*.pt"))) == 1


def test_nohup_is_obeyed(data, tmp_path):
    process = start_endless(data, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    lines = [process.stdout.readline() for _ in range(20)]
    assert all(line.startswith("step") for line in lines)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_one_run_at_a_time_in_a_directory(data, tmp_path, capfd):
    process = start_endless(data, tmp_path)
    message = refused(capfd, flags(data, tmp_path, "--steps", 4))
    assert f"in use by process {process.pid} on" in message
    process.kill()  # which leaves the file behind, but not the lock
    process.communicate()
    train.main(flags(data, tmp_path, "--steps", 4))
    train.main(flags(data, tmp_path, "--steps", 5))  # nor does a run that ended
    assert max(losses(tmp_path)) == 5


@pytest.mark.parametrize("name", ["run_$LR_$BS", "$a^{", "a\x1b[31mred\x9b", "caf\udce9", r"50%_\frac"])
def test_names_of_directories_are_only_names(data, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(train, "plot", PLOT)
    train.main(flags(data, tmp_path / name, "--steps", 2))
    out = capsys.readouterr().out
    assert (tmp_path / name / "loss.png").exists() and "everything is in" in out
    assert not any(ord(c) < 32 and c != "\n" or 127 <= ord(c) < 160 for c in out)


def test_second_ctrl_c_stops_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stop = train.StopRequest()
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # the terminal's, torchrun's, and torchrun's next
        stop.handle(number, None)
    assert stop.since and not codes
    stop.since -= 2
    stop.handle(signal.SIGTERM, None)
    assert not codes
    stop.handle(signal.SIGINT, None)
    assert codes == [130]


def test_finished_run_is_evaluated_again_and_changed_flags_are_named(data, tmp_path, straight, capsys):
    before = (straight / "ckpt_000012.pt").read_bytes()
    train.main(flags(data, straight, "--steps", 12, "--eval-every", 4))
    assert "validation, nats per token" in capsys.readouterr().out
    assert (straight / "ckpt_000012.pt").read_bytes() == before
    start = straight / "ckpt_000012.pt"
    changed = flags(data, tmp_path, "--steps", 14, "--resume", start, "--lr", "1e-4", "--weight-decay", "0.3")
    train.main(changed)
    out = capsys.readouterr().out
    assert f"continuing from {start}; changed since:" in out
    assert "steps 12 -> 14" in out and "lr 0.003 -> 0.0001" in out and "weight_decay 0.1 -> 0.3" in out
    assert list(losses(tmp_path)) == [13, 14]
    groups = torch.load(tmp_path / "ckpt_000014.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    train.main(changed)  # the same command once more: what it has done since counts
    assert f"continuing from {tmp_path / 'ckpt_000014.pt'}\n" in capsys.readouterr().out


def test_refuses_another_model_tokenizer_or_past(data, tmp_path, straight, capfd):
    again = flags(data, straight, "--steps", 12)
    assert "d_ff 24 there, 32 here" in refused(capfd, [*again, "--d-ff", 32])
    assert "12 steps already" in refused(capfd, [*again, "--steps", 5])
    other = write_data(tmp_path / "other", tokenizer="another")
    assert "was trained with tokenizer" in refused(capfd, flags(other, straight, "--steps", 12))
    assert "later ckpt_000012.pt" in refused(capfd, [*again, "--resume", straight / "ckpt_000008.pt"])


def test_cooldown_from_a_plateau(data, tmp_path, capfd):
    """A plateau left at step 8 for a cool-down of 4 is the run of 12 steps with that cool-down, to the bit."""
    common = ("--eval-every", 4, "--keep", 9)
    plateau = ("--lr", 0.01, "--warmup", 5, *common)
    train.main(flags(data, tmp_path / "whole", "--steps", 12, "--cooldown", 4, *plateau))
    train.main(flags(data, tmp_path / "plateau", "--steps", 16, "--cooldown", 0, *plateau))
    start = tmp_path / "plateau" / "ckpt_000008.pt"
    capfd.readouterr()
    train.main(flags(data, tmp_path / "cool", "--steps", 4, "--cooldown-from", start, "--warmup", 5, *common))
    assert "changed since: steps 16 -> 12, cooldown 0 -> 4\n" in capfd.readouterr().out  # the rate is the plateau's
    whole, cool = losses(tmp_path / "whole"), losses(tmp_path / "cool")
    assert cool == {s: whole[s] for s in (9, 10, 11, 12)}
    train.main(flags(data, tmp_path / "cool", "--steps", 4, "--cooldown-from", start, *common))  # resumes itself
    cooling = ("--steps", 4, "--cooldown-from", tmp_path / "cool" / "ckpt_000012.pt")
    assert "is not on a plateau" in refused(capfd, flags(data, tmp_path / "x", *cooling))
    assert "an --out of its own" in refused(capfd, flags(data, tmp_path / "cool", *cooling))


# ---------------------------------------------------------------------------------------------------------------------
# weights to start from


def write_llama(directory, **changes):
    """A tiny random Llama, as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=5, initializer_range=0.3)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True)
    LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes))).save_pretrained(directory)
    return directory


def uptrain(data, out, start, *more):
    """Flags without those of a model."""
    return [*flags(data, out, "--init-from", start, *more)[len(TINY) :]]


def first_batch(data):
    rows = np.concatenate(list(train.Blocks(Shards(data, "train"), 16, 0).batches(0, 4, 4)))
    return train.to_device(rows, None, torch.device("cpu"))[:2]


def test_uptraining_from_a_llama(data, tmp_path, capsys):
    """Vanilla: the first loss is that of transformers. MoR-2: that of from_pretrained; the same command resumes."""
    from transformers import LlamaForCausalLM

    llama, (idx, targets) = write_llama(tmp_path / "llama"), first_batch(data)
    train.main(uptrain(data, tmp_path / "vanilla", llama, "--steps", 1))
    logits = LlamaForCausalLM.from_pretrained(llama)(idx).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten()).item()
    assert losses(tmp_path / "vanilla")[1] == pytest.approx(expected, abs=1e-4)

    more = "--steps 4 --eval-every 2 --n-recursion 2 --router expert --init average".split()
    train.main(uptrain(data, tmp_path / "mor", llama, *more))
    torch.manual_seed(0)
    model = train.MoR.from_pretrained(llama, "average", n_recursion=2, router="expert")
    assert losses(tmp_path / "mor")[1] == pytest.approx(model(idx, targets).loss.item(), abs=1e-5)
    assert json.loads((tmp_path / "mor" / "config.json").read_text())["model"]["n_layer"] == 6  # 1 + 2x2 + 1
    assert "llama, expert router, 1+2x2+1 layers" in capsys.readouterr().out
    train.main([*uptrain(data, tmp_path / "mor", llama, *more), "--steps", "5"])
    assert "continuing from" in capsys.readouterr().out and list(losses(tmp_path / "mor")) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("case", ["expert_mc3", "token_mc3_softmax"])
def test_uptraining_from_the_authors_checkpoint(case, data, tmp_path):
    """Only the directory is named; router and recursions are the file's, and so is the first loss."""
    llama = write_directory(tmp_path / "theirs", golden_weights(case), "bin")
    more = ("--batch-tokens", 256, "--micro-batch", 4, "--steps", 2, "--capacity-slack", 3)
    train.main(uptrain(data, tmp_path / "up", llama, *more))
    config = json.loads((tmp_path / "up" / "config.json").read_text())["model"]
    assert (config["router"], config["n_recursion"]) == (case.split("_")[0], 3)
    rows = np.concatenate(list(train.Blocks(Shards(data, "train"), 64, 0).batches(0, 4, 4)))
    idx, targets, _ = train.to_device(rows, None, torch.device("cpu"))
    model = train.MoR.from_pretrained(llama, capacity_slack=3.0)
    assert losses(tmp_path / "up")[1] == pytest.approx(model(idx, targets).loss.item(), abs=1e-4)


def write_byte_tokenizer(directory, first=0):
    lines = [base64.b64encode(bytes([(b + first) % 256])) + b" %d\n" % b for b in range(256)]
    (directory / "bytes.tiktoken").write_bytes(b"".join(lines))


def test_uptraining_from_a_run_and_its_export(tmp_path, capfd):
    data = write_data(tmp_path / "data", vocab_size=257, tokenizer="bytes.tiktoken", eot=256)
    write_byte_tokenizer(data)
    out, exported = tmp_path / "run", tmp_path / "exported"
    train.main(flags(data, out, "--steps", 3, "--vocab-size", 257))
    checkpoint.export(str(out), exported)
    torch.manual_seed(0)
    model = train.MoR.from_pretrained(exported)
    expected = model(*first_batch(data)).loss.item()
    for start in (out, out / "ckpt_000003.pt", exported):
        train.main(uptrain(data, tmp_path / "up" / start.name, start, "--steps", 1))
        assert losses(tmp_path / "up" / start.name) == {1: pytest.approx(expected, abs=1e-5)}
    up = lambda start, *more: uptrain(data, tmp_path / "x", start, *more)  # noqa: E731
    assert "do not fit the model flags" in refused(capfd, up(out, "--n-recursion", 2, "--n-layer", 4))
    assert "must be what the weights" in refused(capfd, up(exported, "--d-model", 32))
    other = write_data(tmp_path / "other", vocab_size=257, tokenizer="other.tiktoken")
    assert "was trained with tokenizer bytes" in refused(capfd, uptrain(other, tmp_path / "x", out))
    write_byte_tokenizer(data, first=1)
    for start in (out, exported):
        assert "the data's tokenizer bytes" in refused(capfd, up(start))
    assert not (tmp_path / "x").exists()


def test_uptraining_with_too_small_a_vocabulary(data, tmp_path, capfd):
    llama = write_llama(tmp_path / "llama", vocab_size=30)
    capfd.readouterr()  # the progress bar of transformers
    assert "a vocabulary of 30 is below the 40 of" in refused(capfd, uptrain(data, tmp_path / "x", llama))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def test_newest_and_best_are_kept(data, tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.5, 2.4, 2.6, 2.7])
    original = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run, rows: original(run, rows) | dict(val_loss=next(values)))
    train.main(flags(data, tmp_path, "--steps", 6, "--eval-every", 1))
    assert sorted(p.name for p in tmp_path.glob("ckpt_*")) == ["ckpt_000002.pt", "ckpt_000005.pt", "ckpt_000006.pt"]
    assert torch.load(tmp_path / "ckpt_000006.pt", weights_only=True)["best_step"] == 2


def test_pruning_spares_what_is_not_its_own(tmp_path):
    """A damaged file of a later step, which the run could not continue from, does not displace the newest good one."""
    run = types.SimpleNamespace(out=tmp_path, cfg=types.SimpleNamespace(keep=1, keep_at=(10,)))
    for name in ("ckpt_000020.pt", "ckpt_of_mine.pt"):
        (tmp_path / name).write_bytes(b"damaged")
    for step in (9, 10, 11):
        train.write_checkpoint(run, dict(step=step, best_step=-1))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["ckpt_000010.pt", "ckpt_000011.pt", "ckpt_000020.pt", "ckpt_of_mine.pt"]
    assert checkpoint.read_checkpoint(tmp_path / "ckpt_000011.pt")["step"] == 11


def test_damage_is_found(straight, tmp_path):
    """Truncated at 50 lengths, and with one byte changed at 50 places, half of them in the directory at its end, which
    holds the names, sizes and offsets of the tensors."""
    whole, path = (straight / "ckpt_000012.pt").read_bytes(), tmp_path / "ckpt_000001.pt"
    assert checkpoint.read_checkpoint(straight / "ckpt_000012.pt")["step"] == 12
    rng = np.random.default_rng(0)
    for i in range(100):
        place = int(rng.integers(len(whole) - 12000 if i % 4 == 1 else 0, len(whole)))
        data = bytearray(whole)
        data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data if i % 2 else whole[:place])
        with pytest.raises(train.DAMAGE):
            checkpoint.read_checkpoint(path)


def test_falls_back_to_the_checkpoint_before(data, tmp_path, straight, capfd):
    train.main(flags(data, tmp_path, "--steps", 12, "--eval-every", 4))
    newest = tmp_path / "ckpt_000012.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    train.main(flags(data, tmp_path, "--steps", 12, "--eval-every", 4))
    out, err = capfd.readouterr()
    assert "warning: checkpoint" in err and "ckpt_000012.pt is damaged" in err and "ckpt_000008.pt" in out
    same_as(straight, tmp_path)
    for path in tmp_path.glob("ckpt_*.pt"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit):
        train.main(flags(data, tmp_path, "--steps", 12))
    assert "every checkpoint in" in capfd.readouterr().err
    assert "is damaged" in refused(capfd, flags(data, tmp_path / "b", "--resume", newest))


def test_full_disk_leaves_earlier_checkpoints(data, tmp_path, straight):
    """The file system refuses to let the second checkpoint grow (EFBIG, for want of a full disk without root)."""
    size = (straight / "ckpt_000012.pt").stat().st_size
    train.main(flags(data, tmp_path, "--steps", 4, "--eval-every", 4))
    good = (tmp_path / "ckpt_000004.pt").read_bytes()
    argv = command(*flags(data, tmp_path, "--steps", 12, "--eval-every", 4))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))  # noqa: E731
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot save the checkpoint of step 8")
    assert [p.name for p in tmp_path.glob("ckpt_*")] == ["ckpt_000004.pt"]
    assert (tmp_path / "ckpt_000004.pt").read_bytes() == good
    train.main(flags(data, tmp_path, "--steps", 12, "--eval-every", 4))


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small tmpfs needs root on Linux")
def test_full_tmpfs(data, tmp_path, straight):
    size = (straight / "ckpt_000012.pt").stat().st_size
    mounted = tmp_path / "small"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * size + 40000}", "none", str(mounted)]).returncode:
        pytest.skip("mount is not allowed here")
    try:
        argv = command(*flags(data, mounted / "run", "--steps", 12, "--eval-every", 4, "--save-every", 2, "--keep", 5))
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert os.strerror(errno.ENOSPC) in done.stderr or "cannot save the checkpoint" in done.stderr
        kept = sorted((mounted / "run").glob("ckpt_*"))
        assert kept and all(checkpoint.read_checkpoint(path) for path in kept)
    finally:
        subprocess.run(["umount", str(mounted)])
