"""What `export` writes, as those meet it who have transformers and not this repository."""

import base64
import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, tiny
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import checkpoint
import prepare
from checkpoint import from_pretrained
from eval import Scorer
from generate import generate

transformers = pytest.importorskip("transformers")
from transformers.dynamic_module_utils import get_imports  # noqa: E402

KINDS = {
    "expert": dict(n_recursion=3, router="expert"),
    "token": dict(n_recursion=3, router="token", balance="bias", tie_embeddings=False),
    "share": dict(n_recursion=3, router="expert", kv="share", causality="aux_router", capacity_slack=3.0),
    "normed": dict(qk_norm=True),  # without router, but no Llama either
}
TEXT = "the model reads the text, then   that: 12345 (thé)"


def write_run(path: Path, **fields):
    """Writes a run of random weights with a tokenizer of bytes and three merges -> its model."""
    path.mkdir()
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" t"]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (path / "own.tiktoken").write_bytes(b"".join(lines))
    model = make_model(tiny(vocab_size=260, **fields)).eval()
    data = dict(tokenizer="own.tiktoken", vocab_size=260, eot=259)
    config = dict(model=model.config.asdict(), data=data, train=dict(data="nowhere"))
    with checkpoint.written_at_once(path / "ckpt_000003.pt") as f:
        checkpoint.write_state(f, dict(model=model.state_dict(), config=config, step=3))
    rows = [dict(step=2, val_loss=8.25), dict(step=3, val_loss=6.75, val_loss_bpb=2.125, selected=[1.0, 0.75, 0.5])]
    rows.append(dict(step=3, lm=9.5))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "val_lo')
    return model


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of a fresh environment that has torch, transformers and what these require, as links to this one's."""
    root = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(root)
    site = next(root.glob("lib/python*/site-packages"))
    seen, todo = set(), ["torch", "transformers"]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        package = metadata.distribution(name)
        needs = map(Requirement, package.requires or [])
        todo += [need.name for need in needs if need.marker is None or need.marker.evaluate(dict(extra=""))]
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
    return root / "bin" / "python"


# Runs there, in a process that has nothing of this repository.
ELSEWHERE = """
import sys
from importlib.util import find_spec
assert not any(map(find_spec, "checkpoint model ops prepare tiktoken datasets accelerate".split()))
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

given = torch.load("given.pt")
again = given["directory"] + "-again"
load = lambda path, **options: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)
model = load(given["directory"])
ids, left, right = given["ids"], given["left"], given["right"]
greedy = dict(max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
found = {}

def see(name, function):
    with torch.no_grad():
        found[name] = function()

def refused(**options):
    try:
        model.generate(ids, max_new_tokens=4, **options)
    except ValueError as e:
        return str(e)

see("logits", lambda: model(ids).logits)
see("last", lambda: model(ids, logits_to_keep=1).logits)
see("loss", lambda: model(ids, labels=ids).loss)
for side, (padded, mask) in dict(left=left, right=right).items():
    see(side, lambda: model(padded, attention_mask=mask, labels=padded))
    see(f"generated {side}", lambda: model.generate(padded, attention_mask=mask, **greedy))
see("generated", lambda: model.generate(ids, **greedy))
see("plain", lambda: model.mor.generate(ids, 9))
see("shallow", lambda: model.generate(ids, **greedy, max_depth=1))
see("uncached", lambda: model.generate(ids, **greedy, use_cache=False, slack=1e6))
see("exact", lambda: model.generate(ids, **greedy, slack=1e6))
see("sampled", lambda: model.generate(ids, do_sample=True, max_new_tokens=3, num_return_sequences=3).shape)
see("long", lambda: model.generate(ids[:1], **greedy | dict(max_new_tokens=500)).shape[1])
cached = model(ids[:, :5], use_cache=True)
steps = [model(ids[:, t : t + 1], past_key_values=cached.past_key_values).logits for t in range(5, 8)]
found["cached"] = torch.cat([cached.logits.detach(), *steps], 1)
found["beams"] = refused(num_beams=3)
model.train()
found["training loss"] = model(ids, labels=ids).loss.detach()
model.eval()

half = load(given["directory"], dtype=torch.bfloat16)
found["half"] = (half.mor.wte.weight.dtype, half.mor.rope)
tokenizer = AutoTokenizer.from_pretrained(given["directory"])
found["tokens"] = tokenizer(given["text"]).input_ids, tokenizer.eos_token_id
model.save_pretrained(again)
tokenizer.save_pretrained(again)
see("again", lambda: load(again)(ids).logits)
found["where"] = sys.modules[type(model.mor).__module__].__file__
found = {name: dict(x) if hasattr(x, "keys") else x for name, x in found.items()}
torch.save(found, "found.pt")
"""


