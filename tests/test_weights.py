"""Weights prepared for decoding: joined matrices that never go stale, int8 ones that decode their own forward."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_batch, make_model, tiny
from test_sample import EOT, save_run, some_model
from torch import Tensor

import ops
import sample
from engine import Engine
from eval import compare_decisions
from generate import Decoder, generate, prepare_weights
from model import MoR

VARIANTS = {
    "vanilla": {},
    "expert": dict(n_recursion=3, router="expert"),
    "expert, share": dict(n_recursion=3, router="expert", kv="share"),
    "token": dict(n_recursion=3, router="token", tie_embeddings=False),
    "random, cycle": dict(n_recursion=2, router="random", sharing="cycle"),
}
PROMPTS = [[5, 1, 7], [2] * 11]


def full_logits(model: MoR, tokens: list[int]) -> Tensor:
    """Logits fp32 [T, V] of a causal forward without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), routing="causal").logits[0].float()


@torch.no_grad()
def cached_logits(model: MoR, tokens: list[int], prompt: int) -> Tensor:
    """The same by prefill of a prompt and decoding of the rest: [T - prompt + 1, V]."""
    cache = model.make_cache(1, len(tokens), slack=model.config.n_recursion)
    found = [model.prefill(torch.tensor([tokens[:prompt]]), torch.tensor([prompt]), cache)]
    for token in tokens[prompt:]:
        found.append(model.decode(torch.tensor([token]), cache))
    return torch.cat(found).float()


def assert_cached_is_full(model: MoR, tolerance: float = 1e-4) -> None:
    tokens = torch.randint(model.config.vocab_size, (17,), generator=torch.Generator().manual_seed(3)).tolist()
    torch.testing.assert_close(cached_logits(model, tokens, 6), full_logits(model, tokens)[5:], atol=tolerance, rtol=0)


def count_bytes(model: MoR) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_joined_weights_are_the_models_own(variant):
    model = make_model(tiny(**VARIANTS[variant])).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    size, logits = count_bytes(model), full_logits(model, PROMPTS[1])
    prepare_weights(model)
    for layer in [m for m in model.modules() if hasattr(m, "wq")]:
        assert ops.find_joined((layer.wq, layer.wk, layer.wv)).weight.shape == (32 + 2 * 16, 32)
        assert ops.find_joined((layer.w_gate, layer.w_up)) is not None
    assert count_bytes(model) == size
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    torch.testing.assert_close(full_logits(model, PROMPTS[1]), logits)
    joined = model.block[0].wq.joined
    prepare_weights(model)  # a second decoder must not take the weights from the first one's graphs
    assert model.block[0].wq.joined is joined
    assert_cached_is_full(model)


def train_a_step(model: MoR) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(*make_batch(model.config)).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "aux" not in name)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def round_trip(model: MoR) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def load_others(model: MoR, assign: bool = False) -> None:
    model.load_state_dict(make_model(model.config, seed=2).state_dict(), assign=assign)


CHANGES = {
    "training": train_a_step,
    "a round trip through bf16": round_trip,
    "loading": load_others,
    "loading by assignment": lambda model: load_others(model, assign=True),
    "casting, then training": lambda model: (round_trip(model), train_a_step(model)),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("variant", ["vanilla", "expert, share"])
def test_changed_models_do_not_compute_with_stale_weights(variant, change):
    model = make_model(tiny(**VARIANTS[variant]))
    twin = copy.deepcopy(model)  # never joined
    start = model.block[0].wq.weight.detach().clone()
    prepare_weights(model)
    for m in (model, twin):
        CHANGES[change](m)
        m.eval()
    assert not torch.equal(twin.block[0].wq.weight, start)
    torch.testing.assert_close(full_logits(model, PROMPTS[1]), full_logits(twin, PROMPTS[1]))
    assert_cached_is_full(model)
    prepare_weights(model)  # and joined again
    torch.testing.assert_close(full_logits(model, PROMPTS[1]), full_logits(twin, PROMPTS[1]))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["vanilla", "expert, share"])
def test_a_graph_compiled_after_an_assignment_has_the_new_weights(variant):
    model = make_model(tiny(**VARIANTS[variant])).eval()
    prepare_weights(model)
    load_others(model, assign=True)
    idx = torch.tensor([[3, 1, 4, 1, 5]])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(idx).logits, make_model(model.config, seed=2).eval()(idx).logits)


