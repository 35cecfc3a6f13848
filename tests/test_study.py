"""study.py: the plan, budgets, the learning-rate rule, the queue and its rows, the report."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from test_train import write_data

import study
import train
from model import MoR

TINY = "--sizes 16,24 --main 16 --block-size 16 --batch-tokens 64 --eval-tokens 320"
TINY += " --rates 6e-3,1.2e-2,2.4e-2 --sweep-seeds 1"
EXTRA = "--extra=--no-compile --device cpu --dtype fp32"
SMALL = {  # tables of a study of two kinds of model
    "STAGES": (("adamw", ("vanilla", "MoR-3"), "main", 1, (0,)),),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The flags of a tiny study, in a directory of its own that holds data."""
    write_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return [*TINY.split(), EXTRA, "--budgets", "1.2e9,2.4e9", "--data", "data", "--rows", "rows.jsonl"]


def read(place, *more):
    return study.read_flags(["plan", *place, *more])


def made_up(args, arm, loss, lr=1.2e-2, seed=0, width=16, budget=1.2e9, optimizer="adamw", **more):
    """A row as a run leaves it, with this loss."""
    facts = study.describe_run(args, study.Spec(arm, width, budget, lr, optimizer, seed))[1]
    results = dict(
        loss=loss, topk=None, fastest=1000, wall=10, alone=True, machine="a", commit="c", date="d", command="x"
    )
    return facts | results | more


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(place, what="run", *more, tables=SMALL):
    """study.py in a process of its own, with other tables."""
    program = f"import study; vars(study).update({tables!r}); study.main()"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, "-c", program, what, *more, *place], env=env, **pipes)


def finish(process):
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    return output


# ----------------------------------------------------------------------------------------------------------------------
# what a run is


@pytest.mark.parametrize("budgets", ["1e13,3e13,1e14,3e14", "4e13,4.7e14"])
def test_budgets_are_met_and_commands_say_the_same_model(tmp_path, monkeypatch, budgets):
    write_data(tmp_path / "data", vocab_size=8192)
    monkeypatch.chdir(tmp_path)
    args = study.read_flags(["plan", "--data", "data", "--rows", "rows.jsonl", "--budgets", budgets])
    specs = study.plan(args, [])
    assert {spec.budget for spec in specs} == set(args.budgets)
    assert {spec.arm for spec in specs} == set(study.arms(8))
    for spec in {replace(spec, lr=1e-3) for spec in specs}:
        line, facts = study.describe_run(args, spec)
        cfg, given = train.read_flags(line)
        model = MoR(train.initial_model(cfg, given, dict(vocab_size=8192))[0])
        assert model.config == study.model_config(args, spec)
        spent = 3 * model.flops_per_token(256, head=True) * cfg.steps * cfg.batch_tokens
        assert facts["flops"] == pytest.approx(spent) and abs(spent / spec.budget - 1) <= 0.01
        assert facts["flops_paper"] > facts["flops"] or "shared" in spec.arm
        assert facts["params"] == model.num_params()
        assert (cfg.lr, cfg.seed, cfg.optimizer) == (spec.lr, spec.seed, spec.optimizer)
        assert cfg.cooldown == pytest.approx(0.2 * cfg.steps, abs=4)
        smallest = study.describe_run(args, replace(spec, budget=min(args.budgets)))[1]
        assert cfg.warmup == smallest["warmup"] == round(0.05 * smallest["steps"])


def test_arms_are_what_their_names_say(place):
    args = read(place)
    config = {arm: study.model_config(args, study.Spec(arm, 16, 1.2e9, 1e-3)) for arm in study.arms(8)}
    cost = {arm: study.count_costs(config[arm]) for arm in config}
    mor = cost["MoR-3"]
    for arm in ("recursive at mean depth", "vanilla at mean depth"):
        assert cost[arm]["flops_per_token"] == pytest.approx(mor["flops_per_token"], rel=0.05)
    for arm in ("recursive-3", "recursive at mean depth", "vanilla at equal parameters", "MoR-2 of MoR-3 blocks"):
        assert cost[arm]["params"] == pytest.approx(mor["params"], rel=0.01)
    for arm in ("MoR-3 random", "MoR-3 position", "MoR-3 gate alone"):
        assert cost[arm]["params"] == mor["params"]
    for arm in ("MoR-3 random", "MoR-3 position", "MoR-3 token", "MoR-3 auxiliary 16e-3"):
        assert config[arm].capacities == config["MoR-3"].capacities
    assert set(config["MoR-3 gate alone"].capacities) == {1.0}
    assert cost["MoR-3 gate alone"]["flops_per_token"] == cost["recursive-3"]["flops_per_token"]


