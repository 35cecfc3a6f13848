"""checkpoint.py: every layout that a model may lie in, read by itself; what is wrong with one, in its own words."""

import base64
import json
from pathlib import Path

import pytest
import torch
from conftest import load_golden, make_model, tiny
from safetensors.torch import save_file

import checkpoint
from checkpoint import from_pretrained, open_model
from model import MoR

GOLDEN = {"expert_mc3": "expert", "token_mc3_softmax": "token"}


def llama_config(**changes) -> dict:
    """A config.json as transformers writes it, of the golden models."""
    sizes = dict(model_type="llama", vocab_size=257, hidden_size=64, intermediate_size=160, num_hidden_layers=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5)
    return sizes | heads | dict(tie_word_embeddings=True, hidden_act="silu", rope_theta=10000.0) | changes


def golden_weights(case: str, repeated: bool = True) -> dict:
    golden, about = load_golden(case)
    weights = {name[2:]: w.float() for name, w in golden.items() if name.startswith("w.")}
    if repeated:
        weights |= {copy: weights[stored].clone() for copy, stored in about["aliases"].items()}
    return weights


def write_directory(path: Path, weights: dict, form: str, config: dict | None = None) -> Path:
    """Writes weights in one of the forms in which people have them."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or llama_config()))
    halves = [dict(list(weights.items())[i::2]) for i in (0, 1)]
    if form == "safetensors":
        save_file(weights, path / "model.safetensors")
    elif form in ("bin", "old bin"):
        zipped = form == "bin"  # torch before 1.6 wrote one pickle after the other
        torch.save(weights, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    else:
        names = [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
        for name, half in zip(names, halves, strict=True):
            torch.save(half, path / name)
        if form == "indexed":
            where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
            (path / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=where)))
    return path


def write_tokenizer(path: Path, tokens: int = 256) -> None:
    lines = [base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(tokens)]
    (path / "bytes.tiktoken").write_bytes(b"".join(lines))


@torch.no_grad()
@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin", "shards", "indexed"])
def test_authors_checkpoints_are_read_as_they_are(case, form, tmp_path):
    """Nothing but the directory is given: router, N_r and sharing come from names and shapes."""
    golden, _ = load_golden(case)
    model = from_pretrained(write_directory(tmp_path / "theirs", golden_weights(case), form)).eval()
    c = model.config
    assert (c.router, c.n_recursion, c.sharing, c.n_layer) == (GOLDEN[case], 3, "middle_cycle", 8)
    logits = model(golden["input_ids"], routing="topk").logits
    torch.testing.assert_close(logits, golden["eval.logits"], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("case", GOLDEN)
def test_tied_copies_need_not_be_repeated(case, tmp_path):
    golden, _ = load_golden(case)
    model = from_pretrained(write_directory(tmp_path / "once", golden_weights(case, repeated=False), "bin")).eval()
    logits = model(golden["input_ids"], routing="topk").logits
    torch.testing.assert_close(logits, golden["eval.logits"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="n_recursion"):
        from_pretrained(tmp_path / "once", n_recursion=2)
    shared = from_pretrained(tmp_path / "once", kv="share")
    assert shared.config.kv == "share"


KINDS = {
    "vanilla": dict(),
    "recursive": dict(n_recursion=3),
    "recursive, all layers": dict(n_recursion=4, sharing="cycle"),
    "sequence": dict(n_recursion=2, sharing="sequence"),
    "middle sequence": dict(n_recursion=3, sharing="middle_sequence"),
    "expert": dict(n_recursion=2, router="expert"),
    "expert, all layers": dict(n_recursion=4, sharing="cycle", router="expert"),
    "auxiliary router": dict(n_recursion=3, router="expert", causality="aux_router"),
    "mlp router": dict(n_recursion=3, router="expert", router_arch="mlp"),
    "token": dict(n_recursion=3, router="token"),
    "token, all layers": dict(n_recursion=2, sharing="cycle", router="token"),
    "token, bias": dict(n_recursion=3, router="token", balance="bias"),
    "own head": dict(n_recursion=3, tie_embeddings=False),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", [True, False])
def test_layout_is_known_by_names(kind, said, tmp_path):
    """Every kind of model in the authors' names beside a plain config.json, which may leave the tying unsaid."""
    model = make_model(tiny(**KINDS[kind])).eval()
    own = model.state_dict()
    weights = {theirs: own[ours].clone() for theirs, ours in checkpoint.reference_names(model).items()}
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=40, max_position_embeddings=48)
    config = llama_config(**sizes, tie_word_embeddings=model.config.tie_embeddings)
    if not said:
        del config["tie_word_embeddings"]
    again = from_pretrained(write_directory(tmp_path / "x", weights, "safetensors", config)).eval()
    assert again.config == model.config
    x = torch.randint(61, (2, 20))
    assert torch.equal(again(x).logits, model(x).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["recursive", "expert", "random", "qk_norm"])
