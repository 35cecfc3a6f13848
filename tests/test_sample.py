"""Generation, cached and compiled, against a loop over the full forward; the command line and its errors."""

import base64
import gc
import html
import io
import json
import os
import pty
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model, tiny

from checkpoint import load_run, run_tokenizer, write_state
from generate import Decoder, Graphs, bucket, generate, sample_token, uniform
from model import MoR
from sample import main
from show import Painter, make_visible, token_bytes

WORDS = [bytes([i]) for i in range(256)] + [b"th", b"he", b" t", b"in"]
VOCAB, EOT = len(WORDS) + 1, len(WORDS)
MODELS = {
    "vanilla": dict(),
    "recursive": dict(n_recursion=3),
    "expert": dict(n_recursion=3, router="expert"),
    "expert share": dict(n_recursion=3, router="expert", kv="share"),
    "expert cycle": dict(n_recursion=2, router="expert", sharing="cycle"),
    "aux_router": dict(n_recursion=3, router="expert", causality="aux_router"),
    "token": dict(n_recursion=3, router="token"),
}
SETTINGS = [dict(), dict(temperature=1.0), dict(temperature=0.9, top_k=20, top_p=0.9)]


def some_model(name: str, **overrides) -> MoR:
    return make_model(tiny(vocab_size=VOCAB, **MODELS[name], **overrides)).eval()


