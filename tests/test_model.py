"""model.py against tests/reference.py, the authors' golden vectors and transformers' Llama; its numbers and graphs."""

import copy
import json

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import load_golden, make_batch, make_model, relative, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from checkpoint import reference_names
from model import MoR, MoRConfig

EXPERT = dict(n_recursion=3, router="expert", aux_coef=0.3)
TOKEN = dict(n_recursion=3, router="token", balance_coef=0.3)
VARIANTS = {
    "vanilla": dict(n_layer=3),
    "vanilla-untied": dict(n_layer=2, tie_embeddings=False),
    "vanilla-mha": dict(n_layer=2, n_kv_head=4, rope_theta=100.0, norm_eps=0.1),
    "recursive-middle_cycle": dict(n_recursion=3),
    "recursive-cycle": dict(n_recursion=2, n_layer=4, sharing="cycle"),
    "recursive-sequence": dict(n_recursion=3, n_layer=6, sharing="sequence"),
    "recursive-middle_sequence": dict(n_recursion=3, n_layer=8, sharing="middle_sequence"),
    "recursive-share": dict(n_recursion=3, kv="share"),
    "recursive-share-cycle": dict(n_recursion=2, n_layer=4, kv="share", sharing="cycle"),
    "expert": EXPERT,
    "expert-2": EXPERT | dict(n_recursion=2, n_layer=4),
    "expert-4": EXPERT | dict(n_recursion=4, n_layer=6),
    "expert-cycle": EXPERT | dict(sharing="cycle", n_layer=6),
    "expert-mlp": EXPERT | dict(router_arch="mlp", n_layer=5),
    "expert-wide_mlp": EXPERT | dict(router_arch="wide_mlp", n_layer=5),
    "expert-tanh": EXPERT | dict(router_func="tanh", n_layer=5),
    "expert-alpha": EXPERT | dict(router_alpha=0.7, n_layer=5),
    "expert-z": EXPERT | dict(z_coef=0.1, n_layer=5),
    "expert-capacity": EXPERT | dict(capacity=(0.8, 0.8, 0.27), n_layer=5),
    "expert-aux_router": EXPERT | dict(causality="aux_router", z_coef=0.1, n_layer=5),
    "expert-aux_router-mlp": EXPERT | dict(causality="aux_router", router_arch="mlp", n_layer=5),
    "expert-none": EXPERT | dict(causality="none", n_layer=5),
    "expert-share": EXPERT | dict(kv="share"),
    "expert-share-cycle": EXPERT | dict(kv="share", sharing="cycle", n_layer=6, z_coef=0.1),
    "expert-share-aux_router": EXPERT | dict(kv="share", causality="aux_router", n_layer=5, tie_embeddings=False),
    "token": TOKEN,
    "token-2": TOKEN | dict(n_recursion=2, n_layer=4),
    "token-cycle": TOKEN | dict(sharing="cycle", n_layer=6),
    "token-sigmoid": TOKEN | dict(router_func="sigmoid", n_layer=5),
    "token-alpha": TOKEN | dict(router_alpha=0.6, n_layer=5),
    "token-mlp": TOKEN | dict(router_arch="mlp", n_layer=5),
    "token-bias": TOKEN | dict(balance="bias", n_layer=5),
    "token-sigmoid-bias": TOKEN | dict(router_func="sigmoid", balance="bias", n_layer=5),
    "token-none": TOKEN | dict(balance="none", n_layer=5),
    "token-z": TOKEN | dict(z_coef=0.1, n_layer=5),
    "token-slack": TOKEN | dict(capacity_slack=1.0, n_layer=5),
    "token-capacity": TOKEN | dict(capacity=(1.0, 1.0, 0.4), n_layer=5),
    "token-share": TOKEN | dict(kv="share"),
    "token-share-cycle": TOKEN | dict(kv="share", sharing="cycle", n_layer=6, balance="bias"),
}
CAUSAL = [name for name in VARIANTS if name != "expert-none"]


def config_of(name: str, **overrides) -> MoRConfig:
    return tiny(**(VARIANTS[name] | overrides))


def double_weights(model: MoR) -> dict[str, torch.Tensor]:
    """The reference runs in fp64, so that what differs is the model's rounding."""
    return {k: v.detach().double().requires_grad_() for k, v in model.state_dict().items()}


def assert_mixed_depths(config: MoRConfig, depth: torch.Tensor, recursions: int | None = None) -> None:
    """A routing test in which all tokens do the same proves nothing."""
    if config.router != "none":
        assert depth.unique().numel() >= min(recursions or config.n_recursion, 3), depth


def assert_routers_equal(out, ref, config: MoRConfig) -> None:
    """out.router [B, T, N]: every decision the reference had to take was taken on the same logit."""
    if config.router == "none":
        assert out.router is None
        return
    assert out.router.dtype == torch.float32 and not out.router.requires_grad
    compared = 0
    for b, recursions in enumerate(ref.router):
        for r, decisions in enumerate(recursions):
            for t, logit in decisions.items():
                ours = out.router[b, t] if config.router == "token" else out.router[b, t, r]
                torch.testing.assert_close(ours.double(), logit.detach().double(), atol=1e-4, rtol=0)
                compared += 1
    assert compared >= out.depth.numel()


def assert_same_training_step(model: MoR, idx, targets, ref, weights, **options) -> None:
    """Logits, depth, each loss, decision logits and every gradient of a training step against the reference's."""
    config = model.config
    assert ref.margin > 1e-4, "the routing of this test is too close to call: choose another seed"
    ref.loss.backward()
    model.zero_grad()
    out = model(idx, targets, return_logits=True, **options)
    torch.testing.assert_close(out.logits.double(), ref.logits.detach(), atol=1e-4, rtol=0)
    assert out.depth.tolist() == ref.depth.tolist()
    assert_routers_equal(out, ref, config)
    expected = {"lm"}
    if config.router == "expert" and config.causality != "none":
        expected.add("aux")
    if config.router == "token" and config.balance == "loss":
        expected.add("balance")
    if config.router != "none" and config.z_coef:
        expected.add("z")
    assert set(out.losses) == set(ref.losses) == expected
    for name, value in ref.losses.items():
        assert not out.losses[name].requires_grad
        assert float(out.losses[name]) == pytest.approx(float(value.detach()), rel=1e-5), name
    assert float(out.loss.detach()) == pytest.approx(float(ref.loss.detach()), rel=1e-5)
    out.loss.backward()
    for name, p in model.named_parameters():
        expected = weights[name].grad
        if expected is None or float(expected.norm()) == 0:
            assert p.grad is None or float(p.grad.norm()) == 0, name
        else:
            assert p.grad is not None and relative(p.grad, expected) < 1e-4, name


