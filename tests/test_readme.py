"""The README and RESULTS.md: the example in Python runs, and every training command starts what it says."""

import json
import re
import sys

import numpy as np
import pytest
from conftest import ROOT

import prepare
import sample
import train

README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks of a language; "" are those without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.M)
    return [code.replace("\\\n", " ") for name, code in found if name == language]


def commands(program: str) -> list[list[str]]:
    """The arguments of every call of a program in the README's code blocks, and in tables of RESULTS.md."""
    lines = [line.split("#")[0] for code in blocks("") + blocks("bash") for line in code.splitlines()]
    lines += re.findall(r"`([^`\n]*)`", (ROOT / "RESULTS.md").read_text())
    return [line.split(program)[1].split() for line in lines if program + " " in line]


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks("python")[0], names)
    assert names["out"].depth.shape == (2, 65) and names["model"].wte.weight.grad is not None
    assert names["logits"].shape == (2, 8192) and names["cache"].position.tolist() == [65 + 10, 40 + 10]
    assert (tmp_path / "depth.png").stat().st_size > 1000 and "tensor" in capsys.readouterr().out


@pytest.fixture
def data(tmp_path):
    """Data of the README's names: tokens of 49,152 kinds, enough for a batch of the recipes."""
    for name, vocab, tokens in (("fineweb", 49152, 2**21 + 4096), ("notes", 8192, 2**16), ("python", 8192, 2**16)):
        directory = tmp_path / "data" / name
        directory.mkdir(parents=True)
        for split in ("train", "val"):
            header = np.zeros(256, np.int32)
            header[:3] = 20240520, 1, tokens
            ids = np.arange(tokens, dtype=np.uint16) % vocab
            (directory / f"{split}_000000.bin").write_bytes(header.tobytes() + ids.tobytes())
        meta = dict(vocab_size=vocab, tokenizer="gpt2", eot=0, train_tokens=tokens, val_tokens=tokens, val_bytes=None)
        (directory / "meta.json").write_text(json.dumps(meta))
    return tmp_path


@pytest.mark.parametrize("args", [a for a in commands("train.py") if "..." not in a and "--data" in a], ids=" ".join)
def test_every_training_command_starts_what_it_says(args, data, monkeypatch, capsys):
    monkeypatch.chdir(data)
    train.main([*args, "--dry-run"])
    plan = capsys.readouterr().out
    if "--recipe" in args:
        assert "14161 steps" in plan.replace(",", "") and "warning" not in plan
    if "--steps" in args:
        assert f"{args[args.index('--steps') + 1]} steps" in plan.replace(",", "")


def test_every_flag_that_the_documents_name_exists(capsys):
    """Of the scripts whose names stand beside them, or, where a flag stands alone, of any."""
    flags = set()
    import bench
    import eval as evaluation
    import study

    for program in (train.main, prepare.main, sample.main, evaluation.main, study.main):
        monkey = sys.argv
        sys.argv = ["program", "--help"]
        try:
            with pytest.raises(SystemExit):
                program()
        finally:
            sys.argv = monkey
        flags |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for command in ("cost", "train", "decode", "serve", "launches", "plot"):
        with pytest.raises(SystemExit):
            bench.main([command, "--help"])
        flags |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    flags |= {"--local-dir", "--standalone", "--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv-backend"}
    flags |= {"--rdzv-endpoint", "--rdzv-id", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal"}
    flags |= {"--requeue"}  # torchrun's, sbatch's and hf's
    for name in ("README.md", "RESULTS.md", "EVALUATION.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / name).read_text()))
        assert named <= flags, f"{name}: {sorted(named - flags)}"


def test_files_named_by_the_readme_exist():
    for name in re.findall(r"\]\((?!https)([\w./-]+)", README) + re.findall(r"^(\w+\.py) ", README, re.M):
        assert (ROOT / name).exists(), name
