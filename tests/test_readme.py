"""The documents: every command in them, and in the heads of the programs, is started; the example in Python runs.

A command runs in this process, up to its first step or its first output, in a directory that holds tiny stand-ins for
what it names. Sizes of a GPU are planned (--dry-run) instead.
"""

import ast
import base64
import glob
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from itertools import chain, count, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import zstandard
from conftest import ROOT
from torch.testing._internal.distributed.fake_pg import FakeStore

import bench
import checkpoint
import eval as evaluation
import prepare
import sample
import study
import train
from config import PRESETS

README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "RESULTS.md", "EVALUATION.md")
PROGRAMS = dict(
    train=train, prepare=prepare, sample=sample, eval=evaluation, bench=bench, study=study, checkpoint=checkpoint
)


# ---- finding commands

OTHERS = ("make", "pip", "pytest", "hf")  # programs that are not ours
LAUNCHERS = ("python", "torchrun", "srun")
SHELL = re.compile(r"export \w+=\S+$|\w+=\$\(.*\)$|\. \S+/activate$")
LEFT_OUT = {  # what a text that only mentions a command does not say
    "eval.py DIR --paper": "--data data/python",
    "train.py --recipe NAME": "--data data/fineweb",
    "checkpoint.py export": "RUN DIR",
    "prepare.py debian": "--out data/debian",
    "prepare.py FILE --tokenizer gpt2": "--out data/file",
}


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks of a language; "" are those without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.M)
    return [code.replace("\\\n", " ") for name, code in found if name == language]


def spans(text: str) -> list[str]:
    """The code within sentences, a line break in it taken for a space."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def is_command(line: str) -> bool:
    first, _, rest = line.partition(" ")
    if first in LAUNCHERS:
        return re.search(r"\w\.py\b", rest) is not None
    return bool(rest) and (first in OTHERS or first.removesuffix(".py") in PROGRAMS and first.endswith(".py"))


def lines_of_blocks(text: str) -> list[str]:
    """The lines of those blocks that begin with a command; a line of them that is none is one that nobody checks."""
    lines = []
    for code in blocks("", text) + blocks("bash", text):
        found = [re.sub(r"\s+#.*|^#.*", "", line).strip() for line in code.splitlines()]
        found = [line for line in found if line and not SHELL.match(line)]
        if found and (found[0].split()[0] in LAUNCHERS + OTHERS):
            lines += found
    return lines


def collect() -> list[str]:
    """Every command of the documents, the Makefile and the heads of the programs, once."""
    lines = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        lines += lines_of_blocks(text)
        lines += [span for span in spans(text) if is_command(span)]
    for file in sorted(ROOT.glob("*.py")):
        head = ast.get_docstring(ast.parse(file.read_text())) or ""
        found = [re.sub(r"\s+#.*", "", line).strip() for line in head.splitlines() if line.startswith("    ")]
        lines += [line for line in found + spans(head) if is_command(line)]
    recipes = re.findall(r"^\t\$\(BIN\)/(python .*)", (ROOT / "Makefile").read_text(), re.M)
    commands = [" ".join(line.split()).removeprefix("python ") for line in lines + recipes]
    return list(dict.fromkeys(commands))


def split(command: str) -> tuple[str, list[str], list[str]]:
    """Returns (program, its arguments, the words before it), without redirections."""
    words = shlex.split(f"{command} {LEFT_OUT.get(command, '')}")
    if ">" in words:
        words = words[: words.index(">")]
    at = 0
    if words[0] in LAUNCHERS:
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at].removesuffix(".py"), words[at + 1 :], words[:at]


COMMANDS = collect()


# ---- stand-ins

SMALL = dict(vocab_size=300, block_size=64, n_layer=8, n_head=2, n_kv_head=1, d_model=16, d_ff=24)
SHORT = "--batch-tokens 64 --eval-tokens 128 --warmup 1 --cooldown 0".split()
PLAIN = "--device cpu --dtype fp32 --no-compile".split()
BATCH = 2**21  # tokens of the paper's steps


class FirstStep(Exception):
    pass


def make_documents() -> list[str]:
    rng, words = np.random.default_rng(0), "the module parses a file and returns what it reads in order of time".split()
    return [" ".join(rng.choice(words, 12)) + f"\n\ndocument {i}\n" for i in range(500)]


def write_shard(file: Path, vocab: int, tokens: int) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, tokens
    ids = np.arange(tokens, dtype=np.uint16) % vocab
    file.write_bytes(header.tobytes() + ids.tobytes())


def imitate(monkeypatch) -> None:
    """Replaces what no test should wait for: the compiler, the network, a measurement of the machine, pictures, and
    presets of the sizes of models that are run."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "tiktoken")
    monkeypatch.setitem(PRESETS, "nano", SMALL)
    for module in (train, bench):
        monkeypatch.setattr(module, "matmul_peak", lambda *args: 1e11)
    monkeypatch.setattr(train, "plot", lambda *args: None)
    for name in ("draw_pictures", "draw_models"):
        monkeypatch.setattr(evaluation, name, lambda *args: None)
    monkeypatch.setattr(prepare, "read_python", lambda: iter(make_documents()))
    monkeypatch.setattr(prepare, "read_debian", lambda source: (make_documents(), []))
    monkeypatch.setattr(prepare, "ask_hub", lambda name: None)
    monkeypatch.setattr(prepare, "read_dataset", lambda *args: iter(make_documents()))