# ----------------------------------------------------------------------------------------------------------------------
# parity with the reference


@pytest.mark.parametrize("name", VARIANTS)
def test_training_step_equals_reference(name):
    """Logits, losses, depths and gradients of every parameter; also of the loss that never makes the logits."""
    config = config_of(name)
    model = make_model(config).train()
    idx, targets = make_batch(config)
    weights = double_weights(model)
    ref = reference.forward(weights, config, idx, targets)
    assert_mixed_depths(config, ref.depth)
    if name == "token-slack":
        assert int(ref.overflow.sum()) > 0
    assert_same_training_step(model, idx, targets, ref, weights)

    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    out = model(idx, targets)
    assert out.logits is None
    assert float(out.loss.detach()) == pytest.approx(float(ref.loss.detach()), rel=1e-5)
    out.loss.backward()
    for n, p in model.named_parameters():
        assert n not in grads or relative(p.grad, grads[n]) < 1e-4 or float(grads[n].norm()) == 0, n


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_evaluation_equals_reference(name):
    config = config_of(name)
    model = make_model(config).eval()
    idx, targets = make_batch(config, B=2, T=24, seed=3)
    with torch.no_grad():
        ref = reference.forward(model.state_dict(), config, idx, targets, routing="causal", training=False)
        out = model(idx, targets)
    assert ref.margin > 1e-4
    assert_mixed_depths(config, ref.depth)
    torch.testing.assert_close(out.logits, ref.logits, atol=1e-4, rtol=0)
    assert out.depth.tolist() == ref.depth.tolist()
    assert_routers_equal(out, ref, config)
    assert float(out.losses["lm"]) == pytest.approx(float(ref.losses["lm"]), rel=1e-5)


@pytest.mark.parametrize("name", ["expert", "expert-aux_router", "expert-share", "token", "token-slack"])
def test_topk_evaluation_drops_nothing_and_equals_reference(name):
    """routing="topk" in eval mode: expert choice as in training, token choice without a limit on slots."""
    config = config_of(name)
    model = make_model(config).eval()
    idx, targets = make_batch(config)
    with torch.no_grad():
        ref = reference.forward(model.state_dict(), config, idx, targets, routing="topk", training=False)
        out = model(idx, targets, routing="topk")
    assert ref.margin > 1e-4
    torch.testing.assert_close(out.logits, ref.logits, atol=1e-4, rtol=0)
    assert out.depth.tolist() == ref.depth.tolist()


def test_default_routing_follows_the_mode():
    config = config_of("expert")
    model = make_model(config)
    idx, _ = make_batch(config)
    for mode, routing in ((True, "topk"), (False, "causal")):
        model.train(mode)
        assert torch.equal(model(idx).logits, model(idx, routing=routing).logits)
        other = "causal" if mode else "topk"
        assert not torch.allclose(model(idx).logits, model(idx, routing=other).logits, atol=1e-2)


