"""bench.py: every command in its quick form, the shape of its JSON, and counts against numbers worked out by hand."""

import json
import re
import shlex
import statistics
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT

import bench
from engine import Engine
from model import MoR, MoRConfig

ABOUT = {"commit", "machine", "torch", "device", "dtype", "threads", "command", "load"}


def run(capsys, *argv: str) -> tuple[dict, str]:
    """The last line, parsed, and all of the output of `bench.py ARGV`."""
    bench.main(list(argv))
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def check_schema(result: dict, command: str) -> None:
    assert result["bench"] == command and set(result["about"]) == ABOUT
    assert result["about"]["torch"] == torch.__version__
    assert result["about"]["command"].startswith(f"python bench.py {command}")
    assert isinstance(result["warnings"], list) and result["rows"]


# ---- cost: computed, so exact


@pytest.fixture(scope="module")
def cost_360M() -> dict:
    argv = [sys.executable, str(ROOT / "bench.py"), "cost", "360M", "--devices", "4", "--batch", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"by": {row["variant"]: row for row in result["rows"]}}


def test_cost_counts_by_hand(cost_360M):
    """360M vanilla: 32 layers of D = 960, 15/5 heads of 64, d_ff 2560, vocabulary 49152, T = 2048."""
    check_schema(cost_360M, "cost")
    row = cost_360M["by"]["vanilla"]
    layer = 2 * 960 * 960 + 2 * 960 * 320 + 3 * 960 * 2560  # q, o; k, v; gate, up, down
    assert row["params"] == 32 * (layer + 2 * 960) + 960
    assert row["params_with_embedding"] == row["params"] + 49152 * 960
    attention = 2 * 2048 * 960  # scores and values, 2 FLOPs each, half of T keys
    assert row["flops"] == 32 * (2 * layer + attention)
    assert row["flops_exact"] == row["flops"] + 2 * 960 * 49152
    assert row["attention"] == pytest.approx(attention / (2 * layer + attention))
    assert row["kv_per_token"] == 32 * 2 * 320 * 2  # layers, K and V, width, bf16
    three = cost_360M["by"]["expert-3"]  # 1 + 10x3 + 1 layers; a third of the recursions' capacity is 1, 2/3, 1/3
    k = [2048, 1365, 682]
    block = sum(n / 2048 * (2 * layer + n / 2048 * attention) for n in k)
    assert three["flops"] == pytest.approx(2 * (2 * layer + attention) + 10 * block)
    assert three["flops_exact"] == pytest.approx(three["flops"] + 2 * 960 * 49152 + 3 * 2 * 960)  # head; three routers


def test_cost_reproduces_the_paper(cost_360M):
    by = cost_360M["by"]
    for variant, params, flops in (("expert-2", 167e6, 0.745), ("expert-3", 118e6, 0.667), ("expert-4", 98e6, 0.667)):
        assert by[variant]["params"] == pytest.approx(params, abs=0.5e6) and by[variant]["paper_params"] == params
        assert by[variant]["flops_ratio"] == pytest.approx(flops, abs=0.006) and by[variant]["paper_ratio"] == flops
    for variant, kept, read in (("expert-3", 4 / 6, 4 / 6), ("share-3", 1 / 3, 1.0), ("expert-4", 5 / 8, 5 / 8)):
        assert by[variant]["kv_shared_layers"] == pytest.approx(kept, abs=1e-3)
        assert by[variant]["kv_read"] == pytest.approx(read, abs=1e-3)


def test_cost_by_the_papers_convention(cost_360M):
    """With K and V counted at full width, the released 360M runs all come to the 16.5 EFLOPs that the paper gives them,
    and shared K/V saves FLOPs; at the true width it does not."""
    by = cost_360M["by"]
    for variant, ratio in {"expert-2": 0.7479, "expert-3": 0.6665, "expert-4": 0.6639, "share-3": 0.6433}.items():
        assert by[variant]["flops_paper_ratio"] == pytest.approx(ratio, abs=1e-3)
    steps = {"vanilla": 9438, "expert-2": 12619, "expert-3": 14161, "expert-4": 14216, "share-3": 14672}  # released
    for variant, n in steps.items():
        assert by[variant]["flops_paper"] * n * 1024 * 2048 == pytest.approx(16.50e18, rel=1e-3)
    layer = 4 * 960 * 960 + 3 * 960 * 2560  # q, k, v, o at full width; gate, up, down
    assert by["vanilla"]["flops_paper"] == 32 * (2 * layer + 2 * 2048 * 960)
    assert by["share-3"]["flops_paper"] < by["expert-3"]["flops_paper"]
    assert by["share-3"]["flops"] > by["expert-3"]["flops"]