def run_elsewhere(python: Path, tmp_path: Path, directory: Path, **given) -> dict:
    home = tmp_path / "home"
    home.mkdir()
    (home / "script.py").write_text(ELSEWHERE)
    torch.save(dict(directory=str(directory), **given), home / "given.pt")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    env = kept | dict(HF_HOME=str(home / "hf"), HF_MODULES_CACHE=str(home / "modules"), HF_HUB_OFFLINE="1")
    process = subprocess.run(
        [python, "-I", "script.py"], cwd=home, env=env, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    return torch.load(home / "found.pt", weights_only=False)


def pad(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids, of which padding is the end-of-text token, and their attention mask."""
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    ids = [[259] * gap + row if side == "left" else row + [259] * gap for row, gap in zip(rows, gaps, strict=True)]
    mask = [[0] * gap + [1] * len(row) for row, gap in zip(rows, gaps, strict=True)]
    if side == "right":
        mask = [row[::-1] for row in mask]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it_without_this_repository(kind, python, tmp_path):
    model = write_run(tmp_path / "run", **KINDS[kind])
    directory = tmp_path / "mor-1.0"
    checkpoint.main(["export", str(tmp_path / "run"), str(directory)])
    ids = torch.randint(259, (2, 20), generator=torch.Generator().manual_seed(5))
    rows = [ids[0].tolist(), ids[1, :7].tolist()]
    left, right = pad(rows, "left"), pad(rows, "right")
    found = run_elsewhere(python, tmp_path, directory, ids=ids, left=left, right=right, text=TEXT)
    assert str(tmp_path / "home" / "modules") in found["where"]

    with torch.no_grad():
        out = model(ids, labels=ids)
        trained = model.train()(ids, labels=ids).loss
    model.eval()
    close = dict(atol=1e-4, rtol=0)
    torch.testing.assert_close(found["logits"], out.logits, **close)
    torch.testing.assert_close(found["last"], out.logits[:, -1:], **close)
    torch.testing.assert_close(found["again"], out.logits, **close)
    torch.testing.assert_close(found["loss"], out.loss, **close)
    torch.testing.assert_close(found["training loss"], trained, **close)
    torch.testing.assert_close(found["cached"], out.logits[:, :8], **close)

    # a padded row is what it is alone
    for name, (_, mask) in dict(left=left, right=right).items():
        nll = 0.0
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0].detach()
            torch.testing.assert_close(found[name]["logits"][i][mask[i].bool()], alone, **close)
            nll += F.cross_entropy(alone[:-1], torch.tensor(row[1:]), reduction="sum")
        torch.testing.assert_close(found[name]["loss"], nll / sum(len(row) - 1 for row in rows), **close)
        ours = generate(model, rows, 9, compile=False).tokens
        assert [row[len(mask[0]) :].tolist() for row in found[f"generated {name}"]] == ours

    # generation
    usual = generate(model, ids.tolist(), 9, compile=False).tokens
    assert found["generated"][:, 20:].tolist() == usual == found["plain"]
    assert found["shallow"][:, 20:].tolist() == generate(model, ids.tolist(), 9, compile=False, max_depth=1).tokens
    exact = generate(model, ids.tolist(), 9, compile=False, slack=1e6).tokens
    assert found["exact"][:, 20:].tolist() == exact == found["uncached"][:, 20:].tolist()
    assert found["long"] == model.config.block_size
    assert "num_beams=1" in found["beams"] and len(found["sampled"]) == 2 and found["sampled"][0] == 6

    dtype, rope = found["half"]
    assert dtype == torch.bfloat16 and rope.dtype == torch.float32
    torch.testing.assert_close(rope, model.rope)
    enc = prepare.load_tokenizer(tmp_path / "run" / "own.tiktoken")
    assert found["tokens"] == (enc.encode_ordinary(TEXT), 259)
    for place in (directory, tmp_path / "mor-1.0-again"):
        ours = from_pretrained(place).eval()
        assert ours.config == model.config and torch.equal(ours(ids).logits, model(ids).logits)
        assert {file.stem for file in place.glob("*.py")} == set(checkpoint.HUB_FILES)


@pytest.mark.parametrize("kind", ["expert", "token"])
def test_the_harness_gives_the_same_numbers_through_transformers(kind, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")  # which the harness needs for transformers
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = write_run(tmp_path / "run", **KINDS[kind])
    checkpoint.export(str(tmp_path / "run"), tmp_path / "exported")
    enc = prepare.load_tokenizer(tmp_path / "exported")
    options = dict(pretrained=str(tmp_path / "exported"), trust_remote_code=True, device="cpu", dtype="float32")
    theirs, ours = HFLM(**options, batch_size=2), Scorer(model, enc, batch_size=3)

    def ask(method: str, *arguments) -> tuple[list, list]:
        requests = [SimpleNamespace(args=a, arguments=a) for a in arguments]
        return getattr(theirs, method)(requests), getattr(ours, method)(requests)

    pairs = [("the text ", "reads"), ("", "then"), ("the model " * 9, "that reads"), ("a", " the"), ("x\n", "12")]
    for a, b in zip(*ask("loglikelihood", *pairs), strict=True):
        assert a == (pytest.approx(b[0], abs=1e-4), b[1])
    a, b = ask("loglikelihood_rolling", (TEXT,), (TEXT * 3,), ("x",))
    assert a == pytest.approx(b, abs=1e-3)
    settings = dict(until=["\n"], max_gen_toks=12, do_sample=False, slack=1e6)
    a, b = ask("generate_until", ("the model", settings), (TEXT, settings), ("then", settings))
    assert a == b and any(a)


def test_what_the_directory_says_of_itself(tmp_path, capsys):
    model = write_run(tmp_path / "run", **KINDS["expert"])
    checkpoint.export(str(tmp_path / "run"), tmp_path / "mor")
    card = (tmp_path / "mor" / "README.md").read_text()
    assert "trust_remote_code" in card
    assert "6.7500 nats per token, 2.1250 bits" in card and "2.25 rec" in card and "8.25" not in card
    assert f"{model.num_params(embedding=True):,}" in card
    for file in (tmp_path / "mor").glob(
        "*.py"
    ):  # as the hub's check has it, whose first demand is that these are there
        assert set(get_imports(file)) <= {"torch", "transformers"} | sys.stdlib_module_names
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "mor")
    assert generation.eos_token_id == generation.pad_token_id == 259

    write_run(tmp_path / "llama", n_recursion=3)
    checkpoint.export(str(tmp_path / "llama"), tmp_path / "unrolled")
    assert "trust_remote_code" not in (tmp_path / "unrolled" / "README.md").read_text()
    assert not list((tmp_path / "unrolled").glob("*.py"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "unrolled")
    assert type(theirs).__name__ == "LlamaForCausalLM"


def test_mistakes_of_an_export(tmp_path, capsys):
    write_run(tmp_path / "run", **KINDS["expert"])
    checkpoint.export(str(tmp_path / "run"), tmp_path / "mor")
    capsys.readouterr()
    for words, argv in (
        ("exists already", ["export", tmp_path / "run", tmp_path / "mor"]),
        ("holds no checkpoint", ["export", tmp_path / "none", tmp_path / "new"]),
        ("required", ["export", tmp_path / "run"]),
        ("invalid choice", ["import", tmp_path / "run", tmp_path / "new"]),
    ):
        with pytest.raises(SystemExit) as stop:
            checkpoint.main([str(a) for a in argv])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "new").exists()

    # weights of the exported directory that are not its model's
    weights = checkpoint.read_weights(tmp_path / "mor")
    weights["mor.extra"] = weights.pop("mor.norm.weight")
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "mor" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing tensor mor.norm.weight; surplus tensor mor.extra"):
        from_pretrained(tmp_path / "mor")