@pytest.mark.parametrize("name", ["expert", "expert-aux_router", "expert-share", "expert-capacity"])
@pytest.mark.parametrize("capacities", [(1.0, 0.93, 0.61), (1.0, 1.0, 1.0), (1.0, 2 / 3, 1 / 3)])
def test_capacity_warmup_equals_reference(name, capacities):
    """A tensor of capacities sets k_r = floor(capacity_r * T) exactly; at the configured values it changes nothing."""
    if name == "expert-capacity":  # capacity_0 below 1 takes part in the schedule, too
        capacities = tuple(0.97 * c for c in capacities)
    config = config_of(name)
    model = make_model(config).train()
    idx, targets = make_batch(config, T=21)
    weights = double_weights(model)
    capacity = torch.tensor(capacities)
    ref = reference.forward(weights, config, idx, targets, capacity=[float(c) for c in capacities])
    assert [(ref.depth > r).sum(1).tolist() for r in range(3)] == [[int(c * 21 + 1e-6)] * 2 for c in capacities]
    assert_same_training_step(model, idx, targets, ref, weights, capacity=capacity)
    if capacities == config.capacities:
        torch.testing.assert_close(model(idx, capacity=capacity).logits, model(idx).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("T", [1, 2, 3, 7, 48])
@pytest.mark.parametrize("name", ["vanilla", "expert", "expert-share", "token", "token-share"])
def test_short_and_full_sequences_equal_reference(name, T):
    config = config_of(name)
    model = make_model(config).train()
    idx, targets = make_batch(config, B=1, T=T)
    targets[:, 0] = 5
    with torch.no_grad():
        for training in (True, False):
            model.train(training)
            routing = "topk" if training else "causal"
            ref = reference.forward(model.state_dict(), config, idx, targets, routing=routing, training=training)
            out = model(idx, targets, return_logits=True)
            assert ref.margin > 1e-4
            torch.testing.assert_close(out.logits, ref.logits, atol=1e-4, rtol=0)
            assert out.depth.tolist() == ref.depth.tolist()
            assert float(out.loss) == pytest.approx(float(ref.loss if training else ref.losses["lm"]), rel=1e-5) or (
                not training and config.router == "token"  # eval adds the balancing loss, as training does
            )


@pytest.mark.parametrize("N", [2, 3, 4, 5, 7])
def test_topk_takes_floor_of_capacity_times_length(N):
    """k_r = max(1, floor((N - r) / N * T)) in exact arithmetic, for every T."""
    config = tiny(n_recursion=N, router="expert", n_layer=N, sharing="cycle", d_model=8, n_head=2, n_kv_head=1, d_ff=8)
    model = make_model(config).train()
    for T in range(1, 49):
        idx, _ = make_batch(config, B=1, T=T)
        warm = model(idx, capacity=torch.tensor(config.capacities))
        for out in (model(idx), warm):
            taken = [int((out.depth > r).sum()) for r in range(N)]
            assert taken == [max(1, (N - r) * T // N) for r in range(N)], T


# ----------------------------------------------------------------------------------------------------------------------
# attention


def attention_case(K: int, S: int, kind: str) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v in fp64, and the mask: of K ascending positions among S, and of documents."""
    g = torch.Generator().manual_seed(K)
    shapes = (2, K, 6, 8), (2, S, 3, 8), (2, S, 3, 8)
    tensors = [torch.randn(shape, generator=g, dtype=torch.double).requires_grad_() for shape in shapes]
    if kind == "causal":
        return tensors, None
    position = torch.stack([torch.randperm(S, generator=g)[:K].sort().values for _ in range(2)])
    mask = position[:, None, :, None] >= torch.arange(S)
    if kind == "documents":
        segment = torch.arange(S) // 50
        mask = mask & (segment[position][:, None, :, None] == segment)
    return tensors, mask


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("K, S, kind", [(37, 37, "causal"), (300, 300, "causal"), (130, 200, "some"),
                                        (256, 256, "documents"), (1, 70, "some")])  # fmt: skip
def test_attention_on_cpu_is_sdpa(K, S, kind):
    """Output and gradients, over several blocks of queries; and all that torch demands of an operator."""
    results = []
    for function in (ops.attend, sdpa):
        tensors, mask = attention_case(K, S, kind)
        y = function(*tensors, mask)
        results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    torch.library.opcheck(torch.ops.nanomor.attend_on_cpu.default, (*tensors, mask))
    tensors = [t.detach() for t in tensors]
    torch.library.opcheck(
        torch.ops.nanomor.attend_on_cpu_backward.default, (torch.ones_like(tensors[0]), *tensors, mask)
    )


def test_attention_on_cpu_gives_numbers_to_a_query_that_sees_nothing():
    """Surplus slots may: what they compute is dropped by a product with 0, so it must be finite."""
    (q, k, v), mask = attention_case(130, 200, "some")
    mask[:, :, -1] = False
    y = ops.attend(q, k, v, mask)
    assert y.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v)))


# ----------------------------------------------------------------------------------------------------------------------
# document masks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["vanilla", "recursive-share", "expert", "expert-share", "token-slack", "token-share"])
def test_segments_equal_reference(name, training):
    config = config_of(name)
    model = make_model(config).train(training)
    idx, targets = make_batch(config, T=18)
    segments = torch.tensor([[0] * 5 + [1] * 6 + [2] * 7, [0] * 10 + [1] + [2] * 7])
    if training:
        weights = double_weights(model)
        ref = reference.forward(weights, config, idx, targets, segments=segments)
        assert_same_training_step(model, idx, targets, ref, weights, segments=segments)
    else:
        with torch.no_grad():
            ref = reference.forward(
                model.state_dict(), config, idx, routing="causal", training=False, segments=segments
            )
            out = model(idx, segments=segments)
        assert ref.margin > 1e-4
        torch.testing.assert_close(out.logits, ref.logits, atol=1e-4, rtol=0)
    plain = model(idx, return_logits=True).logits
    assert not torch.allclose(plain, ref.logits.to(plain.dtype), atol=1e-2)  # the mask matters


@pytest.mark.parametrize("name", ["vanilla", "recursive-cycle", "expert", "expert-aux_router", "expert-share", "token"])
def test_packed_documents_do_not_see_each_other(name):
    """Causal logits of a document are the same alone and packed behind others (RoPE is relative)."""
    config = config_of(name)
    model = make_model(config).eval()
    idx, _ = make_batch(config, B=1, T=24)
    segments = torch.tensor([[0] * 9 + [1] * 4 + [2] * 11])
    packed = model(idx, segments=segments)
    for begin, end in ((0, 9), (9, 13), (13, 24)):
        alone = model(idx[:, begin:end])
        assert alone.depth.tolist() == packed.depth[:, begin:end].tolist()
        torch.testing.assert_close(packed.logits[:, begin:end], alone.logits, atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# test-time scaling


@pytest.mark.parametrize("name", ["expert", "expert-aux_router", "expert-share", "expert-tanh"])
@pytest.mark.parametrize("threshold", [0.1, 0.35, 0.9])
@pytest.mark.parametrize("max_depth", [None, 2])
def test_threshold_equals_reference(name, threshold, max_depth):
    config = config_of(name)
    model = make_model(config).eval()
    idx, _ = make_batch(config, T=16)
    with torch.no_grad():
        options = dict(threshold=threshold, max_depth=max_depth)
        ref = reference.forward(model.state_dict(), config, idx, routing="causal", training=False, **options)
        out = model(idx, **options)
    assert ref.margin > 1e-4
    assert out.depth.tolist() == ref.depth.tolist()
    torch.testing.assert_close(out.logits, ref.logits, atol=1e-4, rtol=0)
    assert out.depth.tolist() != model(idx).depth.tolist()


@pytest.mark.parametrize(
    "name", ["recursive-middle_cycle", "recursive-share", "expert", "expert-share", "token", "token-share"]
)
@pytest.mark.parametrize("max_depth", [1, 2, 3])
def test_max_depth_equals_reference(name, max_depth):
    """No token runs more than max_depth recursions; token choice then gates with the depth that ran."""
    config = config_of(name)
    model = make_model(config).eval()
    idx, _ = make_batch(config, T=16)
    with torch.no_grad():
        ref = reference.forward(model.state_dict(), config, idx, routing="causal", training=False, max_depth=max_depth)
        out = model(idx, max_depth=max_depth)
    assert int(out.depth.max()) == max_depth
    assert out.depth.tolist() == ref.depth.tolist()
    torch.testing.assert_close(out.logits, ref.logits, atol=1e-4, rtol=0)


def test_test_time_knobs_are_checked():
    model = make_model(config_of("expert")).eval()
    idx, _ = make_batch(model.config)
    for knob, bad in (("threshold", (0.0, 1.0, -1, 7)), ("max_depth", (0, 4, -1))):
        for value in bad:
            with pytest.raises(ValueError, match=f"{knob}={value}"):
                model(idx, **{knob: value})


# ----------------------------------------------------------------------------------------------------------------------
# causality


@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_change_no_earlier_causal_logit(name):
    config = config_of(name)
    model = make_model(config).eval()
    idx, _ = make_batch(config, B=2, T=24)
    before = model(idx)
    assert_mixed_depths(config, before.depth)
    for t in (1, 9, 16, 23):
        edited = idx.clone()
        edited[:, t:] = (edited[:, t:] + 1 + torch.arange(24 - t)) % config.vocab_size
        after = model(edited)
        torch.testing.assert_close(after.logits[:, :t], before.logits[:, :t], atol=1e-5, rtol=0)
        assert torch.equal(after.depth[:, :t], before.depth[:, :t])
        assert not torch.allclose(after.logits[:, t:], before.logits[:, t:], atol=1e-2)  # the edit is felt


@pytest.mark.parametrize("name", ["token", "token-slack", "token-share"])
def test_token_choice_is_causal_in_training_too(name):
    """Slots go in position order, so not even the tokens that find none depend on later ones."""
    config = config_of(name)
    model = make_model(config).train()
    idx, _ = make_batch(config, B=2, T=24)
    before = model(idx)
    for t in (5, 12, 20):
        edited = idx.clone()
        edited[:, t:] = (edited[:, t:] + 7) % config.vocab_size
        after = model(edited)
        torch.testing.assert_close(after.logits[:, :t], before.logits[:, :t], atol=1e-5, rtol=0)


def test_topk_routing_does_see_the_future():
    """The leak that causal routing closes, so that the tests above are known to be able to fail."""
    model = make_model(config_of("expert")).eval()
    idx, _ = make_batch(model.config, T=24)
    edited = idx.clone()
    edited[:, 12:] = (edited[:, 12:] + 7) % model.config.vocab_size
    before, after = (model(i, routing="topk") for i in (idx, edited))
    assert not torch.allclose(before.logits[:, :12], after.logits[:, :12], atol=1e-2)


def test_causal_routing_of_an_untaught_router_is_refused():
    model = make_model(config_of("expert-none"))
    idx, _ = make_batch(model.config)
    for call in (
        lambda: model.eval()(idx),
        lambda: model.train()(idx, routing="causal"),
        lambda: model.make_cache(1, 8),
    ):
        with pytest.raises(ValueError, match="causality='none'"):
            call()
    assert model.eval()(idx, routing="topk").logits.isfinite().all()


def test_unknown_routing_and_long_inputs_are_refused():
    model = make_model(config_of("expert"))
    with pytest.raises(ValueError, match="routing='both'"):
        model(torch.zeros(1, 4, dtype=torch.long), routing="both")
    with pytest.raises(ValueError, match="block_size=48"):
        model(torch.zeros(1, 49, dtype=torch.long))


# ----------------------------------------------------------------------------------------------------------------------
# loss-free balancing


@pytest.mark.parametrize("func", ["softmax", "sigmoid"])
def test_balance_bias_moves_towards_rare_depths(func):
    """b_i += u * sign(mean_count - count_i), and it steers the choice but not the gate."""
    config = tiny(**(TOKEN | dict(balance="bias", router_func=func)))
    model = make_model(config).eval()
    model.balance_bias.zero_()
    model.update_balance_bias(torch.tensor([10, 4, 1]))
    torch.testing.assert_close(model.balance_bias, torch.tensor([-1e-3, 1e-3, 1e-3]))
    model.update_balance_bias(torch.tensor([5, 5, 5]))
    torch.testing.assert_close(model.balance_bias, torch.tensor([-1e-3, 1e-3, 1e-3]))
    assert "balance_bias" in model.state_dict() and "balance_bias" not in dict(model.named_parameters())

    idx, _ = make_batch(config, B=4, T=40)

    def counts() -> torch.Tensor:
        return torch.bincount(model(idx).depth.flatten() - 1, minlength=3)

    scale = 0.1 if func == "sigmoid" else 1.0
    model.balance_bias.copy_(scale * torch.tensor([0.6, 0.0, -0.2]))
    before = counts()
    for _ in range(80):
        model.update_balance_bias(counts(), rate=0.01 * scale)
    after = counts()
    assert int(before.max()) > 100 and int(after.max()) < 65 and int(after.min()) > 40, (before, after)


# ----------------------------------------------------------------------------------------------------------------------
# golden vectors of the authors' code

GOLDEN = {
    "expert_mc3": dict(router="expert"),
    "token_mc3_softmax": dict(router="token", capacity_slack=9.0),  # the authors' code drops no token
}


def golden_config(case: str, **overrides) -> MoRConfig:
    sizes = dict(vocab_size=257, block_size=64, n_layer=8, n_head=4, n_kv_head=2, d_model=64, d_ff=160, n_recursion=3)
    return MoRConfig(**(sizes | GOLDEN[case] | overrides))


def golden_weights(golden: dict, aliases: dict[str, str]) -> dict[str, torch.Tensor]:
    """With every tied copy under its own name, as in a checkpoint."""
    weights = {k[2:]: v.float() for k, v in golden.items() if k.startswith("w.")}
    return weights | {copy_: weights[stored] for copy_, stored in aliases.items()}


def golden_targets(golden: dict) -> torch.Tensor:
    return F.pad(golden["labels"][:, 1:], (0, 1), value=-100)


def assert_golden(case: str, golden: dict, logits, depth, losses) -> None:
    torch.testing.assert_close(logits, golden["eval.logits"], atol=1e-4, rtol=0)
    expected = {"lm": golden["eval.loss"], "z": golden["train.router_z_loss"]}
    if case == "expert_mc3":
        expected["aux"] = golden["train.sampling_loss"]
        for r in range(3):
            selected = [[t for t in range(48) if row[t] > r] for row in depth.tolist()]
            assert selected == golden[f"eval.selected.{r}"].tolist()
    else:
        expected["balance"] = golden["train.balancing_loss"]
        assert depth.tolist() == golden["eval.depth"].tolist()
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("training", [True, False])
def test_model_equals_golden_outputs(case, training):
    golden, about = load_golden(case)
    model = MoR(golden_config(case, z_coef=1e-3)).train(training)
    model.load_reference_state_dict(golden_weights(golden, about["aliases"]))
    out = model(golden["input_ids"], golden_targets(golden), routing="topk", return_logits=True)
    assert_golden(case, golden, out.logits, out.depth, out.losses)


@pytest.mark.parametrize("case", GOLDEN)
def test_reference_equals_golden_outputs(case):
    """The oracle itself. Its weights go through load_reference_state_dict, which has its own tests below."""
    golden, about = load_golden(case)
    config = golden_config(case, z_coef=1e-3)
    model = MoR(config)
    model.load_reference_state_dict(golden_weights(golden, about["aliases"]))
    with torch.no_grad():
        ref = reference.forward(model.state_dict(), config, golden["input_ids"], golden_targets(golden))
    assert_golden(case, golden, ref.logits, ref.depth, ref.losses)


@pytest.mark.parametrize("case", GOLDEN)
def test_model_equals_golden_gradients(case):
    """The gradient of each loss apart: that of the language-model loss, and what one more loss adds to it."""
    golden, about = load_golden(case)
    coefficients = {
        "lm_mean": {},
        "sampling": {"aux_coef": 1.0},
        "balancing": {"balance_coef": 1.0},
        "z": {"z_coef": 1.0},
    }
    grads = {}
    for loss, on in coefficients.items():
        model = MoR(golden_config(case, **(dict(aux_coef=0.0, balance_coef=0.0, z_coef=0.0) | on)))
        model.load_reference_state_dict(golden_weights(golden, about["aliases"]))
        model.train()(golden["input_ids"], golden_targets(golden)).loss.backward()
        grads[loss] = {n: p.grad for n, p in model.named_parameters()}
    names = reference_names(model)
    compared = 0
    for key, expected in golden.items():
        if key.startswith("grad."):
            _, loss, theirs = key.split(".", 2)
            ours = grads[loss][names[theirs]]
            if loss != "lm_mean":
                ours = ours - grads["lm_mean"][names[theirs]]
            assert relative(ours, expected) < 1e-4, key
            compared += 1
    assert compared >= 4


# ----------------------------------------------------------------------------------------------------------------------
# transformers' Llama


def make_llama(config: MoRConfig):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.block_size,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
            initializer_range=0.2,
        )
    )
    return llama.eval()


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_vanilla_equals_llama(tied, n_kv_head):
    config = tiny(n_layer=4, n_kv_head=n_kv_head, tie_embeddings=tied)
    llama, model = make_llama(config), MoR(config)
    model.load_reference_state_dict(llama.state_dict())
    idx, targets = make_batch(config, T=48)
    ours = model.eval()(idx, targets)
    theirs = llama(idx)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=0)
    theirs_loss = F.cross_entropy(theirs.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours.loss, theirs_loss)
    assert model.num_params(embedding=True) == sum(p.numel() for p in llama.parameters())
    assert (ours.depth == 1).all() and ours.router is None


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_recursive_equals_llama_with_repeated_layers(sharing):
    """The sharing table of the paper, spelled out: L=9 or 1+9+1 with N=3."""
    ids = {"cycle": (0, 1, 2) * 3, "sequence": (0, 0, 0, 1, 1, 1, 2, 2, 2)}[sharing.removeprefix("middle_")]
    if sharing.startswith("middle"):
        ids = ("first", *ids, "last")
    config = tiny(n_layer=len(ids), n_recursion=3, sharing=sharing)
    llama, model = make_llama(config), MoR(config)
    for i, layer_id in enumerate(ids):
        llama.model.layers[i].load_state_dict(llama.model.layers[ids.index(layer_id)].state_dict())
    model.load_reference_state_dict(llama.state_dict())
    idx, _ = make_batch(config, T=30)
    torch.testing.assert_close(model.eval()(idx).logits, llama(idx).logits, atol=1e-4, rtol=0)
    assert (model(idx).depth == 3).all()


# ----------------------------------------------------------------------------------------------------------------------
# weights in the authors' layout

THEIR_LAYER = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}
LAYOUTS = [
    "vanilla",
    "vanilla-untied",
    "recursive-middle_cycle",
    "recursive-cycle",
    "recursive-sequence",
    "recursive-middle_sequence",
    "expert",
    "expert-cycle",
    "expert-mlp",
    "expert-aux_router",
    "expert-aux_router-mlp",
    "expert-share-aux_router",
    "token",
    "token-mlp",
]


def their_layout(model: MoR) -> dict[str, torch.Tensor]:
    """The model's weights under the names of the authors' checkpoints, every tied copy present."""
    c, sd = model.config, model.state_dict()
    out = {"model.embed_tokens.weight": sd["wte.weight"], "model.norm.weight": sd["norm.weight"]}
    out["lm_head.weight"] = sd.get("lm_head.weight", sd["wte.weight"])
    middle = c.n_recursion > 1 and c.sharing.startswith("middle")
    off, N = int(middle), c.n_recursion
    L = (c.n_layer - 2 * off) // N

    def put(theirs: str, ours: str) -> None:
        for a, b in THEIR_LAYER.items():
            out[f"model.layers.{theirs}.{b}.weight"] = sd[f"{ours}.{a}.weight"]

    if middle:
        put("0", "first")
        put(str({"none": c.n_layer - 1, "expert": N + 1, "token": 2}[c.router]), "last")
    for r in range(N):
        for j in range(L):
            theirs = {
                "none": f"{off + r * L + j}",
                "expert": f"{off + r}.block.{j}",
                "token": f"{off}.block_list.{r}.{j}",
            }
            put(theirs[c.router], f"block.{(r * L + j) // N if 'sequence' in c.sharing else j}")
    for name, weight in sd.items():
        part = name.split(".")
        tail = ".".join(part[part.index("net") + 1 :]) if "net" in part else ""
        if part[0] == "router":
            out[f"model.layers.{off}.mor_router.router.{tail}"] = weight
        elif part[0] in ("routers", "aux_routers"):
            kind = "mor_router" if part[0] == "routers" else "mlp_router"
            out[f"model.layers.{off + int(part[1])}.{kind}.router.{tail}"] = weight
    return {k: v.clone() for k, v in out.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_load_reference_layout(name):
    """Loads with tied tensors repeated or present once; names every fault in one error, leaving the model as it was."""
    source, model = make_model(config_of(name), seed=1), make_model(config_of(name), seed=2)
    theirs = their_layout(source)
    model.load_reference_state_dict(theirs)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key

    seen, once = [], {}
    for key, value in theirs.items():  # keep the first copy of each tied tensor only
        if not any(value.shape == other.shape and torch.equal(value, other) for other in seen):
            once[key] = value
            seen.append(value)
    other = make_model(config_of(name), seed=3)
    other.load_reference_state_dict(once)
    for key, value in source.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    if name not in ("vanilla-untied", "expert-share-aux_router"):
        assert "lm_head.weight" not in once

    before = copy.deepcopy(other.state_dict())
    broken = {k: v + 1.0 for k, v in theirs.items()}
    broken.pop("model.norm.weight")
    broken["model.embed_tokens.weight"] = torch.zeros(3, 5)
    broken["model.layers.0.surplus.weight"] = torch.zeros(1)
    broken["lm_head.bias"] = torch.zeros(61)
    faults = ["model.norm.weight", "model.embed_tokens.weight", "(3, 5)", "(61, 32)", "surplus.weight", "lm_head.bias"]
    if source.config.n_recursion > 1:
        tied = [k for k in theirs if k.endswith("q_proj.weight") and k not in once][-1]
        broken[tied] = broken[tied] + 1
        faults.append(tied)
    with pytest.raises(ValueError) as error:
        other.load_reference_state_dict(broken)
    for fault in faults:
        assert fault in str(error.value), fault
    for key, value in before.items():
        assert torch.equal(other.state_dict()[key], value), key


def test_disagreeing_head_is_refused():
    model = make_model(config_of("expert"))
    theirs = their_layout(model)
    theirs["lm_head.weight"] += 1e-3
    with pytest.raises(ValueError, match="lm_head.weight"):
        model.load_reference_state_dict(theirs)


def test_half_precision_checkpoints_load():
    source, model = make_model(config_of("expert"), seed=1), make_model(config_of("expert"), seed=2)
    model.load_reference_state_dict({k: v.bfloat16() for k, v in their_layout(source).items()})
    for key, value in source.state_dict().items():
        assert model.state_dict()[key].dtype == torch.float32
        assert torch.equal(model.state_dict()[key], value.bfloat16().float()), key


# ----------------------------------------------------------------------------------------------------------------------
# configuration

BAD_CONFIGS = [
    (dict(vocab_size=0), ["vocab_size=0"]),
    (dict(n_layer=-2), ["n_layer=-2"]),
    (dict(d_model=32.0), ["d_model=32.0"]),
    (dict(block_size="long"), ["block_size='long'"]),
    (dict(sharing="ring"), ["sharing='ring'", "middle_cycle"]),
    (dict(router="both"), ["router='both'", "expert"]),
    (dict(kv="none"), ["kv='none'", "share"]),
    (dict(n_head=5), ["d_model=32", "n_head=5"]),
    (dict(n_head=32, n_kv_head=32), ["n_head=32"]),  # a head of width 1 has no pair to rotate
    (dict(n_kv_head=3), ["n_kv_head=3"]),
    (dict(n_recursion=3, n_layer=9), ["n_layer=9", "n_recursion=3", "11"]),
    (dict(n_recursion=3, n_layer=8, sharing="cycle"), ["n_layer=8", "9"]),
    (dict(n_recursion=3, n_layer=2), ["n_layer=2"]),
    (dict(router="expert"), ["router='expert'", "n_recursion>=2"]),
    (dict(router="token"), ["router='token'", "n_recursion>=2"]),
    (EXPERT | dict(sharing="sequence", n_layer=9), ["sharing", "sequence"]),
    (TOKEN | dict(sharing="middle_sequence"), ["sharing", "middle_sequence"]),
    (dict(kv="share"), ["kv='share'"]),
    (dict(kv="share", n_recursion=3, n_layer=9, sharing="sequence"), ["kv='share'", "sequence"]),
    (EXPERT | dict(capacity=(1.0, 0.5)), ["capacity=(1.0, 0.5)", "n_recursion=3"]),
    (EXPERT | dict(capacity=(1.0, 0.5, 0.7)), ["capacity=(1.0, 0.5, 0.7)"]),
    (EXPERT | dict(capacity=(1.5, 0.5, 0.2)), ["capacity=(1.5, 0.5, 0.2)"]),
    (EXPERT | dict(capacity=(1.0, 0.5, 0.0)), ["capacity=(1.0, 0.5, 0.0)"]),
    (EXPERT | dict(capacity=(1.0, float("nan"), 0.1)), ["capacity="]),
    (EXPERT | dict(capacity=(0.9, 0.5, 0.2), kv="share"), ["capacity", "kv='share'"]),
    (dict(n_recursion=3, capacity=(1.0, 0.5, 0.2)), ["capacity", "router"]),
    (EXPERT | dict(router_func="softmax"), ["router_func='softmax'"]),
    (TOKEN | dict(router_func="tanh"), ["router_func='tanh'"]),
    (EXPERT | dict(router_arch="huge"), ["router_arch='huge'"]),
    (EXPERT | dict(router_alpha=-0.1), ["router_alpha=-0.1"]),
    (EXPERT | dict(router_alpha=0.0), ["router_alpha=0.0"]),
    (EXPERT | dict(causality="hope"), ["causality='hope'"]),
    (TOKEN | dict(causality="aux_router"), ["causality='aux_router'"]),
    (TOKEN | dict(balance="scale"), ["balance='scale'"]),
    (EXPERT | dict(aux_coef=-1.0), ["aux_coef=-1.0"]),
    (EXPERT | dict(z_coef=float("nan")), ["z_coef=nan"]),
    (TOKEN | dict(balance_coef=float("inf")), ["balance_coef=inf"]),
    (TOKEN | dict(capacity_slack=0.5), ["capacity_slack=0.5"]),
    (dict(rope_theta=0.0), ["rope_theta=0.0"]),
    (dict(norm_eps=-1e-5), ["norm_eps=-1e-05"]),
    (dict(vocab_size=0, sharing="ring", z_coef=-1.0), ["vocab_size=0", "sharing='ring'", "z_coef=-1.0"]),
    (
        EXPERT | dict(n_head=5, n_layer=9, capacity=(1.0, 0.5), router_func="softmax"),
        ["n_head=5", "n_layer=9", "capacity=(1.0, 0.5)", "router_func='softmax'"],
    ),
]


@pytest.mark.parametrize("overrides, words", BAD_CONFIGS, ids=lambda x: "+".join(x)[:60] if isinstance(x, list) else "")
def test_config_errors_name_every_field_value_and_remedy(overrides, words):
    with pytest.raises(ValueError) as error:
        tiny(**overrides)
    for word in words:
        assert word in str(error.value)


def test_config_survives_json():
    config = tiny(**(EXPERT | dict(capacity=(1.0, 0.5, 0.25), router_alpha=0.2)))
    assert MoRConfig(**json.loads(json.dumps(config.asdict()))) == config
    assert config.capacities == (1.0, 0.5, 0.25)
    assert tiny(n_recursion=4, n_layer=6, router="expert").capacities == (1.0, 0.75, 0.5, 0.25)


# ----------------------------------------------------------------------------------------------------------------------
# the paper's numbers

PARAMS = [  # preset, overrides, layers, non-embedding parameters in millions, size of their last digit
    ("135M", {}, 30, 106, 1),
    ("360M", {}, 32, 315, 1),
    ("730M", {}, 26, 654, 1),
    ("1.7B", {}, 24, 1610, 10),
    ("360M", dict(n_recursion=2), 32, 167, 1),
    ("360M", dict(n_recursion=3), 32, 118, 1),
    ("360M", dict(n_recursion=4), 34, 98, 1),
    ("135M", dict(n_recursion=3), 32, 42, 1),
    ("730M", dict(n_recursion=3), 26, 252, 1),
    ("1.7B", dict(n_recursion=3), 26, 670, 10),
]


@pytest.mark.parametrize("preset, overrides, layers, millions, digit", PARAMS)
def test_presets_have_the_papers_sizes(preset, overrides, layers, millions, digit):
    config = MoRConfig.preset(preset, **overrides)
    assert config.n_layer == layers
    with torch.device("meta"):
        model = MoR(config)
    assert abs(model.num_params() / 1e6 - millions) <= digit / 2
    assert model.num_params(embedding=True) - model.num_params() == 49152 * config.d_model


def test_preset_overrides():
    nano = MoRConfig.preset("nano", n_recursion=3, router="expert", d_ff=512)
    assert (nano.n_layer, nano.d_ff, nano.router) == (8, 512, "expert")
    assert MoRConfig.preset("360M", n_recursion=3, sharing="cycle").n_layer == 33
    assert MoRConfig.preset("360M", n_recursion=3, n_layer=11).n_layer == 11
    for name, overrides, word in (
        ("2B", {}, "2B"),
        ("nano", dict(d_fff=1), "d_fff"),
        ("360M", dict(n_recursion=3, n_layer=12), "12"),
    ):
        with pytest.raises(ValueError, match=word):
            MoRConfig.preset(name, **overrides)


@pytest.mark.parametrize("N, ratio", [(2, 0.745), (3, 0.667), (4, 0.667)])
def test_flops_ratios_of_the_paper(N, ratio):
    with torch.device("meta"):
        vanilla = MoR(MoRConfig.preset("360M"))
        mor = MoR(MoRConfig.preset("360M", n_recursion=N, router="expert"))
        recursive = MoR(MoRConfig.preset("360M", n_recursion=N, n_layer=vanilla.config.n_layer + 2 * (N == 4)))
    assert mor.flops_per_token(2048) / vanilla.flops_per_token(2048) == pytest.approx(ratio, abs=0.01)
    expected = recursive.config.n_layer / vanilla.config.n_layer
    assert recursive.flops_per_token(2048) / vanilla.flops_per_token(2048) == pytest.approx(expected)


@pytest.mark.parametrize(
    "name", ["vanilla", "recursive-middle_cycle", "recursive-share", "expert", "expert-share", "expert-capacity"]
)
def test_flops_count_every_layer_as_the_paper_does(name):
    """2 per weight and token, attention 4 D per query and key over the causal half; written out layer by layer."""
    config, T = config_of(name), 48
    D, ff, kv_width = config.d_model, config.d_ff, config.d_model * config.n_kv_head // config.n_head
    q_and_o, kv, mlp = 2 * 2 * D * D, 2 * 2 * D * kv_width, 2 * 3 * D * ff
    total = 0.0
    first_last = 2 if config.n_recursion > 1 else 0
    total += first_last * (T * (q_and_o + kv + mlp) + 4 * D * T * T / 2)
    for r, c in enumerate(config.capacities):
        k = max(1, int(c * T + 1e-6))
        for _ in range((config.n_layer - first_last) // config.n_recursion):
            if config.kv == "share" and r > 0:
                total += k * (q_and_o + mlp) + 4 * D * k * T / 2
            else:
                total += k * (q_and_o + kv + mlp) + 4 * D * k * k / 2
    model = MoR(config)
    assert model.flops_per_token(T) * T == pytest.approx(total, rel=1e-9)
    assert (model.flops_per_token(T, head=True) - model.flops_per_token(T)) == 2 * D * config.vocab_size


def test_kv_bytes_ratios_of_the_paper():
    with torch.device("meta"):
        sizes = dict(n_layer=30, sharing="cycle")
        vanilla = MoR(MoRConfig.preset("360M", n_layer=30))
        recursion = MoR(MoRConfig.preset("360M", n_recursion=3, router="expert", **sizes))
        share = MoR(MoRConfig.preset("360M", n_recursion=3, router="expert", kv="share", **sizes))
        middle = MoR(MoRConfig.preset("360M", n_recursion=3, router="expert", n_layer=32))
    full = vanilla.kv_bytes(4, 1536, torch.bfloat16)
    assert full == 2 * 4 * 1536 * 30 * 5 * 64 * 2
    assert recursion.kv_bytes(4, 1536, torch.bfloat16) / full == pytest.approx(4 / 6, rel=1e-3)
    assert share.kv_bytes(4, 1536, torch.bfloat16) / full == pytest.approx(1 / 3, rel=1e-3)
    unshared = 2 * full // 30
    assert (middle.kv_bytes(4, 1536, torch.bfloat16) - unshared) / full == pytest.approx(4 / 6, rel=1e-3)
    assert vanilla.kv_bytes(4, 1536, torch.float32) == 2 * full


# ----------------------------------------------------------------------------------------------------------------------
# the loss without logits


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_loss_never_makes_the_logits(tied):
    """Forward and backward of a training step hold no tensor of B*T*V elements, and give the loss and gradients of one
    that does; the last chunk is a partial one, and some targets are ignored."""
    sizes = dict(d_model=16, d_ff=16, n_head=2, n_kv_head=1, n_layer=1, tie_embeddings=tied)
    config = MoRConfig(vocab_size=4099, block_size=1201, **sizes)
    model = make_model(config).train()
    idx, targets = make_batch(config, B=4, T=1201)
    results = []
    for materialised in (True, False):
        model.zero_grad()
        with LargestTensor() as largest:
            out = model(idx, targets, return_logits=materialised)
            out.loss.backward()
        results.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}, largest.numel))
    (loss, grads, size), (loss_chunked, grads_chunked, size_chunked) = results
    assert size >= 4 * 1201 * 4099 and size_chunked <= size * 0.55
    torch.testing.assert_close(loss_chunked, loss, rtol=1e-5, atol=0)
    for name in grads:
        assert relative(grads_chunked[name], grads[name]) < 1e-4, name
    expected = F.cross_entropy(out_logits(model, idx).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss_chunked, expected, rtol=1e-5, atol=0)


@torch.no_grad()
def out_logits(model: MoR, idx: torch.Tensor) -> torch.Tensor:
    return model(idx).logits


def test_logits_exist_when_they_should():
    model = make_model(config_of("expert"))
    idx, targets = make_batch(model.config)
    model.train()
    assert model(idx, targets).logits is None and model(idx, targets, return_logits=True).logits is not None
    assert model(idx).logits is not None and model(idx).loss is None and model(idx).losses == {}
    model.eval()
    assert model(idx, targets).logits is not None and model(idx, targets).loss is not None


def test_recomputed_recursions_have_the_same_gradients():
    for name in ("expert", "token-share"):
        model = make_model(config_of(name)).train()
        idx, targets = make_batch(model.config)
        grads = []
        for model.checkpoint_recursions in (False, True):
            model.zero_grad()
            model(idx, targets).loss.backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


def test_bf16_autocast_keeps_router_and_loss_in_fp32():
    for name in ("expert", "expert-share", "token"):
        model = make_model(config_of(name)).train()
        idx, targets = make_batch(model.config)
        exact = model(idx, targets)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(idx, targets)
        assert out.loss.dtype == torch.float32 and out.router.dtype == torch.float32
        assert float(out.losses["lm"]) == pytest.approx(float(exact.losses["lm"]), rel=0.03)
        out.loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# compilation: one static graph


def train_steps(model: MoR, warmup: bool, steps: int = 6) -> list[float]:
    """A run in which learning rate, step, data and (while warm-up lasts) capacities change."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config, losses = model.config, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / steps
        idx, targets = make_batch(config, B=2, T=24, seed=100 + step)
        options = {}
        if warmup and step < steps // 2:
            fraction = 1 - step / (steps // 2)
            options["capacity"] = torch.tensor([c + (1 - c) * fraction for c in config.capacities])
        if step == 3:  # nothing may compile once both graphs exist
            torch._dynamo.config.error_on_recompile = True
        out = model(idx, targets, **options)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if config.router == "token" and config.balance == "bias":
            model.update_balance_bias(torch.bincount(out.depth.flatten() - 1, minlength=config.n_recursion))
        losses.append(float(out.loss.detach()))
    return losses


def assert_one_graph(counters, graphs: int) -> None:
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["recompiles"] if "recompiles" in counters else True


COMPILED = ["vanilla", "expert", "expert-share", "token-bias"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training_equals_eager_in_one_graph(name, compiler):
    """fullgraph, dynamic=False: 1 graph, 0 breaks, 0 recompiles over a run, and the eager run's losses."""
    config = config_of(name, n_layer=1 if name == "vanilla" else 5)
    eager, compiled = make_model(config).train(), make_model(config).train()
    names = list(compiled.state_dict())
    compiled.compile(fullgraph=True, dynamic=False)
    assert list(compiled.state_dict()) == names
    expected = train_steps(eager, warmup=False)
    torch.testing.assert_close(train_steps(compiled, warmup=False), expected, rtol=1e-4, atol=1e-4)
    assert_one_graph(compiler, graphs=1)
    assert abs(expected[0] - expected[-1]) > 1e-3


def test_capacity_warmup_costs_one_graph_in_all(compiler):
    """The values of the schedule are data: the warm-up graph and the final one, whatever the number of steps."""
    config = config_of("expert", n_layer=5)
    eager, compiled = make_model(config).train(), make_model(config).train()
    compiled.compile(fullgraph=True, dynamic=False, backend="aot_eager")

    def run(model: MoR) -> list[float]:
        losses = train_steps(model, warmup=True, steps=4)
        return losses + train_steps(model, warmup=True, steps=8)  # error_on_recompile from here on

    expected = run(eager)
    torch._dynamo.config.error_on_recompile = False
    torch.testing.assert_close(run(compiled), expected, rtol=1e-3, atol=1e-3)
    assert_one_graph(compiler, graphs=2)


TRACED = [n for n in VARIANTS if n not in COMPILED and not n.endswith(("-2", "-4", "alpha", "untied", "mha", "none"))]


@pytest.mark.parametrize("name", [*TRACED, "expert-none"])
def test_every_variant_is_one_graph(name, compiler):
    """Dynamo only (the tests above cover code generation): no breaks, no recompiles."""
    config = config_of(name)
    if config.n_layer == 8:
        config = config_of(name, n_layer=5)
    model = make_model(config).train()
    idx, targets = make_batch(config, B=2, T=16)
    expected = float(model(idx, targets).loss.detach())
    model.compile(fullgraph=True, dynamic=False, backend="eager")
    out = model(idx, targets)
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-5)
    torch._dynamo.config.error_on_recompile = True
    for seed in range(2):
        model(*make_batch(config, B=2, T=16, seed=seed)).loss.backward()
    assert_one_graph(compiler, graphs=1)


def test_compiled_causal_evaluation_equals_eager(compiler):
    config = config_of("expert", n_layer=5)
    model = make_model(config).eval()
    idx, targets = make_batch(config, T=24)
    with torch.no_grad():
        expected = model(idx, targets)
        model.compile(fullgraph=True, dynamic=False)
        out = model(idx, targets)
        torch._dynamo.config.error_on_recompile = True
        model(*make_batch(config, T=24, seed=9))
    assert_mixed_depths(config, expected.depth)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=0)
    assert torch.equal(out.depth, expected.depth)
    assert_one_graph(compiler, graphs=1)