@pytest.mark.parametrize("variant", ["vanilla", "expert"])
def test_copies_of_a_joined_model_are_not_joined(variant, compiler):
    model = prepare_weights(make_model(tiny(**VARIANTS[variant])).eval())
    before = full_logits(model, PROMPTS[1])
    twin = copy.deepcopy(model)
    assert twin.block[0].wq.joined is None
    train_a_step(twin)
    assert not torch.allclose(full_logits(twin, PROMPTS[1]), before)
    assert_cached_is_full(twin)
    torch.testing.assert_close(full_logits(model, PROMPTS[1]), before)

    # a graph cannot look where weights lie: one made after the change must be right all the same
    round_trip(model)
    with torch.no_grad():
        compiled = torch.compile(lambda i: model(i).logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(torch.tensor(PROMPTS[1:]))[0], full_logits(model, PROMPTS[1]))


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_matrices(rows, dtype, compiler):
    g = torch.Generator().manual_seed(0)
    matrix = ops.Matrix(24, 10).to(dtype)
    with torch.no_grad():
        matrix.weight.copy_(torch.randn(10, 24, generator=g))
        matrix.weight[1] = 0
        matrix.weight[2, 3] = 1000.0  # an outlier coarsens its own output alone
        matrix.weight[3] *= 1e-6
    exact = matrix.weight.detach().double()
    matrix.quantize()
    steps, scale = matrix.weight.double(), matrix.scale.double()
    assert matrix.weight.dtype == torch.int8 and matrix.scale.dtype == dtype
    # half a step, and the largest weight by as much as the scale was rounded
    error = (steps * scale[:, None] - exact).abs()
    assert (error <= scale[:, None] * (0.5 + 127 * torch.finfo(dtype).eps)).all()
    assert (steps.abs().amax(1)[[0, 2, 3, 4]] >= 126).all() and (steps[1] == 0).all()

    x = torch.randn(rows, 1, 24, generator=g).to(dtype)
    expected = (x.double() @ (steps * scale[:, None]).T).float()
    close = dict(atol=2e-2, rtol=2e-2) if dtype == torch.bfloat16 else dict(atol=1e-4, rtol=1e-5)
    for function in (ops.linears, torch.compile(ops.linears, fullgraph=True, dynamic=False, backend="aot_eager")):
        with torch.no_grad():
            y = function(x, matrix)
        assert y.dtype == dtype and y.shape == (rows, 1, 10)
        torch.testing.assert_close(y.float(), expected, **close)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_int8_models_decode_their_own_forward(variant):
    model = make_model(tiny(**VARIANTS[variant])).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = prepare_weights(model, "int8")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert prepare_weights(small, "int8") is small
    for name, p in small.named_parameters():
        kept = p.dim() == 1 or name == "wte.weight" or "router" in name
        assert p.dtype == (torch.float32 if kept else torch.int8), name
    assert_cached_is_full(small)

    # the same function but for the rounding, which is not nothing
    a, b = full_logits(model, PROMPTS[1]), full_logits(small, PROMPTS[1])
    assert 0 < (a - b).norm() / a.norm() < 0.2
    # what a decoder and an engine say is what the forward of the int8 model says
    out = generate(model, PROMPTS, 6, quantize="int8", compile=False, slack=3.0)
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        logits = full_logits(small, prompt + tokens)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens
    engine = Engine(model, 3, 2, 24, quantize="int8", compile=False, slack=3.0)
    requests = [engine.submit(p, 6) for p in PROMPTS]
    engine.run()
    assert [r.tokens for r in requests] == out.tokens
    assert model.generate(PROMPTS, 6, quantize="int8", slack=3.0) == out.tokens


@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_int8_decoding(rows, compiler):
    model = make_model(tiny(n_layer=2, n_recursion=2, router="expert", sharing="cycle")).eval()
    eager = generate(model, PROMPTS[:rows], 6, quantize="int8", compile=False, slack=2.0)
    decoder = Decoder(model, rows, 20, quantize="int8", freeze=True, early_exit=False, slack=2.0)
    for _ in range(2):
        out = generate(decoder.model, PROMPTS[:rows], 6, decoder=decoder)
        assert out.tokens == eager.tokens and out.depth == eager.depth


def test_sampled_tokens_lie_in_the_tokenizers_vocabulary():
    model = make_model(tiny(vocab_size=64)).eval()
    with torch.no_grad():
        model.wte.weight[50:] *= 8  # where the largest logits are
    settings = [{}, dict(temperature=1.0), dict(temperature=1.0, top_k=9, top_p=0.9)]
    for options in settings:
        free = generate(model, PROMPTS, 12, compile=False, **options).tokens
        assert max(map(max, free)) >= 50
        bound = generate(model, PROMPTS, 12, compile=False, vocab_size=50, **options).tokens
        assert max(map(max, bound)) < 50
        engine = Engine(model, 2, 2, 24, compile=False, vocab_size=50)
        requests = [engine.submit(p, 12, seed=i, **options) for i, p in enumerate(PROMPTS)]
        engine.run()
        assert [r.tokens for r in requests] == bound


def test_quantized_command_lines(tmp_path, capsys):
    model = some_model("expert")
    with torch.no_grad():
        model.wte.weight[EOT] = 0  # a likely token would end the row
    run = save_run(tmp_path / "run", model)
    sizes = []
    for flags in ((), ("--quantize", "int8")):
        sample.main([str(run), "th", "--max-new-tokens", "8", "--no-stop", "--temperature", "0", *flags])
        out = capsys.readouterr()
        sizes.append(float(out.err.split("weights ")[1].split(" MB")[0]))
    assert sizes[1] < 0.75 * sizes[0]

    rows = np.random.default_rng(0).integers(0, 257, (4, 25))
    found = compare_decisions(model, prepare_weights(model, "int8"), rows, dict(threshold=0.5, max_depth=None))
    assert found["flips"][0] == 0 and max(found["flips"]) < 0.2 and 0 < abs(found["nats"]) < 0.2
    same = compare_decisions(model, model, rows, dict(threshold=0.5, max_depth=None))
    assert same == dict(nats=0.0, flips=[0.0, 0.0, 0.0])
    other = make_model(model.config, seed=5).eval()
    assert max(compare_decisions(model, other, rows, dict(threshold=0.5, max_depth=None))["flips"]) > 0.2


def test_what_is_no_quantization():
    model = make_model(tiny())
    for make in (lambda: Decoder(model, 1, 8, quantize="int4"), lambda: Engine(model, 1, 1, 8, quantize="fp8")):
        with pytest.raises(ValueError, match="quantize='(int4|fp8)' must be 'int8' or None"):
            make()
