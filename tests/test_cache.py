"""The invariant of the project: prefill + decode logits equal the uncached causal forward, whatever the batch.

Where no token overflows the oracle is the model's own uncached forward (which test_model.py compares with the
reference); after an overflow it is tests/reference.py with as many slots as the cache has.
"""

import math
import warnings

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import make_batch, make_model, relative, tiny
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model import MoR, MoRConfig

EXPERT = dict(n_recursion=3, router="expert")
TOKEN = dict(n_recursion=3, router="token")
VARIANTS = {
    "vanilla": dict(n_layer=3),
    "vanilla-mha-untied": dict(n_layer=2, n_kv_head=4, tie_embeddings=False),
    "recursive": dict(n_recursion=3),
    "recursive-sequence": dict(n_recursion=3, n_layer=6, sharing="sequence"),
    "recursive-middle_sequence": dict(n_recursion=3, n_layer=8, sharing="middle_sequence"),
    "recursive-share": dict(n_recursion=3, kv="share"),
    "expert": EXPERT,
    "expert-4": EXPERT | dict(n_recursion=4, n_layer=6),
    "expert-cycle": EXPERT | dict(sharing="cycle", n_layer=6),
    "expert-mlp-tanh": EXPERT | dict(router_arch="mlp", router_func="tanh", n_layer=5),
    "expert-capacity": EXPERT | dict(capacity=(0.9, 0.6, 0.3), n_layer=5),
    "expert-aux_router": EXPERT | dict(causality="aux_router"),
    "expert-share": EXPERT | dict(kv="share"),
    "expert-share-aux_router-cycle": EXPERT | dict(kv="share", causality="aux_router", sharing="cycle", n_layer=6),
    "token": TOKEN,
    "token-cycle": TOKEN | dict(sharing="cycle", n_layer=6),
    "token-sigmoid-bias": TOKEN | dict(router_func="sigmoid", balance="bias", n_layer=5),
    "token-capacity": TOKEN | dict(capacity=(1.0, 1.0, 0.4), n_layer=5),
    "token-share": TOKEN | dict(kv="share"),
    "token-share-cycle": TOKEN | dict(kv="share", sharing="cycle", n_layer=6),
}
T = 24
ROOMY = 99.0  # slack with which no row ever overflows


def config_of(name: str, **overrides) -> MoRConfig:
    return tiny(**(VARIANTS[name] | overrides))


def model_of(name: str, **overrides) -> MoR:
    return make_model(config_of(name, **overrides)).eval()


@torch.no_grad()
def uncached(model: MoR, idx: Tensor, **knobs):
    """Full causal forward of complete rows, and proof that they differ in depth."""
    out = model(idx, routing="causal", **knobs)
    if model.config.router != "none":
        assert out.depth.unique().numel() >= min(model.config.n_recursion, knobs.get("max_depth") or 3, 3)
    return out


def cached(model: MoR, idx: Tensor, lengths: list[int], cache, prefill=None, decode=None, pad: int = 7) -> list[dict]:
    """Logits of row b at each position from lengths[b] - 1: prompts are prefilled, right-padded with `pad`, the rest is
    decoded; a row that has reached its end idles with -1 until all have."""
    prefill, decode = prefill or model.prefill, decode or model.decode
    B, total = idx.shape
    P = max(lengths)
    prompts = torch.full((B, P), pad)
    for b, n in enumerate(lengths):
        prompts[b, :n] = idx[b, :n]
    logits = prefill(prompts, torch.tensor(lengths), cache)
    out = [{n - 1: logits[b].clone()} for b, n in enumerate(lengths)]
    at = list(lengths)
    while min(at) < total:
        token = torch.tensor([int(idx[b, at[b]]) if at[b] < total else -1 for b in range(B)])
        logits = decode(token, cache)
        for b in range(B):
            if at[b] < total:
                out[b][at[b]] = logits[b].clone()
                at[b] += 1
    return out