def test_open_model_takes_whatever_holds_one(kind, tmp_path, capsys):
    """A run, its checkpoint, its export, and (tokenizer or not) the same weights without a run."""
    more = dict(random=dict(n_recursion=3, router="random"), qk_norm=dict(qk_norm=True))
    model = make_model(tiny(vocab_size=257, **(KINDS | more)[kind])).eval()
    run = tmp_path / "run"
    run.mkdir()
    write_tokenizer(run)
    data = dict(tokenizer="bytes.tiktoken", vocab_size=257, eot=256)
    config = dict(model=model.config.asdict(), data=data, train=dict(data="nowhere"))
    with checkpoint.written_at_once(run / "ckpt_000003.pt") as f:
        checkpoint.write_state(f, dict(model=model.state_dict(), config=config, step=3))
    checkpoint.export(str(run), tmp_path / "exported")
    x = torch.randint(257, (2, 20))
    for place in (run, run / "ckpt_000003.pt", tmp_path / "exported"):
        opened, enc, config = open_model(place)
        assert not opened.training and torch.equal(opened(x).logits, model(x).logits)
        assert enc.decode(enc.encode_ordinary("a word")) == "a word"
        assert (config["data"]["vocab_size"], config["data"]["eot"]) == (257, 256)
        assert config["model"]["n_recursion"] == model.config.n_recursion
    assert open_model(run, dtype=torch.bfloat16)[0].wte.weight.dtype == torch.bfloat16
    authors = write_directory(tmp_path / "authors", golden_weights("expert_mc3"), "bin")
    opened, enc, config = open_model(authors)
    assert opened.config.router == "expert" and enc is None and config["data"] == {} == config["train"]