def call(program: str, *args: str) -> None:
    before, sys.argv = sys.argv, [f"{program}.py", *args]
    try:
        PROGRAMS[program].main()
    finally:
        sys.argv = before


def fill(place: Path) -> None:
    """Fills the working directory with texts, tokens, runs, a plateau, an export, a Llama, and a result of bench.py."""
    # texts
    for name in ("notes.txt", "notes/a.txt", "story.txt", "tutorial.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("\n<|endoftext|>\n".join(make_documents()))
    rows = "".join(json.dumps(dict(text=text)) + "\n" for text in make_documents())
    Path("debian.jsonl").write_text(rows)
    Path("books/more").mkdir(parents=True)
    Path("books/more/a.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    Path("prompts.jsonl").write_text('{"prompt": "the"}\n{"prompt": "a file"}\n')
    Path("tiktoken").mkdir()
    ranks = (base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    Path("tiktoken/gpt2.tiktoken").write_bytes(b"".join(ranks))
    Path("olmo_eval").mkdir()

    # tokens, a batch of the paper's size of them
    call("prepare", "notes.txt", "--out", "data/python", "--tokenizer", "train:300", "--val-fraction", "0.2")
    for split_name, tokens in (("train", BATCH + 4096), ("val", 2500)):
        write_shard(place / f"data/python/{split_name}_000000.bin", 257, tokens)
    (place / "data/fineweb").mkdir()
    for split_name in ("train", "val"):
        write_shard(place / f"data/fineweb/{split_name}_000000.bin", 49152, BATCH + 4096)
    meta = dict(vocab_size=49152, tokenizer="gpt2", eot=0, train_tokens=BATCH, val_tokens=BATCH, val_bytes=None)
    (place / "data/fineweb/meta.json").write_text(json.dumps(meta))

    # models
    call("train", *SHORT, *PLAIN, "--steps", "4", "--keep-at", "2")
    call("train", *SHORT, *PLAIN, "--steps", "1", *"--router none --n-recursion 1 --out out/vanilla".split())
    call("checkpoint", "export", "out/demo", "exported/demo")
    call("checkpoint", "export", "out/vanilla", "SmolLM-360M")
    Path("out/plateau").mkdir()
    shutil.copyfile("out/demo/ckpt_000002.pt", "out/plateau/ckpt_000320.pt")
    Path("results").mkdir()
    call("bench", "cost", "nano", "--json", "results/cost.json")
    Path("study").mkdir()
    shutil.copyfile(ROOT / "study/rows.jsonl", "study/rows.jsonl")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    place = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        imitate(monkeypatch)
        fill(place)
    return place


@pytest.fixture
def place(stock, tmp_path, monkeypatch):
    """A copy of the stock to work in."""
    shutil.copytree(stock, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    imitate(monkeypatch)
    return tmp_path


def provide(program: str, args: list[str]) -> list[str]:
    """Returns arguments with names for RUN, DIR and the like, and makes the runs and the data that they name."""
    names = dict(RUN="out/demo", DIR="exported/demo", DATA="data/python", FILE="notes.txt", NAME="mor-3")
    if "--init-from" in args:
        names["DIR"] = "SmolLM-360M"
    if "export" in args:
        names["DIR"] = "exported/new"
    args = [names.get(word, word) for word in args]
    stand_ins = {"data/": "data/python"}
    if program == "train":
        shutil.rmtree("out/demo")
    else:
        stand_ins["out/"] = "out/demo"
    if program == "sample":  # as long as a prompt may be
        Path("notes.txt").write_text("the module")
    for word in [*args, "data/debian"]:
        for kind, stand_in in stand_ins.items():
            if word.startswith(kind) and not Path(word).suffix and not Path(word).exists():
                shutil.copytree(stand_in, word)
    return args


# ---- starting commands


def start_train(args: list[str], before: list[str], monkeypatch, capsys) -> None:
    """Takes a step of the nano model. Of larger ones, and of many processes, looks at the plan."""
    if before:  # torchrun
        counts = [word.split("=")[1] for word in before if word.startswith(("--nproc", "--nnodes"))]
        world = int(np.prod([int(n) if n.isdigit() else 2 for n in counts]))
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", world)):
            monkeypatch.setenv(name, str(value))
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        train.main([*args, "--dry-run"])
    finally:
        if before:
            dist.destroy_process_group()
    plan = capsys.readouterr().out
    if "--recipes" in args:
        assert "mor-3" in plan
        return

    # the plan says what the command does
    named = dict(pairwise([*args, ""]))
    numbers = {int(n) for n in re.findall(r"(?<![.\d])\d+\b", plan)}
    for name in ("--steps", "--batch-tokens"):
        assert name not in named or int(named[name]) in numbers
    if "--recipe" in args:
        assert {train.RECIPES[named["--recipe"]][0], BATCH} <= numbers and "warning" not in plan
    if before and ("--recipe" in args or "--preset" in args):
        assert f"{1024 // world} sequences per step and process" in plan
    large = (
        "--recipe" in args
        or "--init-from" in args
        or named.get("--preset", "nano") != "nano"
        or "e18" in named.get("--budgets", "")
    )
    if before or large:
        return

    # a step
    def step_once(run, step=train.train_step):
        raise FirstStep(step(run))

    monkeypatch.setattr(train, "train_step", step_once)
    with pytest.raises(FirstStep) as stopped:
        train.main([*args, *PLAIN, "--eval-tokens", "128"])
    assert stopped.value.args[0].isfinite().all()


def start_prepare(args: list[str], before: list[str], monkeypatch, capsys) -> None:
    """Prepares what stands in for the source, wholly."""
    out = Path(args[args.index("--out") + 1])
    shutil.rmtree(out, ignore_errors=True)
    call("prepare", *args)
    assert prepare.load_meta(out)["train_tokens"] > 0 and str(out) in capsys.readouterr().out


def start_eval(args: list[str], before: list[str], monkeypatch, capsys) -> None:
    """Evaluates a small run; of tasks, all but the harness's own work."""
    monkeypatch.setattr(evaluation.measure_speed, "__defaults__", (2, 1))
    if "--tasks" in args:
        names = args[args.index("--tasks") + 1].split(",")
        scores = {"acc,none": 0.5, "acc_norm,none": 0.5}
        harness = SimpleNamespace(
            simple_evaluate=lambda lm, tasks, **options: dict(results={tasks[0]: scores}),
            TaskManager=lambda **options: SimpleNamespace(all_tasks=[*names, "mmlu_continuation"]),
            LM=object,
        )
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks"):
            monkeypatch.setitem(sys.modules, name, harness)
    call("eval", *args)
    out = capsys.readouterr().out
    if args[0] != "export":
        assert json.loads(out.splitlines()[-1])
    if "--tasks" in args:
        assert all(name in out for name in names)


def start_bench(args: list[str], before: list[str], monkeypatch, capsys) -> None:
    """Measures small models for an instant; launches of a GPU are counted in test_bench.py."""
    if args[0] == "plot":
        call("bench", *chain.from_iterable(glob.glob(word) if "*" in word else [word] for word in args))
        assert Path(args[-1]).stat().st_size > 1000
        return
    if args[0] == "gpu":  # here there may be none; test_bench.py runs all of it on the CPU
        with pytest.raises(SystemExit):
            call("bench", *args, "--device", "cuda:99")
        assert capsys.readouterr().err.startswith("error: --device cuda:99")
        return
    for name in PRESETS if args[0] != "cost" else ():
        monkeypatch.setitem(PRESETS, name, SMALL)
    monkeypatch.setattr(bench, "TINY", {name: tiny | dict(rounds=1) for name, tiny in bench.TINY.items()})
    bench.TINY["serve"] |= dict(seconds=0.04, new=8)
    if args[0] == "serve":  # about 20 stages a window
        monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=count(step=1e-3).__next__))
    monkeypatch.setattr(bench, "run_in_fresh_process", lambda function, *given, env: function(*given))
    monkeypatch.setattr(
        bench, "count_stage_launches", lambda config, args: {name: dict(triton=1) for name in args.stages}
    )
    call("bench", *args, "--quick")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def start_study(args: list[str], before: list[str], monkeypatch, capsys) -> None:
    """Plans, or starts the first run; what is trained again is trained in test_study.py."""
    monkeypatch.setattr(study, "ROOT", Path.cwd())
    meta = Path("data/debian/meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | dict(vocab_size=8192)))  # that of the rows

    def train_one(args, spec, lock):
        train.main([*study.describe_run(args, spec)[0], "--dry-run"])
        raise FirstStep

    if args[0] == "rerun":
        row = study.read_rows(Path("study/rows.jsonl"))[0]
        monkeypatch.setattr(study.subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=0))
        monkeypatch.setattr(study, "repeat", lambda args, row, code, out: dict(loss=row["loss"]))
        args = ["rerun", row["key"]]
    monkeypatch.setattr(study, "train_one", train_one)
    try:
        call("study", *args)
    except FirstStep:
        assert args[0] == "run"
    except SystemExit as stop:
        assert args[0] == "rerun" and not stop.code
    assert capsys.readouterr().out


def start_any(program: str, args: list[str], before: list[str], monkeypatch, capsys) -> None:
    """Runs sample.py or checkpoint.py to the end."""
    call(program, *args)
    assert "".join(capsys.readouterr()) or program == "checkpoint"


STARTS = dict(train=start_train, prepare=start_prepare, eval=start_eval, bench=start_bench, study=start_study)


def check_other(program: str, args: list[str]) -> None:
    """Whether what the programs of others are asked for is there."""
    if program == "make":
        subprocess.run(["make", "--dry-run", *args], cwd=ROOT, check=True, capture_output=True)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in args if not word.startswith("-"))
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in args:
            assert "[" not in word or set(word.split("[")[1].strip("]").split(",")) <= extras.keys()
    else:
        assert program == "hf" and args[0] == "download" and args[-1] == "SmolLM-360M"  # the stock's name for it


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_starts(command, place, monkeypatch, capsys):
    program, args, before = split(command)
    if program in OTHERS:
        return check_other(program, args)
    assert program in PROGRAMS, f"nothing here starts `{command}`: write what stands in for it"
    args = provide(program, args)
    try:
        STARTS.get(program, partial(start_any, program))(args, before, monkeypatch, capsys)
    except SystemExit as stop:  # a package that is not installed is said in one line
        err = capsys.readouterr().err
        assert not stop.code or "pip install" in err.splitlines()[-1], err


def test_commands_are_found():
    """A new command in any of the three places is one more test, and one that nothing here starts fails."""
    found = [*lines_of_blocks("```\nmake new   # why\npython new.py --flag\n```"), *spans("see `eval.py A\nB` there")]
    assert found == ["make new", "python new.py --flag", "eval.py A B"]
    assert not is_command("model.py") and not is_command("out/demo") and is_command("eval.py A B")
    assert {split(command)[0] for command in COMMANDS} >= {*PROGRAMS, "make"}
    assert len(COMMANDS) > 60


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks("python")[0], names)
    assert names["out"].depth.shape == (2, 65) and names["model"].wte.weight.grad is not None
    assert names["logits"].shape == (2, 8192) and names["cache"].position.tolist() == [65 + 10, 40 + 10]
    assert (tmp_path / "depth.png").stat().st_size > 1000 and "tensor" in capsys.readouterr().out


def test_every_flag_that_the_documents_name_exists(capsys):
    """Of the scripts whose names stand beside them, or, where a flag stands alone, of any."""
    flags = set()
    calls = [("train",), ("prepare",), ("sample",), ("eval",), ("study",)]
    for command in ("cost", "train", "decode", "serve", "launches", "plot"):
        calls.append(("bench", command))
    for program, *command in calls:
        with pytest.raises(SystemExit):
            call(program, *command, "--help")
        flags |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    flags |= {"--local-dir", "--standalone", "--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv-backend"}
    flags |= {"--rdzv-endpoint", "--rdzv-id", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal"}
    flags |= {"--requeue", "--model", "--model_args", "--gen_kwargs"}  # torchrun's, sbatch's, hf's and lm_eval's
    for name in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / name).read_text()))
        assert named <= flags, f"{name}: {sorted(named - flags)}"


def test_files_named_by_the_readme_exist():
    for name in re.findall(r"\]\((?!https)([\w./-]+)", README) + re.findall(r"^(\w+\.py) ", README, re.M):
        assert (ROOT / name).exists(), name