def assert_rows_equal(out: list[dict], expected: Tensor, lengths: list[int], atol: float = 1e-4) -> None:
    for b, row in enumerate(out):
        assert sorted(row) == list(range(lengths[b] - 1, expected.size(1)))
        for t, logits in row.items():
            torch.testing.assert_close(logits, expected[b, t], atol=atol, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# the invariant


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_decode_equal_the_full_forward(name):
    """Uneven rows, from a one-token prompt to one that fills the cache, each then decoded to the end."""
    model = model_of(name)
    idx, _ = make_batch(model.config, B=5, T=T)
    expected = uncached(model, idx)
    lengths = [1, 6, 13, 23, 24]
    cache = model.make_cache(5, T, slack=ROOMY)
    assert_rows_equal(cached(model, idx, lengths, cache), expected.logits, lengths)
    assert cache.overflow.tolist() == [0] * 5
    assert cache.position.tolist() == [T] * 5
    # a recursion's slots hold exactly the tokens that ran it
    for r in range(cache.fill.size(0)) if model.config.kv == "recursion" else ():
        assert cache.fill[r].tolist() == (expected.depth > r).sum(1).tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_prompt_length_and_an_empty_cache(name):
    """One sequence as 24 prompts of lengths 1 to 24, and decoded from its first token without any prefill."""
    model = model_of(name)
    idx, _ = make_batch(model.config, B=1, T=T, seed=3)
    expected = uncached(model, idx).logits[0]
    cache = model.make_cache(T, T, slack=ROOMY)
    logits = model.prefill(idx.expand(T, T), torch.arange(1, T + 1), cache)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    # the next token of each row goes on from what prefill left, padding overwritten or unread
    following = torch.cat([idx[0, 1:], torch.tensor([-1])])
    logits = model.decode(following, cache)
    torch.testing.assert_close(logits[: T - 1], expected[1:], atol=1e-4, rtol=0)

    cache = model.make_cache(1, T, slack=ROOMY)
    for t in range(T):
        logits = model.decode(idx[:, t], cache)
        torch.testing.assert_close(logits[0], expected[t], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["vanilla", "expert", "expert-share", "token", "token-share"])
def test_the_full_context_of_the_model(name):
    model = model_of(name)
    total = model.config.block_size
    idx, _ = make_batch(model.config, B=2, T=total)
    cache = model.make_cache(2, total, slack=ROOMY)
    assert_rows_equal(cached(model, idx, [30, 41], cache), uncached(model, idx).logits, [30, 41])


@pytest.mark.parametrize("name", ["vanilla", "expert", "expert-share", "token", "token-share-cycle"])
def test_batch_sizes_agree(name):
    """A row's logits and greedy tokens do not depend on the rows beside it: batches of 1 to 8, cached and uncached."""
    model = model_of(name)
    idx, _ = make_batch(model.config, B=8, T=12, seed=4)
    lengths = [12, 1, 7, 3, 12, 9, 2, 5]

    def greedy(rows: list[int]) -> list[list[int]]:
        cache = model.make_cache(len(rows), T, slack=ROOMY)
        logits = model.prefill(idx[rows], torch.tensor([lengths[b] for b in rows]), cache)
        tokens = []
        for _ in range(11):
            tokens.append(logits.argmax(-1))
            logits = model.decode(tokens[-1], cache)
        return torch.stack(tokens, 1).tolist()

    alone = [greedy([b])[0] for b in range(8)]
    for B in range(2, 9):
        assert greedy(list(range(B))) == alone[:B]
    for b in range(8):
        row = idx[b, : lengths[b]].tolist()
        for token in alone[b]:
            assert int(uncached_last(model, row).argmax()) == token
            row.append(token)
    assert len({tuple(row) for row in alone}) > 4  # not one token for ever


@torch.no_grad()
def uncached_last(model: MoR, row: list[int]) -> Tensor:
    return model(torch.tensor([row]), routing="causal").logits[0, -1]


# ----------------------------------------------------------------------------------------------------------------------
# rows that idle, padding, reuse


@pytest.mark.parametrize("name", ["vanilla", "recursive-share", "expert", "expert-share", "token", "token-share"])
def test_idle_rows_write_nothing(name):
    """-1 leaves a row's position, fill, overflow and buffers as they are, and the other rows do not notice."""
    model = model_of(name)
    idx, _ = make_batch(model.config, B=3, T=T)
    expected = uncached(model, idx).logits
    cache = model.make_cache(3, T, slack=ROOMY)
    model.prefill(idx[:, :4], torch.tensor([4, 2, 3]), cache)
    at, g = [4, 2, 3], torch.Generator().manual_seed(0)
    steps = 0
    while min(at) < T:
        live = [bool(torch.rand((), generator=g) < 0.6) and at[b] < T for b in range(3)]
        before = [t.clone() for t in (*cache.k, *cache.v)]
        counts = [t.clone() for t in (cache.position, *cache.fill, cache.overflow)]
        logits = model.decode(torch.tensor([int(idx[b, at[b]]) if live[b] else -1 for b in range(3)]), cache)
        for b in range(3):
            if live[b]:
                torch.testing.assert_close(logits[b], expected[b, at[b]], atol=1e-4, rtol=0)
                at[b] += 1
            else:
                assert all(torch.equal(x[b], y[b]) for x, y in zip(before, (*cache.k, *cache.v), strict=True))
                after = (cache.position, *cache.fill, cache.overflow)
                assert all(x[b] == y[b] for x, y in zip(counts, after, strict=True))
                steps += 1
    assert steps > 10


@pytest.mark.parametrize("name", ["vanilla", "expert", "token-share"])
def test_a_full_row_is_idle(name):
    """Decoding beyond max_len writes nothing; the other rows go on."""
    model = model_of(name)
    idx, _ = make_batch(model.config, B=2, T=16)
    expected = uncached(model, idx).logits
    cache = model.make_cache(2, 16, slack=ROOMY)
    model.prefill(idx, torch.tensor([16, 12]), cache)
    before = [t[0].clone() for t in (*cache.k, *cache.v)]
    for t in range(12, 16):
        logits = model.decode(torch.tensor([3, int(idx[1, t])]), cache)
        torch.testing.assert_close(logits[1], expected[1, t], atol=1e-4, rtol=0)
    assert cache.position.tolist() == [16, 16]
    assert all(torch.equal(x, y[0]) for x, y in zip(before, (*cache.k, *cache.v), strict=True))


@pytest.mark.parametrize("name", ["vanilla", "recursive-share", "expert", "expert-share", "token", "token-share"])
def test_padding_and_earlier_use_leave_no_trace(name):
    """Other padding, other rows beside, and a cache full of an earlier batch: nearly the same bits."""
    model = model_of(name)
    idx, _ = make_batch(model.config, B=3, T=T)
    other, _ = make_batch(model.config, B=3, T=T, seed=9)
    lengths = [3, 14, 9]
    cache = model.make_cache(3, T, slack=ROOMY)
    fresh = cached(model, idx, lengths, cache, pad=0)
    cached(model, other, [24, 20, 5], cache)  # dirt
    again = cached(model, idx, lengths, cache, pad=60)
    for a, b in zip(fresh, again, strict=True):
        assert all(torch.allclose(a[t], b[t], atol=1e-5, rtol=0) for t in a)
    assert cache.overflow.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", VARIANTS)
def test_later_tokens_change_no_earlier_cached_logit(name):
    model = model_of(name)
    idx, _ = make_batch(model.config, B=2, T=T)
    edited = idx.clone()
    edited[:, 11:] = (edited[:, 11:] + 5) % model.config.vocab_size
    before, after = (cached(model, i, [6, 6], model.make_cache(2, T, slack=ROOMY)) for i in (idx, edited))
    for b in range(2):
        for t in range(5, 11):
            torch.testing.assert_close(before[b][t], after[b][t], atol=1e-5, rtol=0)
        assert not torch.allclose(before[b][23], after[b][23], atol=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# overflow


def crowded(name: str, **overrides) -> tuple[MoR, dict]:
    """A model and knobs with which most tokens want to go deep."""
    model = model_of(name, **overrides)
    if model.config.router == "expert":
        return model, dict(threshold=0.1)
    if model.config.balance == "bias":
        scale = 0.1 if model.config.router_func == "sigmoid" else 1.0
        model.balance_bias.copy_(scale * torch.tensor([-0.3, 0.0, 0.3]))
    return model, {}


CROWDED = [
    "expert",
    "expert-4",
    "expert-cycle",
    "expert-capacity",
    "expert-aux_router",
    "token-bias",
    "token-sigmoid-bias",
]


@pytest.mark.parametrize("name, slack", [(name, 1.0) for name in CROWDED] + [("expert", 0.6), ("token-bias", 0.6)])
def test_overflow_equals_the_reference_with_as_many_slots(name, slack):
    """A token that finds no slot stops there, the same in prefill and decode, is counted, and the rest goes on."""
    model, knobs = crowded("token", balance="bias") if name == "token-bias" else crowded(name)
    config = model.config
    idx, _ = make_batch(config, B=3, T=T, seed=6)
    lengths = [4, 17, 24]
    cache = model.make_cache(3, T, slack=slack, **knobs)
    assert cache.slots == [min(T, math.ceil(slack * c * T - 1e-9)) for c in config.capacities]
    with torch.no_grad():
        ref = reference.forward(
            model.state_dict(), config, idx, routing="causal", training=False, slots=tuple(cache.slots), **knobs
        )
    assert ref.margin > 1e-4
    assert int((ref.overflow > 0).sum()) >= 2 and ref.depth.unique().numel() >= 3
    assert_rows_equal(cached(model, idx, lengths, cache), ref.logits, lengths)
    assert cache.overflow.tolist() == ref.overflow.tolist()
    for r in range(config.n_recursion):
        assert cache.fill[r].tolist() == (ref.depth > r).sum(1).tolist()
    assert not torch.allclose(model(idx, **knobs).logits, ref.logits, atol=1e-2)  # it made a difference
    # prefill alone, at every length
    cache = model.make_cache(T, T, slack=slack, **knobs)
    logits = model.prefill(idx[:1].expand(T, T), torch.arange(1, T + 1), cache)
    torch.testing.assert_close(logits, ref.logits[0], atol=1e-4, rtol=0)
    assert cache.overflow.tolist() == sorted(cache.overflow.tolist()) and cache.overflow[-1] == ref.overflow[0]


@pytest.mark.parametrize("name", ["expert-share", "token-share", "recursive-share"])
def test_shared_kv_never_overflows(name):
    """The first recursion holds every token, and the others read it."""
    model = model_of(name)
    knobs = dict(threshold=0.1) if model.config.router == "expert" else {}
    idx, _ = make_batch(model.config, B=2, T=T)
    cache = model.make_cache(2, T, slack=1.0, **knobs)
    assert cache.slots == [T]
    assert_rows_equal(cached(model, idx, [5, 19], cache), model(idx, **knobs).logits, [5, 19])
    assert cache.overflow.tolist() == [0, 0]


def test_meaningless_slack_is_refused():
    for name in ("vanilla", "expert", "token-share"):
        for slack in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="slack"):
                model_of(name).make_cache(1, T, slack=slack)


# ----------------------------------------------------------------------------------------------------------------------
# prefill of a reduced size


@pytest.mark.parametrize("router", ["none", "expert", "token", "random"])
def test_prompts_need_the_first_recursion_alone_where_later_ones_keep_nothing_of_them(router):
    """With shared K/V and no last layer: a third of the products of three recursions, and the last token's."""
    sizes = dict(n_layer=6, d_model=64, d_ff=192, vocab_size=64)
    work = {}
    for name, kind in {"vanilla": {}, "share": dict(n_recursion=3, router=router, kv="share", sharing="cycle")}.items():
        model = make_model(tiny(**sizes, **kind)).eval()
        idx, _ = make_batch(model.config, B=4, T=T)
        cache = model.make_cache(4, T)
        with FlopCounterMode(display=False) as counter:
            model.prefill(idx, torch.full((4,), T), cache)
        work[name] = counter.get_total_flops()
        assert (cache.depth[:, :-1] == 1).all() or name == "vanilla"
    assert 1 / 3 < work["share"] / work["vanilla"] < 1 / 3 + 1 / T + 0.05


@pytest.mark.parametrize(
    "name", ["vanilla", "expert", "expert-4", "expert-aux_router", "expert-share", "token", "token-share"]
)
def test_tight_prefill_is_exact_or_says_that_it_is_not(name):
    model = model_of(name)
    idx, _ = make_batch(model.config, B=6, T=T, seed=2)
    lengths = torch.tensor([24, 3, 12, 20, 8, 16])
    outcomes, compared = set(), 0
    for knobs in ({}, {"threshold": 0.2}) if model.config.router == "expert" else ({},):
        expected = model(idx, **knobs).logits
        for slack in (1.0, 1.25, 2.5):
            for length in (lengths, lengths // 3):
                P = int(length.max())
                cache = model.make_cache(6, T, slack=slack, **knobs)
                logits = model.prefill(idx[:, :P], length, cache, tight=True)
                outcomes.add(bool(cache.short))
                if cache.short:
                    logits = model.prefill(idx[:, :P], length, cache)
                assert not cache.short
                good = cache.overflow == 0
                torch.testing.assert_close(logits[good], expected[torch.arange(6), length - 1][good], atol=1e-4, rtol=0)
                logits = model.decode(idx[torch.arange(6), length.clamp(max=T - 1)], cache)
                good = (cache.overflow == 0) & (length < T)
                following = expected[torch.arange(6), length.clamp(max=T - 1)]
                torch.testing.assert_close(logits[good], following[good], atol=1e-4, rtol=0)
                compared += int(good.sum())
    assert compared > 20
    assert outcomes == ({False} if model.config.router == "none" else {False, True})


# ----------------------------------------------------------------------------------------------------------------------
# test-time scaling


@pytest.mark.parametrize("name", ["expert", "expert-aux_router", "expert-share", "token", "token-share", "recursive"])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("max_depth", [1, 2, None])
def test_knobs_hold_the_invariant(name, threshold, max_depth):
    model = model_of(name)
    if threshold != 0.5 and model.config.router != "expert":
        with pytest.raises(ValueError, match="threshold"):
            model.make_cache(1, T, threshold=threshold)
        return
    idx, _ = make_batch(model.config, B=2, T=T)
    knobs = dict(threshold=threshold, max_depth=max_depth)
    expected = model(idx, **knobs)
    cache = model.make_cache(2, T, slack=ROOMY, **knobs)
    assert_rows_equal(cached(model, idx, [7, 15], cache), expected.logits, [7, 15])
    assert int(expected.depth.max()) <= (max_depth or 3)
    if (threshold, max_depth) != (0.5, None):
        assert not torch.allclose(expected.logits, model(idx).logits, atol=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# size, dtype, errors


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("slack", [1.0, 1.25, 2.0])
def test_cache_bytes(name, slack):
    """C_r = min(max_len, ceil(slack * capacity_r * max_len)); first and last layer have max_len."""
    model = model_of(name)
    c = model.config
    cache = model.make_cache(3, T, slack=slack)
    slots = [min(T, math.ceil(slack * capacity * T - 1e-9)) for capacity in c.capacities]
    if c.kv == "share":
        slots = slots[:1]
    assert list(cache.slots) == slots
    unshared = 2 if c.n_recursion > 1 and c.sharing.startswith("middle") else 0
    L = (c.n_layer - unshared) // c.n_recursion
    rows = unshared * T + L * sum(slots)
    expected = 2 * 3 * rows * c.n_kv_head * (c.d_model // c.n_head) * 4
    assert cache.nbytes == sum(t.nbytes for t in (*cache.k, *cache.v)) == expected
    if slack == 1.0:
        assert cache.nbytes == model.kv_bytes(3, T, torch.float32)


def test_cache_ratios_of_the_paper():
    """KV memory of the recursion blocks relative to vanilla: (N+1)/2N with recursion-wise caching, 1/N with sharing."""
    vanilla = model_of("vanilla", n_layer=6).make_cache(2, 48, slack=1.0).nbytes
    assert model_of("expert-cycle").make_cache(2, 48, slack=1.0).nbytes * 6 == vanilla * 4
    assert model_of("token-share-cycle").make_cache(2, 48, slack=1.0).nbytes * 3 == vanilla


@pytest.mark.parametrize("name", ["vanilla", "expert", "expert-share", "token"])
def test_bf16_cache_follows_the_uncached_bf16_model(name):
    model = model_of(name).to(torch.bfloat16)
    idx, _ = make_batch(model.config, B=2, T=16)
    cache = model.make_cache(2, 16, slack=ROOMY)
    assert {t.dtype for t in (*cache.k, *cache.v)} == {torch.bfloat16}
    expected = model(idx).logits
    out = cached(model, idx, [5, 10], cache)
    assert expected.dtype == out[0][15].dtype == torch.float32
    for b, row in enumerate(out):
        for t, logits in row.items():
            assert relative(logits, expected[b, t]) < 0.05, (b, t)


def test_misuse_is_refused_in_words():
    model = model_of("expert")
    idx, _ = make_batch(model.config, B=2, T=16)
    cache = model.make_cache(2, 12)
    cases = [
        (lambda: model.prefill(idx, torch.tensor([16, 16]), cache), "12"),
        (lambda: model.prefill(idx[:1, :8], torch.tensor([8]), cache), "2 rows"),
        (lambda: model.decode(torch.tensor([1, 2, 3]), cache), "row"),
        (lambda: model.make_cache(2, 49), "block_size=48"),
        (lambda: model.make_cache(2, 0), "max_len=0"),
        (lambda: model.make_cache(0, 8), "batch_size=0"),
        (lambda: model.make_cache(1, 8, max_depth=4), "max_depth=4"),
        (lambda: model.make_cache(1, 8, threshold=1.5), "threshold=1.5"),
    ]
    for call, word in cases:
        with pytest.raises(ValueError, match=word):
            call()


def test_inference_keeps_no_graph():
    model = model_of("expert")
    idx, _ = make_batch(model.config, B=1, T=8)
    cache = model.make_cache(1, 16)
    assert not model.prefill(idx, torch.tensor([8]), cache).requires_grad
    assert not model.decode(torch.tensor([1]), cache).requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# compiled


@pytest.mark.parametrize(
    "name, backend",
    [("expert", "inductor"), ("token-share", "inductor"), ("vanilla", "eager"), ("recursive-middle_sequence", "eager")]
    + [("recursive-share", "eager"), ("expert-capacity", "eager"), ("expert-aux_router", "eager")]
    + [("expert-share", "eager"), ("token", "eager"), ("token-sigmoid-bias", "eager")],
)
def test_compiled_cache_equals_the_full_forward(name, backend, compiler):
    """One graph each for prefill and decode, no breaks, no recompiles for any lengths, idle rows or reuse of the cache.
    Backend "eager" runs the traced program, which attends to the cache in another way than uncompiled code does."""
    model = model_of(name, **({"n_layer": 5} if backend == "inductor" else {}))
    idx, _ = make_batch(model.config, B=3, T=T)
    expected = uncached(model, idx).logits
    cache = model.make_cache(3, T, slack=ROOMY)
    prefill = torch.compile(model.prefill, fullgraph=True, dynamic=False, backend=backend)
    decode = torch.compile(model.decode, fullgraph=True, dynamic=False, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_rows_equal(cached(model, idx, [12, 1, 7], cache, prefill, decode), expected, [12, 1, 7])
        torch._dynamo.config.error_on_recompile = True
        for lengths in ([5, 12, 12], [12, 3, 1]):
            assert_rows_equal(cached(model, idx, lengths, cache, prefill, decode), expected, lengths)
        twin = model.make_cache(3, T, slack=ROOMY)  # another cache of the same shape is no reason to compile
        assert_rows_equal(cached(model, idx, [12, 12, 12], twin, prefill, decode), expected, [12] * 3)
    assert sum(compiler["graph_break"].values()) == 0
    assert compiler["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    "name, backend", [("expert-mlp-tanh", "inductor")] + [(n, "eager") for n in ("vanilla", "token", "expert-share")]
)
def test_compiled_decoding_of_one_row_equals_the_full_forward(name, backend, compiler):
    """On CPUs one token is multiplied by the weights in another way: its graph has no matrix product."""
    model, products = model_of(name), []
    idx, _ = make_batch(model.config, B=1, T=T)
    expected = uncached(model, idx).logits

    def counting(graph, inputs):
        products.append(sum(node.target is F.linear for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    prefill, decode = (
        torch.compile(f, fullgraph=True, dynamic=False, backend=counting) for f in (model.prefill, model.decode)
    )
    cache = model.make_cache(1, T, slack=ROOMY)
    for length in (5, 1):
        assert_rows_equal(cached(model, idx, [length], cache, prefill, decode), expected, [length])
    assert products[0] > 0 and products[1:] == [0, 0]  # five tokens, decoding, a prompt of one
    assert not compiler["graph_break"]


# ----------------------------------------------------------------------------------------------------------------------
# properties


@st.composite
def configurations(draw) -> MoRConfig:
    """Any model that has a causal forward: every combination the configuration admits, in tiny."""
    router = draw(st.sampled_from(["expert", "expert", "token", "none"]))
    N = draw(st.integers(2, 4)) if router != "none" else draw(st.integers(1, 3))
    kinds = ["middle_cycle", "cycle"] + (["sequence", "middle_sequence"] if router == "none" else [])
    sharing = draw(st.sampled_from(kinds))
    kv = draw(st.sampled_from(["recursion", "share"])) if N > 1 and "sequence" not in sharing else "recursion"
    block = draw(st.integers(1, 2))
    capacity = None
    if router != "none" and draw(st.booleans()):
        top = 1.0 if kv == "share" or router == "token" else draw(st.sampled_from([1.0, 0.8]))
        capacity = (
            top,
            *sorted((min(top, draw(st.sampled_from([1.0, 0.75, 0.5, 0.3]))) for _ in range(N - 1)), reverse=True),
        )
    funcs = {"expert": [None, "sigmoid", "tanh"], "token": [None, "softmax", "sigmoid"], "none": [None]}
    return MoRConfig(
        vocab_size=31,
        block_size=20,
        n_layer=N * block + (2 if N > 1 and sharing.startswith("middle") else 0),
        n_head=4,
        n_kv_head=draw(st.sampled_from([1, 2, 4])),
        d_model=16,
        d_ff=20,
        n_recursion=N,
        sharing=sharing,
        router=router,
        kv=kv,
        capacity=capacity,
        router_arch=draw(st.sampled_from(["linear", "mlp", "wide_mlp"])),
        router_func=draw(st.sampled_from(funcs[router])),
        causality=draw(st.sampled_from(["aux_loss", "aux_router"])) if router == "expert" else "aux_loss",
        balance=draw(st.sampled_from(["loss", "bias"])),
        tie_embeddings=draw(st.booleans()),
    )


@st.composite
def requests(draw):
    """(config, seed, total, lengths, knobs)"""
    config = draw(configurations())
    total = draw(st.integers(2, 20))
    lengths = draw(st.lists(st.integers(1, total), min_size=1, max_size=4))
    knobs = {}
    if config.router == "expert":
        knobs["threshold"] = draw(st.sampled_from([0.5, 0.5, 0.2, 0.7]))
    if "sequence" not in config.sharing and draw(st.booleans()):
        knobs["max_depth"] = draw(st.integers(1, config.n_recursion))
    return config, draw(st.integers(0, 999)), total, lengths, knobs


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(requests())
def test_property_cached_equals_uncached(request_):
    config, seed, total, lengths, knobs = request_
    model = make_model(config, seed).eval()
    idx, _ = make_batch(config, B=len(lengths), T=total, seed=seed)
    expected = model(idx, **knobs)
    if config.router == "expert":
        edge = math.log(knobs["threshold"] / (1 - knobs["threshold"]))
        assume(float((expected.router - edge).abs().min()) > 1e-4)
    cache = model.make_cache(len(lengths), total, slack=ROOMY, **knobs)
    assert_rows_equal(cached(model, idx, lengths, cache), expected.logits, lengths)
    assert cache.overflow.sum() == 0


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(requests(), st.floats(1.0, 1.5))
def test_property_overflow_equals_reference(request_, slack):
    config, seed, total, lengths, knobs = request_
    lengths = lengths[:2]
    model = make_model(config, seed).eval()
    idx, _ = make_batch(config, B=len(lengths), T=total, seed=seed)
    cache = model.make_cache(len(lengths), total, slack=slack, **knobs)
    slots = tuple(cache.slots) if config.kv == "recursion" else None
    with torch.no_grad():
        ref = reference.forward(model.state_dict(), config, idx, routing="causal", training=False, slots=slots, **knobs)
    assume(ref.margin > 1e-4)
    assert_rows_equal(cached(model, idx, lengths, cache), ref.logits, lengths)
    assert cache.overflow.tolist() == ref.overflow.tolist()
