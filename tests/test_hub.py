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
from checkpoint import from_pretrained, open_model
from eval import Scorer
from generate import generate

transformers = pytest.importorskip("transformers")
from transformers.dynamic_module_utils import get_imports  # noqa: E402

KINDS = {
    "expert": dict(n_recursion=3, router="expert"),
    "token": dict(n_recursion=3, router="token", balance="bias", tie_embeddings=False, capacity_slack=1.0),
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
    rows = [
        dict(step=2, val_loss=8.25),
        dict(step=3, val_loss=6.75, val_loss_bpb=2.125, selected=[1.0, 0.75, 0.5]),
        dict(step=3, lm=9.5),
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    torn = '{"step": 3, "val_lo'
    (path / "metrics.jsonl").write_text("".join([*lines, torn]))
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


# Runs there, in one process that has nothing of this repository, for one directory after the other.
ELSEWHERE = """
import sys
from importlib.util import find_spec
assert not any(map(find_spec, "checkpoint model ops prepare tiktoken datasets accelerate".split()))
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)

def visit(directory, ids, padded, text):
    model = load(directory)
    greedy = dict(max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    write = lambda x=ids, **options: model.generate(x, **greedy | options).tolist()
    found = dict(where=sys.modules[type(model.mor).__module__].__file__)

    out = model(ids, labels=ids)
    found |= dict(logits=out.logits, loss=out.loss, last=model(ids, logits_to_keep=1).logits)
    for side, (x, mask) in padded.items():
        out = model(x, attention_mask=mask, labels=x)
        found[side] = out.logits, out.loss, write(x, attention_mask=mask)
    model.train()
    found["training loss"] = model(ids, labels=ids).loss
    model.eval()

    found |= dict(plain=model.mor.generate(ids, 9), generated=write(), long=write(max_new_tokens=99))
    found |= dict(exact=write(slack=1e6), uncached=write(use_cache=False), shallow=write(max_depth=1))
    found["sampled"] = write(do_sample=True, num_return_sequences=3)
    try:
        write(num_beams=3)
    except ValueError as e:
        found["beams"] = str(e)
    cached = model(ids[:, :5], use_cache=True)
    steps = [model(ids[:, t : t + 1], past_key_values=cached.past_key_values).logits for t in range(5, 8)]
    found["cached"] = torch.cat([cached.logits, *steps], 1)

    half = load(directory, dtype=torch.bfloat16).mor
    found["half"] = half.wte.weight.dtype, half.rope
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found["tokens"] = tokenizer(text).input_ids, tokenizer.eos_token_id
    model.save_pretrained(directory + "-again")
    tokenizer.save_pretrained(directory + "-again")
    found["again"] = load(directory + "-again")(ids).logits
    return found

with torch.no_grad():
    torch.save([visit(**given) for given in torch.load("given.pt")], "found.pt")
"""


@pytest.fixture(scope="module")
def elsewhere(python, tmp_path_factory) -> tuple[Path, dict]:
    """Returns (directory, kind -> (model, inputs, what they gave elsewhere)), with all exports in the directory."""
    home = tmp_path_factory.mktemp("elsewhere")
    (home / "script.py").write_text(ELSEWHERE)
    models, given = [], []
    for kind, fields in KINDS.items():
        models.append(write_run(home / f"run-{kind}", **fields))
        directory = home / f"{kind}-1.0"
        checkpoint.main(["export", str(home / f"run-{kind}"), str(directory)])
        ids = torch.randint(259, (2, 20), generator=torch.Generator().manual_seed(5))
        rows = [ids[0].tolist(), ids[1, :7].tolist()]
        padded = {side: pad(rows, side) for side in ("left", "right")}
        given.append(dict(directory=str(directory), ids=ids, padded=padded, text=TEXT))
    torch.save(given, home / "given.pt")

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    env = kept | dict(HF_HOME=str(home / "hf"), HF_MODULES_CACHE=str(home / "modules"), HF_HUB_OFFLINE="1")
    command = [python, "-I", "script.py"]
    process = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    found = torch.load(home / "found.pt")
    return home, dict(zip(KINDS, zip(models, given, found, strict=True), strict=True))


def pad(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids, of which padding is the end-of-text token, and their attention mask."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 259)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        end = start + len(row)
        ids[i, start:end] = torch.tensor(row)
        mask[i, start:end] = 1
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_elsewhere(kind, elsewhere):
    home, results = elsewhere
    model, given, found = results[kind]
    ids = given["ids"]
    assert Path(found["where"]).is_relative_to(home / "modules")
    with torch.no_grad():
        out = model.eval()(ids, labels=ids)
        trained = model.train()(ids, labels=ids).loss
    model.eval()
    close = dict(atol=1e-4, rtol=0)
    for name, expected in dict(logits=out.logits, last=out.logits[:, -1:], cached=out.logits[:, :8]).items():
        torch.testing.assert_close(found[name], expected, **close)
    torch.testing.assert_close(found["loss"], out.loss, **close)
    torch.testing.assert_close(found["training loss"], trained, **close)
    dtype, rope = found["half"]
    assert dtype == torch.bfloat16 and rope.dtype == torch.float32
    torch.testing.assert_close(rope, model.rope)

    # a padded row is what it is alone
    for side, (padded, mask) in given["padded"].items():
        logits, loss, _ = found[side]
        nll = []
        for i, real in enumerate(mask.bool()):
            row = padded[i, real]
            alone = model(row[None]).logits[0].detach()
            torch.testing.assert_close(logits[i, real], alone, **close)
            nll.append(F.cross_entropy(alone[:-1], row[1:], reduction="none"))
        torch.testing.assert_close(loss, torch.cat(nll).mean(), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_elsewhere(kind, elsewhere):
    home, results = elsewhere
    model, given, found = results[kind]
    rows = given["ids"].tolist()

    def write(**options) -> list[list[int]]:
        new = generate(model, rows, 9, compile=False, **options).tokens
        return [prompt + tokens for prompt, tokens in zip(rows, new, strict=True)]

    assert found["generated"] == write() and [row[20:] for row in write()] == found["plain"]
    assert found["exact"] == found["uncached"] == write(slack=1e6)
    assert found["shallow"] == write(max_depth=1)
    if kind == "token":  # its cache is so tight that tokens find no slot: it must have the same size there
        assert write() != write(slack=1e6)
    for side, (padded, mask) in given["padded"].items():
        prompts = [x[real].tolist() for x, real in zip(padded, mask.bool(), strict=True)]
        assert [row[20:] for row in found[side][2]] == generate(model, prompts, 9, compile=False).tokens
    assert [len(row) for row in found["long"]] == [model.config.block_size] * 2
    assert [row[:20] for row in found["sampled"]] == [row for row in rows for _ in range(3)]
    assert "num_beams=1" in found["beams"]
    enc = prepare.load_tokenizer(home / f"run-{kind}" / "own.tiktoken")
    assert found["tokens"] == (enc.encode_ordinary(TEXT), 259)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_elsewhere_and_read_here(kind, elsewhere):
    home, results = elsewhere
    model, given, found = results[kind]
    logits = model.eval()(given["ids"]).logits
    torch.testing.assert_close(found["again"], logits, atol=1e-4, rtol=0)
    for place in (home / f"{kind}-1.0", home / f"{kind}-1.0-again"):
        ours, enc, _ = open_model(place)
        assert ours.config == model.config and torch.equal(ours(given["ids"]).logits, logits)
        assert enc.encode_ordinary(TEXT) == found["tokens"][0]
        assert {file.stem for file in place.glob("*.py")} == set(checkpoint.HUB_FILES)


def use_modules_of(directory: Path, monkeypatch) -> None:
    """Lets transformers put the programs of exports here, as in a process that has loaded none yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(directory))


@pytest.mark.parametrize("kind", ["expert", "token"])
def test_the_harness_gives_the_same_numbers_through_transformers(kind, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")  # which the harness needs for transformers
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(sys, "path", sys.path.copy())
    use_modules_of(tmp_path / "modules", monkeypatch)
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
    settings = dict(until=["\n"], max_gen_toks=12, do_sample=False)
    prompts = ["the model", TEXT, "then", "zzzz" * 5, "0123456789" * 2]
    a, b = ask("generate_until", *((prompt, settings | dict(slack=1e6)) for prompt in prompts))
    assert a == b and any(a)
    if kind == "token":  # whose cache is tight: what the model card says of slack is needed
        assert "--gen_kwargs slack=1e6" in (tmp_path / "exported" / "README.md").read_text()
        a, b = ask("generate_until", *((prompt, settings) for prompt in prompts))
        assert a != b


@torch.no_grad()
def test_a_llama_through_every_door(tmp_path, capsys, monkeypatch):
    """Sampled and evaluated as it is, uptrained to a MoR, exported, and read by transformers, which has the last word
    on ids, logits and greedy tokens."""
    import eval as evaluation
    import sample
    import train

    # a tiny Llama whose tokenizer.json splits digits, as SmolLM's does
    llama, mor = tmp_path / "llama", tmp_path / "mor"
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=6, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=48, tie_word_embeddings=True, eos_token_id=258)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=260, **sizes)).eval()
    for p in theirs.parameters():
        p.copy_(torch.randn_like(p) * p.size(-1) ** -0.5 if p.dim() == 2 else 1 + 0.1 * torch.randn_like(p))
    theirs.save_pretrained(llama)
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257}
    special = {prepare.EOT: 259, "<|im_end|>": 258}
    prepare.save_tokenizer(prepare.make_encoding("own", ranks, prepare.DIGITS_PATTERN, special), llama)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(dict(text=f"{TEXT} {i}" * 3)) + "\n" for i in range(40)))

    # as it is: the ids, the greedy tokens, and the end that its config.json names
    flags = ["--temperature", "0", "--max-new-tokens", "20"]
    sample.main([str(llama), "the text 12", *flags])
    text = capsys.readouterr().out
    model, enc, config = open_model(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("the text 12", return_tensors="pt").input_ids
    assert ids[0].tolist() == enc.encode_ordinary("the text 12") and config["data"]["eos"] == 258
    new = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=259)[0]
    assert text.rstrip("\n") == enc.decode_bytes(new[new != 258].tolist()).decode("utf-8", "replace").rstrip("\n")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
    argv = ["prepare.py", tmp_path / "text.jsonl", "--out", tmp_path / "data", "--tokenizer", llama]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--val-fraction", "0.3"])
    prepare.main()
    evaluation.main(
        [str(llama), "--data", str(tmp_path / "data"), "--tokens", "96", "--html", str(tmp_path / "a.html")]
    )
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])["causal"]["nll"]
    rows = torch.from_numpy(prepare.Shards(tmp_path / "data", "val").blocks(48, 96))
    expected = F.cross_entropy(theirs(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    assert measured == pytest.approx(expected.item(), abs=1e-5)

    # uptrained, exported, and elsewhere
    argv = ["--init-from", llama, "--n-recursion", 2, "--router", "expert", "--data", tmp_path / "data", "--steps", 2]
    argv += ["--out", tmp_path / "run", "--batch-tokens", 96, "--eval-tokens", 96, "--no-compile", "--dtype", "fp32"]
    with torch.enable_grad():
        train.main([*map(str, argv)])
    checkpoint.export(str(tmp_path / "run"), mor)
    use_modules_of(tmp_path / "modules", monkeypatch)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    model, enc, _ = open_model(tmp_path / "run")
    assert (model.config.router, model.config.n_recursion, model.config.n_layer) == ("expert", 2, 6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mor, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(mor, trust_remote_code=True)
    ids = tokenizer("the text 12", return_tensors="pt").input_ids
    assert ids[0].tolist() == enc.encode_ordinary("the text 12")
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    new = theirs.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=259)[0, ids.size(1) :]
    assert new.tolist() == generate(model, ids.tolist(), 9, compile=False).tokens[0]


def test_what_the_directory_says_of_itself(tmp_path, capsys):
    model = write_run(tmp_path / "run", **KINDS["expert"])
    checkpoint.export(str(tmp_path / "run"), tmp_path / "mor")
    card = (tmp_path / "mor" / "README.md").read_text()
    assert card.count('"mor", trust_remote_code=True') == 2  # for the tokenizer too, or a question would be asked
    assert "6.7500 nats per token, 2.1250 bits" in card and "2.25 rec" in card and "8.25" not in card
    assert f"{model.num_params(embedding=True):,}" in card
    # transformers demands that whatever the code imports is installed
    for file in (tmp_path / "mor").glob("*.py"):
        assert set(get_imports(file)) <= {"torch", "transformers"} | sys.stdlib_module_names
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "mor")
    assert generation.eos_token_id == generation.pad_token_id == 259

    write_run(tmp_path / "llama", n_recursion=3)
    checkpoint.export(str(tmp_path / "llama"), tmp_path / "unrolled")
    assert "trust_remote_code" not in (tmp_path / "unrolled" / "README.md").read_text()
    assert not list((tmp_path / "unrolled").glob("*.py"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "unrolled")
    assert type(theirs).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "why, pattern",
    [
        ("a pattern that transformers cannot read", r"\p{scx=Greek}+|[^\s\p{scx=Greek}]+|\s"),
        ("a set of characters that it reads otherwise", r"[\w--\d]+|\d|[^\w]"),
        ("ids that it would not give", r"[a-z],$|[^\n]|\n"),  # for it, a line may end where $ is
    ],
)
def test_a_tokenizer_that_transformers_lacks(why, pattern, tmp_path, capsys):
    """Such a run is exported all the same, says so in one line, and is read here with its own ids."""
    model = write_run(tmp_path / "run", **KINDS["expert"])
    ranks = tmp_path / "run" / "own.tiktoken"
    first = json.dumps(dict(pattern=pattern, special={prepare.EOT: 259}))
    tokens = ranks.read_bytes().replace(base64.b64encode(b"the"), base64.b64encode(b"s,"))
    ranks.write_bytes(f"#{first}\n".encode() + tokens)
    own = prepare.load_tokenizer(ranks)
    checkpoint.export(str(tmp_path / "run"), tmp_path / "mor")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[1].startswith("note: ") and "own.tiktoken" in said[1]
    assert not list((tmp_path / "mor").glob("tokenizer*"))
    assert "AutoTokenizer" not in (tmp_path / "mor" / "README.md").read_text()
    again, enc, config = open_model(tmp_path / "mor")
    assert again.config == model.config and config["data"]["eot"] == 259
    assert enc.encode_ordinary(prepare.PROBE) == own.encode_ordinary(prepare.PROBE)


def test_mistakes_of_an_export(tmp_path, capsys):
    write_run(tmp_path / "run", **KINDS["expert"])
    checkpoint.export(str(tmp_path / "run"), tmp_path / "mor")
    capsys.readouterr()
    mistakes = {
        "mor exists already": ("export", tmp_path / "run", tmp_path / "mor"),
        ". exists already": ("export", tmp_path / "run", "."),
        "holds no checkpoint": ("export", tmp_path / "none", tmp_path / "new"),
        "required": ("export", tmp_path / "run"),
        "invalid choice": ("import", tmp_path / "run", tmp_path / "new"),
    }
    for words, argv in mistakes.items():
        with pytest.raises(SystemExit) as stop:
            checkpoint.main([str(a) for a in argv])
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "new").exists()

    # weights of the exported directory that are not its model's
    weights = checkpoint.read_weights(tmp_path / "mor")
    weights["mor.extra"] = weights.pop("mor.norm.weight")
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "mor" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing tensor mor.norm.weight; surplus tensor mor.extra"):
        from_pretrained(tmp_path / "mor")