def test_plan_by_hand(cost_360M):
    ddp, fsdp = (row for row in cost_360M["plans"] if row["name"].startswith("360M vanilla"))
    P = cost_360M["by"]["vanilla"]["params_with_embedding"]
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer"]) == (4 * P, 4 * P, 8 * P)
    assert fsdp["optimizer"] == 2 * P and fsdp["weights"] == 5 * P  # a quarter, and the gathered whole
    assert ddp["sent"] == fsdp["sent"] == 6 * P  # 2 (n-1)/n of fp32
    assert ddp["training"] == 18 * P + ddp["activations"]
    assert ddp["kv_cache"] == 2 * 2048 * 32 * 2 * 320 * 2


# ---- what is measured


def test_quick_train(tmp_path, capsys):
    file = tmp_path / "train.json"
    result, text = run(capsys, "train", "--quick", "--json", str(file))
    check_schema(result, "train")
    assert json.loads(file.read_text()) == result
    assert [row["name"] for row in result["rows"]] == ["vanilla", "expert-2"] and "by FLOPs" in text
    for row in result["rows"]:
        assert (row["graphs"], row["breaks"]) == (1, 0) and row["warmup"] > row["step"] > 0
        assert row["forward"] + row["backward"] + row["optimizer"] == pytest.approx(row["step"], rel=0.5)
        assert row["tokens_per_second"] == pytest.approx(2 * 64 / row["step"])
    assert result["recompiles"] == 0 and result["rows"][0]["ratio"] == 1


def test_quick_decode(capsys):
    pytest.importorskip("transformers")
    result, _ = run(capsys, "decode", "--quick", "--no-compile")
    check_schema(result, "decode")
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"vanilla", "expert-2", "vanilla, uncached", "transformers"}
    assert rows["vanilla"]["kv_bytes"] == 2 * 2 * 20 * 4 * 32 * 2  # K and V, rows, tokens, layers, width, bf16
    assert rows["vanilla"]["depth"] == 1 and 1 <= rows["expert-2"]["depth"] <= 2
    result, _ = run(capsys, "decode", "--quick", "--no-compile", "--dtype", "fp32")
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["transformers"]["same_tokens"] == rows["vanilla, uncached"]["same_tokens"] == 1
    ablate = ("decode", "expert-2", "--quick", "--no-compile", "--dtype", "fp32", "--ablate", "--no-llama")
    rows = {row["name"]: row for row in run(capsys, *ablate, "--no-uncached")[0]["rows"]}
    without = ("early exit", "one graph", "SDPA", "not packed")
    assert set(rows) == {"expert-2", *(f"expert-2, {what}" for what in without)}
    assert all(row["same_tokens"] == 1 for row in rows.values())