@pytest.mark.parametrize("arm", study.CONTROLS)
def test_controls_are_causal_and_decode_as_they_read(place, arm):
    config = study.model_config(read(place), study.Spec(arm, 32, 1.2e9, 1e-3))
    torch.manual_seed(0)
    model = MoR(config).eval()
    idx = torch.randint(config.vocab_size, (2, 12))
    whole = model(idx, routing="causal").logits
    later = idx.clone()
    later[:, 8:] = (later[:, 8:] + 1) % config.vocab_size
    assert (model(later, routing="causal").logits[:, :8] - whole[:, :8]).abs().max() < 1e-5

    cache = model.make_cache(2, 12, slack=3.0)
    logits = [model.prefill(idx[:, :5], torch.tensor([5, 5]), cache)]
    logits += [model.decode(idx[:, t], cache) for t in range(5, 12)]
    assert (torch.stack(logits, 1) - whole[:, 4:]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--budgets 1e8", "1e+08 FLOPs is"),
        ("--budgets 1e9,2e8", "2e+08 FLOPs is"),
        ("--main 40", "--main 40"),
        ("--layers 9", "--layers 9"),
        ("--data nowhere", "nowhere"),
    ],
)
def test_mistakes_are_one_line(place, capfd, flags, words):
    with pytest.raises(SystemExit) as stop:
        study.main(["plan", *place, *flags.split()])
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


# ----------------------------------------------------------------------------------------------------------------------
# learning rates and the order of runs


@pytest.mark.parametrize(
    "losses, wanted, best",
    [
        ({}, {6e-3, 1.2e-2, 2.4e-2}, None),
        ({6e-3: 3.0, 1.2e-2: 2.0}, {6e-3, 1.2e-2, 2.4e-2}, None),
        ({6e-3: 3.0, 1.2e-2: 2.0, 2.4e-2: 3.0}, {6e-3, 1.2e-2, 2.4e-2}, 1.2e-2),
        ({6e-3: 3.0, 1.2e-2: 2.0, 2.4e-2: None}, {6e-3, 1.2e-2, 2.4e-2}, 1.2e-2),
        ({6e-3: 1.0, 1.2e-2: 2.0, 2.4e-2: 3.0}, {3e-3, 6e-3, 1.2e-2, 2.4e-2}, None),
        ({6e-3: 3.0, 1.2e-2: 2.0, 2.4e-2: 1.0, 4.8e-2: 2.0}, {6e-3, 1.2e-2, 2.4e-2, 4.8e-2}, 2.4e-2),
    ],
)
def test_the_sweep_goes_on_while_the_best_rate_is_at_its_edge(place, losses, wanted, best):
    args = read(place)
    rows = [made_up(args, "MoR-3", loss, lr) for lr, loss in losses.items()]
    rows += [made_up(args, "MoR-3", 0.1, 6e-3, seed=1), made_up(args, "vanilla", 0.1, 6e-3)]  # others do not count
    assert set(study.sweep(args, rows, "MoR-3", "adamw")[1]) == wanted
    assert study.best_rate(args, rows, "MoR-3", "adamw") == best
    assert study.best_rate(args, rows, "MoR-3 random", "adamw") == best  # it takes the rate of MoR-3
    specs = study.plan(args, rows)
    assert {spec.lr for spec in specs if spec.arm == "MoR-3" and spec.budget == 2.4e9} >= {best}
    keys = [spec.key for spec in specs if spec.lr is not None]
    assert len(set(keys)) == len(keys)


# ----------------------------------------------------------------------------------------------------------------------
# rows