def save_run(out: Path, model: MoR, step: int = 10, **data) -> Path:
    """A run directory as train.py leaves it, the tokenizer in the data directory."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    ranks = "".join(f"{base64.b64encode(word).decode()} {i}\n" for i, word in enumerate(WORDS))
    (out / "data" / "tiny.tiktoken").write_text(ranks)
    data = dict(vocab_size=VOCAB, tokenizer="tiny.tiktoken", eot=EOT) | data
    config = dict(model=model.config.asdict(), train=dict(data=str(out / "data")), data=data)
    with open(out / f"ckpt_{step:06d}.pt", "wb") as f:
        write_state(f, dict(model=model.state_dict(), optimizer={}, step=step, config=config))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"), some_model("expert"))


def knobs(B: int, temperature: float = 0.0, top_k: int = VOCAB, top_p: float = 1.0, seed=0) -> dict[str, torch.Tensor]:
    full = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return {
        name: torch.tensor([value] * B) if name != "seed" else seed + torch.arange(B) for name, value in full.items()
    }


@torch.no_grad()
def by_full_forward(model: MoR, prompt: list[int], n: int, seed: int, stop: int = -1, forward=None, **settings):
    """(new tokens, depth of all tokens), each token from a forward over everything before it."""
    ids = list(prompt)
    forward = forward or {}
    while len(ids) < min(len(prompt) + n, model.config.block_size):
        logits = model(torch.tensor([ids]), **forward).logits[:, -1]
        token = int(sample_token(logits, knobs(1, seed=seed, **settings), torch.tensor([len(ids)]), filtered=True))
        if token == stop:
            break
        ids.append(token)
    return ids[len(prompt) :], model(torch.tensor([ids]), **forward).depth[0].tolist()


PROMPTS = [[1, 2, 3], [5, 40, 7] * 7, [EOT]]


def check(model: MoR, decoder: Decoder, settings: dict, prompts=PROMPTS, n: int = 24, **forward) -> None:
    got = generate(model, prompts, n, seed=3, decoder=decoder, **settings)
    for row, prompt in enumerate(prompts):
        tokens, depth = by_full_forward(model, prompt, n, 3 + row, forward=forward, **settings)
        assert got.tokens[row] == tokens
        assert got.depth[row] == depth


# ---- generate


@pytest.mark.parametrize("early_exit", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_generation_equals_the_full_forward(name, early_exit):
    model = some_model(name)
    decoder = Decoder(model, 3, 48, slack=4, compile=False, early_exit=early_exit)
    for settings in SETTINGS:
        check(model, decoder, settings)


@pytest.mark.parametrize("knob", [dict(max_depth=1), dict(max_depth=2), dict(threshold=0.7), dict(threshold=0.2)])
def test_test_time_knobs_equal_the_full_forward(knob):
    model = some_model("expert")
    check(model, Decoder(model, 3, 48, slack=4, compile=False, **knob), SETTINGS[1], **knob)


@pytest.mark.parametrize("early_exit", [False, True])
def test_compiled_generation_equals_the_full_forward_and_never_recompiles(early_exit, compiler):
    model = some_model("expert", n_layer=5)
    decoder = Decoder(model, 3, 48, slack=4, early_exit=early_exit)  # its graphs raise if they are compiled twice
    check(model, decoder, SETTINGS[1])
    check(model, decoder, SETTINGS[1], prompts=[[9] * 21, [8, 7]], n=9)
    generate(model, [[1] * 24], 3, decoder=decoder, temperature=0.3, seed=9, stop_token=4)
    stages = [("step", False)]
    if early_exit:
        check(model, decoder, SETTINGS[0])  # greedy: one more last stage
        stages = [("enter",), ("recurse", 1), ("recurse", 2), ("turn", False), ("turn", None)]
    assert set(decoder.graphs) == {("prefill", 24, False), *stages}
    assert not compiler["graph_break"]


def test_one_row_compiled_and_packed_equals_the_full_forward(compiler):
    model = some_model("expert", n_layer=5)
    decoder = Decoder(model, 1, 48, slack=4, freeze=True)
    for prompt in ([9] * 21, [8, 7]):
        check(model, decoder, SETTINGS[0], prompts=[prompt], n=9)


def test_only_cpus_pack_weights():
    assert Graphs(True, True, torch.device("cpu")).freeze
    assert not Graphs(True, True, torch.device("cuda")).freeze


def test_a_row_gives_the_same_alone_in_a_batch_and_among_idle_rows():
    model = some_model("expert")
    options = dict(slack=4, compile=False, temperature=1.0)
    together = generate(model, PROMPTS, 20, seed=5, **options)
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], 20, seed=5 + row, **options).tokens == [together.tokens[row]]
    decoder = Decoder(model, 5, 48, slack=4, compile=False)
    assert generate(model, PROMPTS, 20, seed=[5, 6, 7], decoder=decoder, temperature=1.0)[:3] == together[:3]
    assert generate(model, PROMPTS, 20, seed=6, **options).tokens != together.tokens
    assert generate(model, PROMPTS, 20, seed=5 + 2**80, **options).tokens == together.tokens


def test_rows_end_at_the_stop_token_at_their_length_and_at_the_context():
    model = some_model("expert")
    options = dict(temperature=1.0, seed=2, slack=4, compile=False)
    free = generate(model, [[1, 2], [3] * 40], 12, **options)
    assert [len(t) for t in free.tokens] == [12, 8] and free.stopped == [False, False]  # 48 is the context
    stop = free.tokens[0][5]
    heard = []
    out = generate(model, [[1, 2], [3] * 40], 12, stop_token=stop, on_token=lambda *x: heard.append(x), **options)
    expected = [t[: t.index(stop)] if stop in t else t for t in free.tokens]
    assert out.tokens == expected and out.stopped == [stop in t for t in free.tokens]
    for row, prompt in enumerate([[1, 2], [3] * 40]):
        mine = [(t, d) for r, t, d in heard if r == row]
        assert mine == [*zip(prompt + expected[row], out.depth[row], strict=True), (None, None)]


def test_a_stop_token_in_the_prompt_does_not_stop():
    out = generate(some_model("expert"), [[EOT]], 4, stop_token=EOT, compile=False, temperature=1.0)
    assert out.tokens[0] or out.stopped == [True]  # it was drawn, not read from the prompt
    assert len(out.depth[0]) == 1 + len(out.tokens[0])


@pytest.mark.parametrize("threshold, short", [(0.5, False), (0.001, True)])
def test_long_prompts_are_computed_as_sparsely_as_routing_allows(threshold, short):
    model = some_model("expert", block_size=192)
    prompts = [torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (150, 9)]
    slack = 3 if not short else 1.25
    decoder = Decoder(model, 2, 192, slack=slack, threshold=threshold, compile=False)
    tried, run = [], decoder.graphs.run
    decoder.graphs.run = lambda key, *rest: (tried.append(key), run(key, *rest))[1]
    out = generate(model, prompts, 5, decoder=decoder)
    tight = [key[2] for key in tried if key[0] == "prefill"]
    assert tight == ([True, False] if short else [True])
    if not out.overflow:
        check(model, decoder, SETTINGS[0], prompts, n=5, threshold=threshold)


def test_memory_is_flat_over_many_requests():
    model = some_model("expert")
    decoder = Decoder(model, 2, 48, compile=False)
    counts = []
    for i in range(30):
        generate(
            model, [[i + 1] * (1 + i * 7 % 40), [2]][: 1 + i % 2], 1 + i % 5, seed=i, decoder=decoder, temperature=i % 3
        )
        gc.collect()
        counts.append(sum(type(x) is torch.Tensor for x in gc.get_objects()))
    assert len(set(counts[10:])) == 1


@pytest.mark.soak
def test_a_thousand_requests_leave_memory_flat_and_compile_nothing():
    decoder, rng = Decoder(some_model("expert", n_layer=5), 2, 48, slack=4), random.Random(0)

    def serve(n: int) -> int:
        for _ in range(n):
            prompts = [[rng.randrange(VOCAB)] * rng.randint(1, 40) for _ in range(rng.randint(1, 2))]
            generate(decoder.model, prompts, rng.randint(1, 8), decoder=decoder)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    peak, graphs = serve(200), dict(decoder.graphs)
    assert serve(1000) < 1.01 * peak
    assert decoder.graphs == graphs  # none is new, and a graph that compiled again would have raised


def test_overflow_is_counted_and_generation_goes_on():
    out = generate(some_model("expert"), [[1, 2, 3] * 8], 20, slack=0.4, compile=False)
    assert out.overflow > 0 and len(out.tokens[0]) == 20


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([], {}, "no prompts"),
        ([[]], {}, "prompt 0 has 0 tokens"),
        ([[1], [1] * 48], {}, "prompt 1 has 48 tokens, but needs 1 to 47"),
        ([[VOCAB]], {}, "outside of the model's vocabulary"),
        ([[-1]], {}, "outside of the model's vocabulary"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens=0"),
        ([[1]], dict(temperature=-1.0), "temperature=-1.0"),
        ([[1]], dict(temperature=float("nan")), "temperature=nan"),
        ([[1]], dict(top_k=0), "top_k=0"),
        ([[1]], dict(top_p=0.0), "top_p=0.0"),
        ([[1]], dict(max_depth=4), "max_depth=4"),
        ([[1]], dict(threshold=1.0), "threshold=1.0"),
        ([[1]] * 3, dict(decoder=2), "3 prompts"),
    ],
)
def test_bad_requests(prompts, settings, message):
    model = some_model("expert")
    if "decoder" in settings:
        settings = dict(decoder=Decoder(model, settings["decoder"], 48, compile=False))
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **(dict(max_new_tokens=4) | settings))


# ---- drawing


def test_noise_is_uniform_and_depends_on_seed_position_and_token():
    u = uniform(torch.arange(64), torch.full((64,), 5), 4096)
    assert 0 < u.min() and u.max() < 1
    assert torch.histc(u, 16, 0, 1).sub(u.numel() / 16).abs().max() < 5 * (u.numel() / 16) ** 0.5
    assert abs(torch.corrcoef(u).triu(1)).max() < 6 / 4096**0.5  # rows do not resemble each other
    assert torch.equal(u[3], uniform(torch.tensor([3]), torch.tensor([5]), 4096)[0])
    assert not torch.equal(u[3], uniform(torch.tensor([3]), torch.tensor([6]), 4096)[0])


@pytest.mark.parametrize("top_k, top_p", [(VOCAB, 1.0), (1, 1.0), (5, 1.0), (VOCAB, 0.5), (40, 0.8), (3, 0.01)])
def test_draws_follow_the_filtered_distribution(top_k, top_p):
    """Frequencies over many seeds against probabilities by sorting."""
    torch.manual_seed(0)
    logits, n, t = torch.randn(VOCAB) * 2, 20000, 0.7
    best, order = (logits / t).sort(descending=True)
    p = best.softmax(0) * (torch.arange(VOCAB) < top_k)
    p = p / p.sum()
    p = p * (p.cumsum(0) - p < top_p)
    p = torch.zeros(VOCAB).scatter(0, order, p / p.sum())
    drawn = sample_token(logits.expand(n, -1), knobs(n, t, top_k, top_p), torch.full((n,), 7), filtered=True)
    count = torch.bincount(drawn, minlength=VOCAB)
    assert not count[p == 0].any()
    assert ((count - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()


def test_each_row_has_its_own_settings():
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    mixed = {k: torch.cat([knobs(1, *s)[k] for s in ((0.0,), (1.0, 1), (1.0,))]) for k in knobs(1)}
    drawn = sample_token(logits, mixed, torch.tensor([1, 2, 3]), filtered=True)
    assert drawn[:2].tolist() == logits[:2].argmax(-1).tolist()
    assert drawn[2] == sample_token(logits[2:], knobs(1, 1.0), torch.tensor([3]), filtered=False)


def test_buckets_waste_less_than_a_quarter():
    sizes = [bucket(n, 2048) for n in range(1, 2049)]
    assert all(16 <= s <= 2048 and s >= n for n, s in enumerate(sizes, 1))
    assert max((s - n) / s for n, s in enumerate(sizes, 1) if n > 16) < 0.25
    assert len(set(sizes)) < 24
    assert bucket(5, 12) == 12 and bucket(48, 48) == 48


# ---- checkpoints


def test_load_run_takes_the_newest_good_checkpoint(tmp_path, capsys):
    model = some_model("expert")
    save_run(tmp_path, model, step=999_999)
    save_run(tmp_path, model, step=1_000_000)
    path = tmp_path / "ckpt_1000000.pt"
    assert load_run(tmp_path)[2]["step"] == 1_000_000
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit
    path.write_bytes(damaged)
    loaded, meta, checkpoint = load_run(tmp_path)
    assert checkpoint["step"] == 999_999 and meta["eot"] == EOT and not loaded.training
    assert "ckpt_1000000.pt" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert load_run(tmp_path / "ckpt_999999.pt", dtype=torch.bfloat16)[0].wte.weight.dtype == torch.bfloat16


def alter(tmp_path: Path, change) -> Path:
    save_run(tmp_path, some_model("expert"))
    path = tmp_path / "ckpt_000010.pt"
    checkpoint = torch.load(path)
    change(checkpoint)
    with open(path, "wb") as f:
        write_state(f, checkpoint)
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["model"]["wte.weight"].fill_(float("nan")), "weights are not finite (wte.weight"),
        (lambda c: c["model"].pop("wte.weight"), "do not fit the configuration"),
        (lambda c: c["config"]["model"].update(vocab_size=VOCAB + 1), "do not fit the configuration"),
        (lambda c: c["config"]["model"].update(n_head=3), "cannot be read"),
        (lambda c: c["config"]["model"].update(wings=2), "cannot be read"),
        (lambda c: c.pop("config"), "cannot be read"),
        (lambda c: c["config"]["data"].update(vocab_size=VOCAB + 1), f"{VOCAB + 1} token ids"),
        (lambda c: c["config"]["data"].update(vocab_size=VOCAB - 1), f"has {VOCAB} tokens"),
        (lambda c: c["config"]["data"].update(tokenizer="other.tiktoken"), "copy it to"),
        (lambda c: c["config"]["data"].update(tokenizer="nonesuch"), "nonesuch"),
    ],
)
def test_checkpoints_that_are_wrong(tmp_path, capsys, change, message):
    fails([str(alter(tmp_path, change)), "in"], message, capsys)


def test_the_tokenizer_beside_the_checkpoint_comes_first(tmp_path):
    save_run(tmp_path, some_model("expert"))
    checkpoint = load_run(tmp_path)[2]
    (tmp_path / "data" / "tiny.tiktoken").rename(tmp_path / "tiny.tiktoken")
    assert run_tokenizer(tmp_path, checkpoint).encode_ordinary("the") == [256, ord("e")]
    assert run_tokenizer(tmp_path / "ckpt_000010.pt", checkpoint).n_vocab == VOCAB


# ---- command line


def fails(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--temperature", "warm"], "--temperature"),
        (["--top-k", "0"], "top_k=0"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--samples", "0"], "--samples 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--max-depth", "4"], "max_depth=4"),
        (["--threshold", "0"], "threshold=0"),
        (["--slack", "0"], "slack=0"),
        (["--slack", "nan"], "slack=nan"),
        (["--temperature", "1e999"], "temperature=inf"),
        (["--seed", "1.5"], "--seed"),
        (["--top-k", "nan"], "--top-k"),
        (["--html", "/nonesuch/a.html"], "--html"),
        (["--html", "/"], "is a directory"),
        (["--samples", "1e9", "--batch", "1e9"], "out of memory"),
        (["--prompts", "a.jsonl", "--html", "a.html"], "give one of"),
        (["--device", "warp"], "--device warp"),
        (["--heatmap", "/nonesuch/a.png"], "--heatmap"),
        (["--heatmap", "a.doc"], "--heatmap"),
        (["--file", "nonesuch.txt"], "give one of"),
        (["--wings"], "--wings"),
        (["x" * 48], "prompt 0 has 48 tokens"),
    ],
)
def test_bad_flags(run, capsys, flags, message):
    prompt = [] if flags[0].startswith("x") else ["in"]
    fails([str(run), *prompt, *flags], message, capsys)


def text_of(argv: list, capsys) -> str:
    main(["--max-new-tokens", "6", "--no-stop", *map(str, argv)])
    return capsys.readouterr().out


def test_options_and_prompt_in_any_order(run, capsys):
    usual = text_of([run, "the in", "--temperature", "0", "--seed", "3"], capsys)
    assert usual.startswith("the in")
    assert text_of(["--temperature", "0", run, "--seed", "3", "the in"], capsys) == usual
    assert text_of([run, "--temperature", "0", "--no-compile", "the in", "--seed", "3"], capsys) == usual
    assert text_of(["--temperature", "0", "--", run, "the in"], capsys) == usual
    assert text_of(["--temperature", "0", run, "--", "--in"], capsys).startswith("--in")


def test_without_a_name_the_demo_is_sampled(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert text_of([], capsys) == text_of([run], capsys)
    (tmp_path / "out" / "demo").unlink()
    fails([], "make demo", capsys)


@pytest.mark.parametrize("small", ["1e-40", "1e-300", "5e-324"])
def test_a_tiny_temperature_is_greedy(run, capsys, small):
    assert text_of([run, "the", "--temperature", small], capsys) == text_of([run, "the", "--temperature", 0], capsys)


@pytest.mark.parametrize("large", ["1e39", "1e300"])
def test_a_huge_temperature_is_uniform(run, capsys, large):
    flags = ["the", "--dtype", "fp32", "--seed", "5"]
    found = text_of([run, *flags, "--temperature", large], capsys)
    assert found == text_of([run, *flags, "--temperature", 1e12], capsys) and len(set(found[3:])) > 3


def test_numbers_as_people_write_them(run, capsys):
    usual = text_of([run, "the", "--seed", 1000], capsys)
    assert text_of([run, "the", "--seed", "1e3"], capsys) == usual
    assert text_of([run, "the", "--seed", 1000 + 2**40], capsys) == usual  # seeds count modulo 2**32
    fails([str(run), "the", "--seed", str(2**80)], "whole number of 64 bits", capsys)
    assert text_of([run, "the", "--seed", 1000, "--top-k", "1e18", "--slack", "1e308"], capsys) == usual


def test_bad_files(run, tmp_path, capsys):
    fails([str(tmp_path / "nothing")], "holds no checkpoint", capsys)
    fails([str(tmp_path)], "holds no checkpoint", capsys)
    bad = tmp_path / "bad"
    bad.write_bytes(b"caf\xe9")
    fails([str(bad)], "cannot be read", capsys)
    fails([str(run), "--file", str(bad)], "line 1 is not UTF-8 text", capsys)
    fails([str(run), "--file", str(tmp_path / "nothing")], "No such file", capsys)
    for text, message in (("", "no prompts"), ('{"prompt": "a"}\n{"text": 1}', "line 2"), ('{"prompt": 3}', "line 1")):
        bad.write_text(text)
        fails([str(run), "--prompts", str(bad)], message, capsys)


def test_text_is_plain_reproducible_and_reported(run, capsys, monkeypatch):
    argv = [str(run), "the in", "--max-new-tokens", "20", "--no-stop", "--temperature", "1"]
    main(argv)
    first = capsys.readouterr()
    assert first.out.startswith("the in") and "\x1b[" not in first.out
    assert "20 tokens in" in first.err and "tokens/s" in first.err and "of 3" in first.err
    main(argv)
    assert capsys.readouterr().out == first.out
    main([*argv, "--seed", "1"])
    assert capsys.readouterr().out != first.out
    main([*argv, "--samples", "3", "--batch", "2"])
    texts = capsys.readouterr().out.split("-" * 16 + "\n")
    assert len(texts) == 3 and texts[0] == first.out and len(set(texts)) == 3
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the in")))
    main([str(run), "--file", "-", *argv[2:]])
    assert capsys.readouterr().out == first.out


def test_an_empty_prompt_starts_from_end_of_text(run, capsys):
    main([str(run), "--max-new-tokens", "5", "--no-stop", "--temperature", "0"])
    model, meta, _ = load_run(run)
    enc = run_tokenizer(run, load_run(run)[2])
    expected = enc.decode(generate(model, [[meta["eot"]]], 5, compile=False).tokens[0])
    assert capsys.readouterr().out == f"<|endoftext|>{expected}\n"


def test_colour_tells_depth(run, capsys, monkeypatch):
    argv = [str(run), "the in", "--max-new-tokens", "5", "--no-stop", "--temperature", "0"]
    main([*argv, "--color", "always"])
    colored = capsys.readouterr().out
    assert colored.startswith("recursions: \x1b[30;48;5;153m 1 \x1b[0m") and colored.count("\x1b[30") > 5
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(argv)
    assert capsys.readouterr().out == colored
    monkeypatch.setenv("NO_COLOR", "1")
    main(argv)
    assert "\x1b[30" not in capsys.readouterr().out
    main([*argv, "--color", "always"])
    assert capsys.readouterr().out == colored


def test_heatmap_is_a_picture(run, tmp_path, capsys):
    file = tmp_path / "depth.png"
    main([str(run), "the $x_1$ \u4e16 in", "--max-new-tokens", "20", "--heatmap", str(file)])
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000


def results_of(run, file, capsys, *flags) -> list[dict]:
    main([str(run), "--prompts", str(file), "--max-new-tokens", "4", "--temperature", "0", *flags])
    return [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]


def test_prompts_keep_what_else_they_have(run, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    records = [dict(id=7, prompt="the", tags=["a", None]), dict(prompt="in", error="an old one", finish=1, score=0.5)]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    first, second = results_of(run, file, capsys)
    assert first["id"] == 7 and first["tags"] == ["a", None] and first["prompt"] == "the"
    assert list(first)[-3:] == ["completion", "depth", "finish"]
    assert second["score"] == 0.5 and "error" not in second and second["finish"] in ("stop", "length")


@pytest.mark.parametrize("lines", [["\ufeff", ""], ["", "\ufeff"], ["\ufeff", "\ufeff"]])
def test_byte_order_marks_belong_to_no_prompt(run, tmp_path, capsys, lines):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(mark + '{"prompt": "the"}\r\n' for mark in lines))
    assert [r["prompt"] for r in results_of(run, file, capsys)] == ["the", "the"]
    text = tmp_path / "prompt.txt"
    text.write_text("\ufeffthe")
    flags = ["--temperature", "0"]
    assert text_of([run, "--file", text, *flags], capsys) == text_of([run, "the", *flags], capsys)


def test_prompts_that_no_model_takes_fail_alone(run, tmp_path, capsys, monkeypatch):
    def encode_to_numpy(self, text, **options):
        assert len(text) < 1000  # what cannot fit is not even tried
        return usual(self, text, **options)

    usual = type(run_tokenizer(run, load_run(run)[2])).encode_to_numpy
    monkeypatch.setattr("tiktoken.Encoding.encode_to_numpy", encode_to_numpy)
    prompts = ["x\ud83d", "the", "x" * 60, " " * 10**6, "\udc00 in", "in"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(dict(prompt=p, n=i)) + "\n" for i, p in enumerate(prompts)))
    results = results_of(run, file, capsys)
    assert [r["n"] for r in results] == [*range(6)]
    assert ["error" in r for r in results] == [True, False, True, True, True, False]
    assert "surrogate" in results[0]["error"] and results[0]["prompt"] == "x\ud83d"
    assert "60 prompt tokens" in results[2]["error"] and "at least 500000 tokens" in results[3]["error"]
    fails([str(run), " " * 10**6], "at least 500000 tokens", capsys)


def test_results_are_safe_to_look_at_and_to_split(run, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    nasty = "\x7f\x9b31m\u2028\u2029\x85\u202e"
    file.write_text(json.dumps(dict(prompt=nasty, id="\x9b")) + "\n")
    main([str(run), "--prompts", str(file), "--max-new-tokens", "2"])
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and len(line.splitlines()) == 1 and not set(nasty) & set(line) - set("31m")
    assert json.loads(line)["prompt"] == nasty and json.loads(line)["id"] == "\x9b"


def test_prompts_from_a_file_keep_their_order_and_fail_alone(run, tmp_path, capsys):
    texts = ["in the in the", "", "x" * 60, "h\u00e9", "the"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(dict(prompt=t)) for t in texts) + "\n\n")
    flags = ["--batch", "2", "--max-new-tokens", "6", "--temperature", "0", "--slack", "4"]
    main([str(run), "--prompts", str(file), *flags])
    said = capsys.readouterr()
    results = [json.loads(line) for line in said.out.splitlines()]
    assert [r["prompt"] for r in results] == texts
    assert "60 prompt tokens" in results[2]["error"] and "completion" not in results[2]
    assert "tokens/s" in said.err and "of 3" in said.err
    model, meta, checkpoint = load_run(run)
    enc = run_tokenizer(run, checkpoint)
    for text, result in zip(texts, results, strict=True):
        if "error" not in result:
            ids = enc.encode_ordinary(text) or [meta["eot"]]
            alone = generate(model, [ids], 6, stop_token=meta["eot"], slack=4, compile=False)
            assert result["completion"] == enc.decode_bytes(alone.tokens[0]).decode("utf-8", "replace")
            fed = len(ids) + len(alone.tokens[0]) - (not alone.stopped[0])  # all but a last one that length ended
            assert result["depth"] == alone.depth[0][:fed]
            assert result["finish"] == ("stop" if alone.stopped[0] else "length")


@pytest.mark.parametrize("name, share", [("expert", "66.7%"), ("expert share", "33.3%"), ("token", "66.7%")])
def test_memory_of_the_cache_is_reported(tmp_path, capsys, name, share):
    main([str(save_run(tmp_path, some_model(name))), "--slack", "1", "--max-new-tokens", "47", "--no-stop"])
    assert f"shared block alone {share} of vanilla's at slack 1," in capsys.readouterr().err


def test_errors_leave_no_traceback_in_a_real_process(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "sample.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


HABITS = {  # what a shell does around the program -> exit status, and words of standard output or error
    "--file - <&-": (2, "there is no standard input"),
    "the <&-": (0, "the"),
    "the >&-": (0, "tokens in"),
    "the 2>&-": (0, "the"),
    "the >/dev/full": (2, "No space left on device"),
    "the | head -c 1": (0, "t"),
}


@pytest.mark.parametrize("habit", HABITS)
def test_closed_and_full_streams(run, habit):
    status, words = HABITS[habit]
    code = f"exec {sys.executable} {ROOT / 'sample.py'} {run} --max-new-tokens 4 {habit}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", code.replace("exec ", "")], capture_output=True, text=True)
    assert done.returncode == status and words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("locale", [dict(LC_ALL="C"), dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")])
def test_text_is_utf8_in_any_locale(run, locale):
    argv = [sys.executable, ROOT / "sample.py", run, "h\u00e9 \u20ac", "--max-new-tokens", "3"]
    done = subprocess.run(argv, capture_output=True, env=os.environ | locale)
    assert done.returncode == 0 and done.stdout.decode("utf-8", "replace").startswith("h\u00e9 \u20ac")


@pytest.mark.parametrize("locale", [dict(LC_ALL="C.UTF-8"), dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")])
def test_an_argument_in_another_encoding_is_refused(run, locale):
    argv = [sys.executable, ROOT / "sample.py", run, b"caf\xe9"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | locale)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: PROMPT is not UTF-8 text (byte 3)") and done.stderr.count("\n") == 1


def test_a_terminal_is_asked_for_lines(run):
    """A line is continued in colour, a bad one is refused alone, Ctrl-D ends; one decoder serves all of them."""
    main_end, end = pty.openpty()
    argv = [sys.executable, ROOT / "sample.py", run, "--max-new-tokens", "3", "--temperature", "0"]
    process = subprocess.Popen(argv, stdin=end, stdout=end, stderr=end, env=os.environ | dict(TERM="dumb"))
    os.close(end)
    said = b""

    def read_until(words: bytes) -> None:
        nonlocal said
        while words not in said:
            said += os.read(main_end, 1000)

    read_until(b"> ")
    for line, answer in (
        (b"the in", b"\x1b[30;48;5;"),
        (b"x" * 200, b"error:"),
        (b"in", b"\x1b[30;48;5;"),
        (b"", b"|>"),
    ):
        said = b""
        os.write(main_end, line + b"\n")
        read_until(answer)
        read_until(b"\n> ")
    os.write(main_end, b"\x04")
    assert process.wait(timeout=60) == 0
    os.close(main_end)


# ---- pages, and models that are no runs


def export(run: Path, target: Path) -> None:
    import checkpoint

    checkpoint.export(str(run), target)


def test_a_page_of_the_samples(run, tmp_path, capsys):
    file = tmp_path / "page.html"
    main([str(run), "the <in>", "--samples", "3", "--batch", "2", "--max-new-tokens", "7", "--html", str(file)])
    out, page = capsys.readouterr().out, file.read_text()
    model, _, checkpoint = load_run(run)
    ids = run_tokenizer(run, checkpoint).encode_ordinary("the <in>")
    assert page.count('<div class="text') == 3 and page.count(' given">') == 3 * len(ids)
    texts = [re.sub("<[^>]*>", "", text) for text in re.findall('<div class="text[^>]*>(.*?)</div>', page, re.S)]
    first = html.unescape(texts[0])
    assert first.startswith("the <in>") and make_visible(out.split("\n" + "-" * 16)[0]) == first
    depth = [int(d) for d in re.findall(r'<span class="d(\d)', page)]
    assert depth[: len(ids)] == model(torch.tensor([ids]), routing="causal").depth[0].tolist()


def test_exports_and_directories_of_weights(run, tmp_path, capsys):
    export(run, tmp_path / "weights")
    capsys.readouterr()
    flags = ["the in", "--temperature", "0"]
    usual = text_of([run, *flags], capsys)
    assert text_of([tmp_path / "weights", *flags], capsys) == usual
    (tmp_path / "weights" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    fails([str(tmp_path / "weights"), "in"], "--tokenizer", capsys)
    assert text_of([tmp_path / "weights", *flags, "--tokenizer", run / "data" / "tiny.tiktoken"], capsys) == usual
    (tmp_path / "weights" / "config.json").write_text("{")
    fails([str(tmp_path / "weights"), "in"], "config.json", capsys)


def test_a_llama_of_transformers(run, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB + 3, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "llama")
    export(run, tmp_path / "weights")
    (tmp_path / "llama" / "tokenizer.json").write_bytes((tmp_path / "weights" / "tokenizer.json").read_bytes())
    capsys.readouterr()
    enc = run_tokenizer(run, load_run(run)[2])
    ids = enc.encode_ordinary("the in")
    new = theirs.generate(torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, len(ids) :]
    text = b"".join(token_bytes(enc, t) for t in new.tolist()).decode("utf-8", "replace")
    assert text_of([tmp_path / "llama", "the in", "--temperature", "0"], capsys) == f"the in{text}\n"


# ---- painting


def paint_all(tokens: list[bytes | None], color: bool, rows: int = 1) -> str:
    class Enc:
        def decode_single_token_bytes(self, token):
            return tokens[token]

    out = io.StringIO()
    painter = Painter(Enc(), color, out, rows)
    for i, token in enumerate(tokens):
        painter(0, None if token is None else i, 2)
    return out.getvalue()


def test_characters_split_over_tokens_are_whole():
    euro, face = "\u20ac".encode(), "\U0001f600".encode()
    pieces = [b"a", euro[:1], euro[1:2], euro[2:] + face[:3], face[3:], b"z", None]
    assert paint_all(pieces, color=False) == "a\u20ac\U0001f600z\n"
    assert paint_all([b"a", euro[:2], None], color=False) == "a\ufffd\n"
    assert paint_all([euro[:2], b"b", None], color=False) == "\ufffdb\n"


def test_the_terminal_is_safe_from_the_model():
    painted = paint_all([b"\x1b[31mred\r\n\nend", None], color=True)
    assert "\x1b[31m" not in painted and "\u241b[31m" in painted and "\r" not in painted
    assert "\n\n" in painted and all("\n" not in part.split("\x1b[0m")[0] for part in painted.split("\x1b[30")[1:])


def test_rows_are_written_one_after_the_other():
    out = io.StringIO()
    painter = Painter(load_bytes(), False, out, 2)
    for row, token in ((0, 97), (1, 98), (1, None), (0, 99), (0, None)):
        painter(row, token, 1)
    assert out.getvalue() == "ac\n" + "-" * 16 + "\nb\n"


def load_bytes():
    class Enc:
        def decode_single_token_bytes(self, token):
            return bytes([token])

    return Enc()