def test_quick_serve(tmp_path, capsys):
    files = [str(tmp_path / f"{name}.json") for name in ("serve", "widths")]
    result, text = run(capsys, "serve", "--quick", "--no-compile", "--json", files[0])
    check_schema(result, "serve")
    assert result["routing"] == "balanced" and "balanced routing" in text
    vanilla, routed, equal = result["rows"]
    assert [r["name"] for r in result["rows"]] == ["vanilla", "expert-2", "expert-2, equal memory"]
    assert (vanilla["slots"], routed["slots"], routed["width"], routed["turn_width"]) == (4, 7, 4, 4)
    per_row = 2 * 24 * 32 * 2  # K and V, tokens, width, bf16: times the layers that keep them
    assert vanilla["kv_bytes"] == 4 * 4 * per_row and routed["kv_bytes"] == 7 * 3.5 * per_row
    assert equal["slots"] == equal["width"] + equal["turn_width"] - 1 == 4 and equal["kv_bytes"] <= vanilla["kv_bytes"]
    for row in result["rows"]:
        assert row["turn_use"] > 0.9 and row.get("block_use", 1) > 0.9 and 0 <= row["host"] < 0.5
        assert row["tokens_per_second"] == statistics.median(row["speeds"])
        assert row["of_bound"] == pytest.approx(row["ratio"] / row["bound"])
    assert vanilla["ratio"] == vanilla["bound"] == vanilla["bound_bytes"] == 1 and 1.3 < routed["depth"] < 1.7
    weights, attention, head = 2 * (3 * 64 * 64 + 3 * 64 * 128), 2 * 16 * 64, 2 * 64 * 256  # FLOPs per layer and token
    f, layer = routed["fractions"][1], weights + attention
    assert vanilla["flops"] == 4 * layer + head
    assert routed["flops"] == pytest.approx(3 * layer + f * (weights + f * attention) + head)
    assert routed["bound"] == vanilla["flops"] / routed["flops"]
    flags = ("--no-compile", "--no-equal-memory", "--widths", "2", "3", "--json", files[1])
    sweep = run(capsys, "serve", "--quick", *flags)[0]["rows"]
    assert [(r["at"], r["name"]) for r in sweep] == [(w, v) for w in (2, 3) for v in ("vanilla", "expert-2")]
    bench.main(["plot", *files, "-o", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_quick_serve_of_a_mixed_load(capsys):
    pytest.importorskip("transformers")
    result, _ = run(capsys, "serve", "share-2", "--quick", "--no-compile", "--prompts", "12")
    check_schema(result, "serve")
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["vanilla", "share-2", "transformers"] and result["lengths"] == [2, 8]
    assert [row["slots"] for row in rows.values()] == [4, 7, 4] and rows["vanilla"]["ratio"] == 1
    per_row = 2 * 16 * 32 * 2  # K and V, tokens, width, bf16: times the layers that keep them
    assert rows["vanilla"]["kv_bytes"] == 4 * 4 * per_row and rows["share-2"]["kv_bytes"] == 7 * 3 * per_row
    assert rows["transformers"]["kv_bytes"] == 4 * 4 * per_row * 2  # pages of 32 tokens
    for row in rows.values():
        assert 0 < row["between_median"] <= row["between_99"] and 0 < row["first_median"] <= row["first_99"]
        assert row["tokens_per_second"] > 0 and 0 < (row["prefill"] or 0.5) < 1
        # four residents at a time, so the last of twelve waits for two others
        assert row["first_99"] > 2 * row["between_median"]


def test_a_mixed_load_is_the_same_for_all_and_times_every_token():
    args = Namespace(prompts=40, lengths=[3, 9])
    load = bench.make_load(MoRConfig(**bench.QUICK, block_size=18), args)
    assert load == bench.make_load(MoRConfig(**bench.QUICK, block_size=18), args)
    for lengths in ([len(prompt) for prompt, _ in load], [new for _, new in load]):
        assert (min(lengths), max(lengths)) == (3, 9)
    engine = Engine(MoR(MoRConfig(**bench.QUICK, block_size=18)), 4, 4, 18, compile=False)
    out = bench.serve_load(engine, load)
    assert [len(times) for times in out["times"]] == [new for _, new in load]
    assert all(times == sorted(times) and times[-1] <= out["seconds"] for times in out["times"])
    row = bench.summarize_load([out, out | dict(seconds=out["seconds"] * 3)], [out, out])
    total = sum(new for _, new in load)
    assert row["tokens_per_second"] == pytest.approx(total / (2 * out["seconds"]))
    assert row["ratio"] == pytest.approx((1 + 1 / 3) / 2)
    firsts = sorted(times[0] for times in out["times"])
    median, worst = row["first"]
    assert firsts[19] - 1e-6 <= median <= firsts[20] + 1e-6 and firsts[38] - 1e-6 <= worst <= firsts[39] + 1e-6


def test_quick_cost_and_plot(tmp_path, capsys):
    files = [str(tmp_path / f"{name}.json") for name in ("cost", "capacity")]
    assert run(capsys, "cost", "--quick", "--json", files[0])[0]["rows"][0]["preset"] == "nano"
    sweep = ("train", "--quick", "--sweep", "capacity", "--compile", "none", "--fresh", "--profile", "--json", files[1])
    half = run(capsys, *sweep)[0]["rows"][1]
    assert half["name"] == "capacity 0.5" and 0.2 < half["by_flops"] < 0.8
    assert half["peak_bytes"] > 12 * half["params"] and half["warm_start"] is not None
    assert half["profile"]["matmul"] > 0 and half["profile"]["attention backward"] > 0
    bench.main(["plot", *files, "-o", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_quick_gpu_on_a_cpu(tmp_path, capsys, monkeypatch):
    """All of it but the card: checks, parts, estimates, memory, and one file."""
    monkeypatch.setitem(bench.TINY, "serve", dict(new=16, rounds=2, seconds=0.3))
    parts = {name: bench.GPU_PARTS[name] for name in ("serve, width 32", "decode", "train")}
    monkeypatch.setattr(bench, "GPU_PARTS", parts)
    file = tmp_path / "gpu.json"
    result, text = run(capsys, "gpu", "--quick", "--device", "cpu", "--json", str(file))
    check_schema(result, "gpu")
    assert json.loads(file.read_text()) == result
    assert len(result["checks"]) == 7 and all(row["verdict"] == "right" for row in result["checks"]), result["checks"]
    assert [name for name, part in result["parts"].items() if "error" in part] == [] and "estimate for an H100" in text
    names = {row["name"] for row in result["rows"]}
    assert {f"serve {name}, width 4: turn" for name in ("vanilla", "expert-3")} <= names
    assert {"serve expert-3, width 4: block", "decode vanilla, batch 2: step", "train expert-3, batch 2: step"} <= names
    for row in result["rows"]:
        assert row["off"] == pytest.approx(row["measured"] / row["estimated"]) and row["speed"] > 0
    # a part that fails is reported, and so is one for which no time is left
    monkeypatch.setattr(bench, "GPU_PARTS", {"train": parts["train"]})
    monkeypatch.setattr(bench, "check_logits", lambda device: [dict(name="x", difference=1.0, verdict="WRONG")])
    monkeypatch.setitem(bench.COMMANDS, "train", lambda args: 1 / 0)
    result, text = run(capsys, "gpu", "--quick", "--device", "cpu")
    assert result["parts"]["train"]["error"] == "ZeroDivisionError: division by zero"
    assert len(result["warnings"]) == 2 and "warning: x: off by 1.0e+00" in text
    result, _ = run(capsys, "gpu", "--quick", "--device", "cpu", "--minutes", "0")
    assert result["parts"]["train"]["error"] == "not begun within --minutes 0.0"


def test_estimates_by_hand():
    """360M on an H100: at 32 rows every kernel of a layer takes its launch, and the head the reading of its weights."""
    c = bench.make_config("vanilla", "360M", 384)
    layer = 3 * 5e-6 + 5e-6 + 6e-6 + 7 * 2.5e-6
    gate_up = 2 * 2560 * 960 * 2 / 2.8e12
    assert gate_up < 5e-6
    assert bench.estimate_stage(c, 32, 32, 128, head=False) == pytest.approx(32 * layer)
    head = 960 * 49152 * 2 / 2.8e12 + 3 * 4 * 32 * 49152 * 2 / 2.8e12 + 45e-6 + 25e-6
    assert bench.estimate_stage(c, 0, 32, 128) == pytest.approx(head)
    many = bench.estimate_stage(c, 1, 512, 1000, head=False)  # reading the cache takes longer than a launch
    assert many == pytest.approx(layer - 6e-6 + 2 * 512 * 1000 * 320 * 2 / 2.8e12)


# ---- launches: on fake tensors, in processes of their own


def count_known_launches() -> dict:
    """Counts a function whose kernels are known."""
    from fake_cuda import count_launches, pretend

    with pretend():
        x, w = torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16)[0], torch.zeros(3, 64, 64, dtype=torch.bfloat16)
        products = dict(count_launches(lambda x, w: (x[0] @ w[0]).relu() @ w[1] + 1, x, w))
        attention = dict(count_launches(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), x[None]))
    return dict(products=products, attention=attention)


def test_launches_are_counted_without_a_gpu(capsys):
    pytest.importorskip("triton")
    known = bench.run_in_fresh_process(count_known_launches, env={})
    assert known["products"] == {"matmul": 2, "triton": 2} and known["attention"]["other"] == 1
    result, text = run(capsys, "launches", "expert-2", "--quick", "--stages", "block")
    check_schema(result, "launches")
    (row,) = result["rows"]
    assert (row["stage"], row["other"]) == ("block", 1) and "sm_90" in text  # attention is one kernel
    assert row["launches"] == row["triton"] + row["matmul"] + row["other"]
    assert row["launches"] <= 25  # one layer, its router and its cache: a ceiling that may only come down


# ---- what the documents say


def documented_commands() -> list[str]:
    """Returns the arguments of every complete bench.py command in README.md, RESULTS.md and the docstring."""
    commands = re.findall(r"^    python bench.py ([^#\n]*)", bench.__doc__, re.MULTILINE)
    for name in ("README.md", "RESULTS.md"):
        commands += re.findall(r"`bench\.py (\w+ [^`]+)`", (ROOT / name).read_text())
    return [" ".join(command.split()) for command in commands]


def test_documented_commands_parse():
    commands = documented_commands()
    assert len(commands) > 20 and {command.split()[0] for command in commands} >= {*bench.COMMANDS, "plot"}
    for command in commands:
        args = bench.build_parser().parse_args(shlex.split(command))
        for variant in getattr(args, "variants", []):
            bench.make_config(variant, args.preset, 512)


# ---- its parts


def test_balanced_routing_has_the_fractions_of_capacity():
    torch.manual_seed(0)
    size = dict(vocab_size=64, block_size=512, n_layer=5, n_head=2, n_kv_head=1, d_model=32, d_ff=32, n_recursion=3)
    for router in ("expert", "token"):
        model = bench.balance_routers(MoR(MoRConfig(router=router, **size)).eval())
        depth = model(torch.randint(64, (8, 512))).depth
        for r, capacity in enumerate((1, 2 / 3, 1 / 3)):
            assert (depth > r).float().mean() == pytest.approx(capacity, abs=0.04)


def test_interleave_summaries_and_warnings():
    order = []
    cases = {name: lambda name=name: order.append(name) or len(order) for name in "ABC"}
    assert bench.interleave(cases, 2) == {"A": [1, 4], "B": [2, 5], "C": [3, 6]} and order == list("ABCABC")
    assert bench.compare_rounds([2, 4, 6], [1, 1, 6]) == 2 and bench.measure_spread([1, 2, 4]) == 1.5
    assert bench.find_disturbances(dict(load=0.0), dict(A=0.05)) == []
    loud = bench.find_disturbances(dict(load=1e3), dict(A=0.5))
    assert "rounds of A differ by 50%" in loud[0] and "load average 1000" in loud[1]
    seconds = bench.time_stages([lambda: None, lambda: sum(range(100_000))], torch.device("cpu"))
    assert len(seconds) == 2 and 0 < seconds[0] < seconds[1]
    assert statistics.median(bench.matmul_peak(torch.device("cpu"), torch.float32, 0.01) for _ in range(3)) > 1e8


def test_depth_grows_as_the_papers():
    variants = ("vanilla", "expert-2", "token-3", "share-4")
    layers = {v: bench.make_config(v, "135M", 512, n_layer=11).n_layer for v in variants}
    assert layers == {"vanilla": 11, "expert-2": 12, "token-3": 11, "share-4": 14}


@pytest.mark.parametrize("argv, said", [
    (["train", "mor"], "unknown variant 'mor'"),
    (["train", "vanilla-3"], "unknown variant 'vanilla-3'"),
    (["train", "expert-1"], "use n_recursion>=2"),
    (["train", "--batch", "0"], "--batch 0 must be at least 1"),
    (["decode", "--batch", "1", "0"], "--batch [1, 0] must be at least 1"),
    (["cost", "1T"], "unknown preset '1T'"),
    (["train", "--device", "abacus"], "--device abacus: "),
    (["cost", "--quick", "--json", "/nowhere/a.json"], "cannot write --json /nowhere/a.json"),
    (["plot", "/nowhere.json", "-o", "a.png"], "cannot read /nowhere.json"),
    (["plot", __file__, "-o", "a.png"], "does not end with a line of JSON from bench.py"),
    (["plot", "a.json", "-o", "a.pdf"], "must be a .png file"),
    (["serve", "--prompts", "0"], "--prompts 0 must be at least 1"),
    (["serve", "--prompts", "9", "--lengths", "0", "5"], "--lengths [0, 5] must be at least 1"),
    (["serve", "--prompts", "9", "--lengths", "9", "5"], "--lengths 9 5: the smaller number comes first"),
    (["gpu"], "--device cuda: "),
    (["fly"], "invalid choice: 'fly'"),
])  # fmt: skip
def test_mistakes_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error