@pytest.mark.parametrize("torn", [b'{"key": "b", "lo', b'{"key": "b"}', b"\xff\x00"])
def test_a_torn_line_is_no_row_and_harms_no_other(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    study.append_row(path, dict(key="a"))
    with open(path, "ab") as f:
        f.write(torn)
    assert [row["key"] for row in study.read_rows(path)] == ["a"]
    study.append_row(path, dict(key="c"))
    study.append_row(path, dict(key="d"))
    assert [row["key"] for row in study.read_rows(path)] == ["a", "c", "d"]


@pytest.mark.parametrize("flags", ["--layers 14", "--batch-tokens 32", "--budgets 1.2e9,9e8", "--eval-tokens 640"])
def test_rows_of_other_flags_are_refused(place, capfd, tmp_path, flags):
    rows = [made_up(read(place), "MoR-3", 3.0, eval_tokens=320)]
    write_rows(tmp_path / "rows.jsonl", rows)
    study.check_rows(read(place))
    with pytest.raises(SystemExit):
        study.main(["run", *place, *flags.split()])
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "there" in err and rows[0]["key"] in err, err


# ----------------------------------------------------------------------------------------------------------------------
# the queue


def test_a_killed_queue_loses_and_repeats_nothing(place, tmp_path):
    """kill -9 of the queue while its train.py goes on, and of both; then the queue goes on to the end."""
    place, killed = [*place, "--rates", "1.2e-2"], []
    for victims in ("queue", "both", "queue"):
        queue = start(place)
        fresh, end, children = time.time(), time.monotonic() + 120, []
        while time.monotonic() < end and queue.poll() is None:  # until it trains, beside what the last one left running
            children = subprocess.run(["pgrep", "-P", str(queue.pid)], capture_output=True, text=True).stdout.split()
            metrics = (tmp_path / "out" / "study").glob("*/metrics.jsonl")
            if children and any(f.stat().st_mtime > fresh and f.stat().st_size for f in metrics):
                break
            time.sleep(0.05)
        assert queue.poll() is None and children
        queue.kill()
        if victims == "both":
            os.kill(int(children[0]), signal.SIGKILL)
        killed.append(queue)
    finish(start(place))
    for queue in killed:
        queue.communicate()
    rows = study.read_rows(tmp_path / "rows.jsonl")
    arms_and_budgets = sorted((row["arm"], row["budget"]) for row in rows)
    assert arms_and_budgets == [("MoR-3", 1.2e9), ("MoR-3", 2.4e9), ("vanilla", 1.2e9), ("vanilla", 2.4e9)]
    assert finish(start(place)) == ""  # nothing is left
    assert "4 of 4 runs are done" in finish(start(place, "status"))
    reader = start(place, "plan")
    reader.stdout.close()  # as head does
    assert reader.wait(timeout=300) == -signal.SIGPIPE

    # the larger budget went on from the smaller one's plateau: from nothing it comes to the same weights
    row = next(row for row in rows if (row["arm"], row["budget"]) == ("MoR-3", 2.4e9))
    assert row["continued_from"] == study.Spec("MoR-3", 16, 1.2e9, 1.2e-2).key
    again = study.repeat(read(place), row, ROOT, tmp_path / "again")
    assert again == {name: row[name] for name in again}
    assert {x.get("threshold") for x in row["scaling"]} > {None, 0.1, 0.9} and "loss" in row["difficulty"]


def test_a_failing_run_is_named_and_the_others_go_on(place, capfd, monkeypatch):
    args = read(place)
    asked = []

    def train_one(args, spec, lock):
        asked.append(spec.key)
        if spec.lr == 6e-3:
            raise RuntimeError("train.py ended with status 1: no space")
        return made_up(args, spec.arm, 1.0, spec.lr, seed=spec.seed, width=spec.width, budget=spec.budget)

    monkeypatch.setattr(study, "train_one", train_one)
    for name, table in SMALL.items():
        monkeypatch.setattr(study, name, table)
    with pytest.raises(SystemExit) as stop:
        study.run(args)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and "no space" in err and "lr0.006" in err
    assert len(asked) == len(set(asked)) == 6  # the sweep; what depends on it waits


def test_confidence_exit_lies_between_the_depths(place):
    config = study.model_config(read(place), study.Spec("recursive-3", 32, 1.2e9, 1e-3))
    torch.manual_seed(0)
    model = MoR(config).eval()
    rows = study.Shards("data", "val").blocks(16, 320)
    never, always = study.exit_by_confidence(model, rows, limits=(-1.0, 100.0))
    shallow, deep = (study.measure(model, rows, "causal", max_depth=d).nll.mean(dtype=float) for d in (1, 3))
    assert never["nll"] == pytest.approx(deep, abs=1e-5) and never["depth"] == 3
    assert always["nll"] == pytest.approx(shallow, abs=1e-5) and always["depth"] == 1
    head = 2 * config.d_model * config.vocab_size
    whole = model.flops_per_token(16, head=True)
    assert always["flops_per_token"] == pytest.approx(model.flops_per_token(16, head=True, fractions=[1, 0, 0]))
    assert never["flops_per_token"] > whole + 2 * head  # it looked twice before the last recursion


def test_rank_correlation_within_strata():
    """Against pandas over all; and a relation that only the strata make disappears within them."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, 200), rng.normal(size=200)
    b[:50] = 0.0  # ties
    assert study.correlate_ranks(a, b, np.zeros(200)) == pytest.approx(
        pd.DataFrame(dict(a=a, b=b)).corr("spearman").iloc[0, 1]
    )
    strata = np.repeat([0, 1], 500)
    a, b = strata * 5 + rng.integers(0, 3, 1000), strata * 5 + rng.normal(size=1000)
    assert study.correlate_ranks(a, b, np.zeros(1000)) > 0.5
    assert abs(study.correlate_ranks(a, b, strata)) < 0.1
    assert study.correlate_ranks(np.ones(9), b[:9], np.zeros(9)) is None


def test_a_rate_is_judged_by_the_mean_of_the_seeds(place):
    """The best of the first seed ruins the second one; until every rate has both, nothing is decided."""
    args = read(place, "--sweep-seeds", "2")
    losses = {6e-3: (3.0, 3.0), 1.2e-2: (2.9, 2.9), 2.4e-2: (2.5, 3.5)}
    rows = []
    for lr, pair in losses.items():
        rows += [made_up(args, "MoR-3", loss, lr, seed=seed) for seed, loss in enumerate(pair)]
    assert study.best_rate(args, rows, "MoR-3", "adamw") == 1.2e-2
    assert study.best_rate(args, rows[:-1], "MoR-3", "adamw") is None
    swept = [s for s in study.plan(args, []) if (s.arm, s.optimizer) == ("MoR-3", "adamw") and s.lr is not None]
    assert [(spec.lr, spec.seed) for spec in swept] == [(lr, seed) for seed in (0, 1) for lr in (1.2e-2, 2.4e-2, 6e-3)]


# ----------------------------------------------------------------------------------------------------------------------
# the report


def test_report_from_fixed_rows(place, tmp_path):
    args = read(place)
    rows = [made_up(args, arm, loss, lr) for arm in ("vanilla", "MoR-3") for lr, loss in ((6e-3, 3.5), (2.4e-2, 3.6))]
    rows += [made_up(args, "vanilla", 3.0 + 0.1 * seed, seed=seed) for seed in range(3)]
    rows += [made_up(args, "MoR-3", x + 0.1 * seed, seed=seed, topk=3.3) for seed, x in enumerate((2.9, 2.7, 2.8))]
    rows += [made_up(args, "vanilla", 2.5, width=24), made_up(args, "MoR-3", None, width=24)]
    curve = [dict(max_depth=1, nll=3.0, flops_per_token=2e4), dict(threshold=0.1, nll=2.9, flops_per_token=3e4)]
    rows.append(made_up(args, "MoR-3", 2.6, budget=2.4e9, scaling=curve))
    write_rows(tmp_path / "rows.jsonl", rows)
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- study -->\nobsolete\n<!-- /study -->\nafter\n")
    study.main(["report", *place, "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "obsolete" not in text
    for name in re.findall(r"\(assets/(\S+?)\)", text):
        assert (tmp_path / "assets" / name).read_bytes()[:4] == b"\x89PNG"
    assert len(re.findall(r"\(assets/", text)) == 3
    # differences of seeds 0, 1, 2: -0.1, -0.3, -0.2; t(2) 4.30, standard deviation 0.1
    assert "| MoR-3 − vanilla | adamw | -0.200 ± 0.248 (3) |" in text
    assert "| vanilla | 2.500 (24) |  |" in text and "| MoR-3 | 2.900 (16) | 2.600 (16) |" in text
    assert "| MoR-3 | adamw | 3.500 | **2.900** | 3.600 | yes |" in text
    again = text
    study.main(["report", *place, "--page", str(page)])
    assert page.read_text() == again

    page.write_text("no markers\n")
    with pytest.raises(SystemExit):
        study.main(["report", *place, "--page", str(page)])
    assert page.read_text() == "no markers\n"