def change(name, function):
    def apply(weights):
        weights[name] = function(weights[name])

    return apply


Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
WRONG = {
    "nan": (change(NORM, lambda w: w * torch.nan), f"{NORM} is not finite"),
    "inf": (change(Q, lambda w: w + torch.inf), f"{Q} is not finite"),
    "int8": (change(Q, lambda w: w.to(torch.int8)), "quantized: model.layers.0.self_attn.q_proj.weight (torch.int8)"),
    "int64": (change(NORM, lambda w: w.long()), "quantized"),
    "adapter": (lambda w: w.update(lora_A=w.pop(Q), lora_B=w[NORM].clone()), "LoRA adapter"),
    "lora": (lambda w: w.update({"base.q.lora_A.weight": w.pop(Q)}), "LoRA adapter"),
    "missing": (lambda w: w.pop(NORM), f"missing tensor {NORM}"),
    "surplus": (lambda w: w.update(extra=w[NORM].clone()), "surplus tensor extra"),
    "shape": (change(Q, lambda w: w[:2].clone()), f"{Q} has shape (2, 64)"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_wrong_weights_are_named(name, form, tmp_path, capsys):
    spoil, message = WRONG[name]
    weights = golden_weights("expert_mc3")
    spoil(weights)
    path = write_directory(tmp_path / "x", weights, form)
    with pytest.raises(ValueError) as error:
        from_pretrained(path)
    assert message in str(error.value)
    with pytest.raises(SystemExit) as stop:
        open_model(path)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_wrong_directories_are_named(tmp_path, monkeypatch, capsys):
    weights = golden_weights("token_mc3_softmax")
    plain = write_directory(tmp_path / "plain", weights, "safetensors")
    half = write_directory(tmp_path / "half", weights, "shards")
    (half / "pytorch_model-00002-of-00002.bin").unlink()
    listed = write_directory(tmp_path / "listed", weights, "indexed")
    (listed / "pytorch_model-00001-of-00002.bin").unlink()
    empty = write_directory(tmp_path / "empty", weights, "safetensors")
    (empty / "model.safetensors").unlink()
    nested = write_directory(tmp_path / "nested", dict(model=weights, step=3), "bin")
    pickled = write_directory(tmp_path / "pickled", dict(a=Path("x")), "bin")  # weights_only refuses code
    cut = write_directory(tmp_path / "cut", weights, "bin")
    whole = (cut / "pytorch_model.bin").read_bytes()
    (cut / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    cut_too = write_directory(tmp_path / "cut too", weights, "safetensors")
    whole = (cut_too / "model.safetensors").read_bytes()
    (cut_too / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    monkeypatch.chdir(tmp_path)
    cases = {
        half: "1 of 2 files pytorch_model-*.bin",
        listed: "lacks pytorch_model-00001-of-00002.bin",
        empty: "holds no weights",
        nested: "holds model, step beside or instead of tensors",
        pickled: "pytorch_model.bin cannot be read",
        cut: "pytorch_model.bin cannot be read",
        cut_too: "model.safetensors cannot be read",
        plain / "model.safetensors": "is a file: name the directory",
        plain / "config.json": "is a file: name the directory",
        Path("HuggingFaceTB/SmolLM-360M"): "hf download HuggingFaceTB/SmolLM-360M --local-dir SmolLM-360M",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError) as error:
            from_pretrained(path)
        assert message in str(error.value), path
        if path.parent != plain and path != empty:  # what sample.py and eval.py say; of these two, that they are no run
            with pytest.raises(SystemExit) as stop:
                open_model(path)
            err = capsys.readouterr().err
            assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "no model."])
def test_names_that_wrappers_change(prefix, tmp_path):
    weights = golden_weights("expert_mc3")
    if prefix == "no model.":  # LlamaModel without its head
        renamed = {name.removeprefix("model."): w for name, w in weights.items()}
    else:
        renamed = {prefix + name: w for name, w in weights.items()}
    golden, _ = load_golden("expert_mc3")
    model = from_pretrained(write_directory(tmp_path / "x", renamed, "bin")).eval()
    logits = model(golden["input_ids"], routing="topk").logits
    torch.testing.assert_close(logits, golden["eval.logits"], atol=1e-4, rtol=0)


def test_keys_that_config_json_leaves_out_have_the_class_defaults(tmp_path):
    transformers = pytest.importorskip("transformers")
    defaults = transformers.LlamaConfig().to_dict()
    for key, value in checkpoint.LLAMA.items():
        assert defaults[key] == value, key
    config = llama_config()
    del config["rms_norm_eps"], config["hidden_act"]
    path = write_directory(tmp_path / "x", golden_weights("expert_mc3"), "bin", config)
    assert from_pretrained(path).config.norm_eps == 1e-6


def test_nothing_changes_when_loading_fails():
    model = MoR(tiny())
    before = {name: w.clone() for name, w in model.state_dict().items()}
    weights = {theirs: before[ours].clone() for theirs, ours in checkpoint.reference_names(model).items()}
    weights["model.norm.weight"][0] = torch.nan
    with pytest.raises(ValueError, match="model.norm.weight is not finite$"):
        model.load_reference_state_dict(weights)
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
