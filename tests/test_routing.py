"""What a user changes or asks of the routing: a rule of one's own, the controls, padding, labels, counts and costs."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_model, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import Engine, assert_windows_lie_inside
from generate import Decoder, generate
from model import MoR, MoRConfig

MAX_LEN = 40
CONTROLS = [(router, kv) for router in ("random", "position") for kv in ("recursion", "share")]


class EveryThird(MoR):
    """A routing rule of one's own: recursion r > 0 is for every third token, and for no two recursions the same."""

    def decide(self, r, s, p):
        return (p.position + s.depth) % 3 == 0


def toy_model() -> MoR:
    config = tiny(n_recursion=3, router="expert", capacity=(1.0, 0.5, 0.4))
    model = EveryThird(config)
    model.load_state_dict(make_model(config).state_dict())
    return model


def expected_depth(T: int) -> Tensor:
    """The rule by hand: recursion 1 takes the positions 2, 5, ... (depth is 1 there), recursion 2 none of these."""
    return torch.tensor([2 if t % 3 == 2 else 1 for t in range(T)])


def decoded_logits(model: MoR, idx: Tensor, lengths: Tensor, slack: float) -> list[tuple[int, int, Tensor]]:
    """(row, position, logits [V]) of a padded prompt and then one token at a time, to the end of the shortest row."""
    cache = model.make_cache(len(idx), MAX_LEN, slack=slack)
    logits, rows = model.prefill(idx[:, : lengths.max()], lengths, cache), torch.arange(len(idx))
    found = [(b, int(lengths[b]) - 1, logits[b]) for b in rows]
    for step in range(idx.size(1) - int(lengths.max())):
        logits = model.decode(idx[rows, lengths + step], cache)
        found += [(b, int(lengths[b]) + step, logits[b]) for b in rows]
    return found


def test_a_rule_of_ones_own_holds_in_training_evaluation_decoding_and_serving():
    model = toy_model()
    idx, targets = make_batch(model.config, B=3, T=24)
    trained = model.train()(idx, targets)
    trained.loss.backward()
    assert torch.equal(trained.depth, expected_depth(24).expand(3, 24)) and trained.dropped == 0

    model.eval()
    whole = model(idx)
    assert torch.equal(whole.depth, trained.depth)
    for row, t, logits in decoded_logits(model, idx, torch.tensor([5, 9, 14]), slack=4):
        torch.testing.assert_close(logits, whole.logits[row, t], atol=1e-4, rtol=0)

    engine = Engine(model, 5, 3, MAX_LEN, slack=4, compile=False)
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    requests = [engine.submit(prompt, 12) for prompt in prompts]
    engine.run()
    alone = generate(model, prompts, 12, slack=4, compile=False)
    for request, tokens, depth in zip(requests, alone.tokens, alone.depth, strict=True):
        assert request.tokens == tokens
        assert request.depth == expected_depth(len(request.depth)).tolist() == depth[: len(request.depth)]


@pytest.mark.parametrize("router,kv", CONTROLS)
def test_controls_are_causal_and_cached_equals_uncached(router, kv):
    model = make_model(tiny(n_recursion=3, router=router, kv=kv)).eval()
    idx, _ = make_batch(model.config, B=3, T=24)
    whole = model(idx)
    for row, t, logits in decoded_logits(model, idx, torch.tensor([5, 9, 14]), slack=4):
        torch.testing.assert_close(logits, whole.logits[row, t], atol=1e-4, rtol=0)

    changed = idx.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % model.config.vocab_size
    other = model(changed)
    torch.testing.assert_close(other.logits[:, :15], whole.logits[:, :15], atol=1e-5, rtol=0)
    assert torch.equal(other.depth[:, :15], whole.depth[:, :15])
    assert torch.equal(model(idx, routing="topk").depth, whole.depth)  # only expert choice differs

    engine = Engine(model, 5, 3, MAX_LEN, slack=4, compile=False)
    prompts = [row[:7].tolist() for row in idx]
    requests = [engine.submit(prompt, 8) for prompt in prompts]
    engine.run()
    assert [r.tokens for r in requests] == model.generate(prompts, 8, slack=4)


@pytest.mark.parametrize("router", ["random", "position"])
def test_controls_have_the_capacities_of_expert_choice(router):
    config = tiny(n_recursion=3, router=router, block_size=512)
    model = make_model(config).train()
    g = torch.Generator().manual_seed(5)
    idx = torch.randint(config.vocab_size, (8, 512), generator=g)
    out = model(idx, idx)
    for r, capacity in enumerate(config.capacities):
        assert abs((out.depth > r).float().mean() - capacity) < 0.02
    assert out.dropped == 0 and set(out.losses) == {"lm"}
    same = torch.equal(out.depth[0], out.depth[1])
    assert same == (router == "position")  # chance goes by the token too
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.routers.parameters())  # the gate is expert choice's


@pytest.mark.parametrize("router,kv", [("expert", "recursion"), ("random", "share")])
def test_controls_and_rules_compile_to_one_graph(router, kv, compiler):
    config = tiny(n_recursion=3, router=router, kv=kv, n_layer=5, qk_norm=True)
    model = make_model(config).train()
    idx, targets = make_batch(config, T=16)
    valid = torch.ones_like(idx)
    valid[0, :5] = 0
    labels = idx.clone()
    expected = float(model(idx, labels=labels, valid=valid).loss.detach())
    model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    out = model(idx, labels=labels, valid=valid)
    torch._dynamo.config.error_on_recompile = True
    model(targets.clamp(min=0), labels=labels, valid=valid.flip(1)).loss.backward()
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert not compiler["graph_break"] and compiler["stats"]["unique_graphs"] == 1


PADDED = [
    dict(),
    dict(n_recursion=3),
    dict(n_recursion=3, router="expert", z_coef=1e-3),
    dict(n_recursion=3, router="expert", kv="share"),
    dict(n_recursion=3, router="expert", causality="aux_router"),
    dict(n_recursion=3, router="token", z_coef=1e-3),
    dict(n_recursion=2, router="token", kv="share", balance="bias"),
    dict(n_recursion=3, router="random"),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", PADDED, ids=lambda s: "-".join(map(str, s.values())) or "vanilla")
def test_a_padded_row_gives_what_it_gives_alone(settings, side):
    """Logits, depths, language-model loss and its gradients, in training (top-k) and in evaluation (causal)."""
    model = make_model(tiny(**settings))
    lengths, T = [7, 13, 20], 20
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(61, (n,), generator=g) for n in lengths]
    idx, valid = torch.full((3, T), 60), torch.zeros(3, T, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        idx[b, at], valid[b, at] = row, 1
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        out = model(idx, labels=idx, valid=valid, return_logits=True)
        total = sum(n - 1 for n in lengths)
        alone = [model(row[None], labels=row[None], return_logits=True) for row in rows]
        lm = 0.0
        for b, one in enumerate(alone):
            real = valid[b].bool()
            torch.testing.assert_close(out.logits[b][real], one.logits[0], atol=1e-4, rtol=0)
            assert torch.equal(out.depth[b][real], one.depth[0])
            assert (out.depth[b][~real] == 0).all()
            lm = lm + one.losses["lm"] * (lengths[b] - 1) / total
        assert float(out.losses["lm"]) == pytest.approx(float(lm), abs=1e-4)
        assert out.dropped == sum(one.dropped for one in alone)

    # gradients of the language-model loss alone: router losses are means over all tokens of a batch
    model.train()

    def gradients(logits_and_labels: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        model.zero_grad()
        losses = [F.cross_entropy(x, y, reduction="sum", ignore_index=-100) for x, y in logits_and_labels]
        sum(losses).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    out = model(idx, valid=valid, return_logits=True)
    padded = gradients([(out.logits[b][valid[b].bool()][:-1], row[1:]) for b, row in enumerate(rows)])
    single = gradients([(model(row[None], return_logits=True).logits[0, :-1], row[1:]) for row in rows])
    for a, b in zip(padded, single, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_labels_are_shifted_here_and_targets_are_not():
    model = make_model(tiny(n_recursion=3, router="expert")).train()
    idx, _ = make_batch(model.config, T=20)
    targets = torch.cat((idx[:, 1:], torch.full((2, 1), -100)), 1)
    torch.testing.assert_close(model(idx, labels=idx).loss, model(idx, targets).loss, atol=0, rtol=0)
    with pytest.raises(ValueError, match="not both"):
        model(idx, targets, labels=idx)
    out = model(idx, return_hidden=True)
    assert out.hidden.shape == (2, 20, 32) and model(idx).hidden is None
    torch.testing.assert_close(out.hidden.float() @ model.head_weight.float().T, out.logits)


def test_tokens_without_a_slot_are_counted_and_large_slack_drops_none():
    idx, targets = make_batch(tiny(), B=4, T=40)
    for slack, dropping in ((1.0, True), (3.0, False)):
        model = make_model(tiny(n_recursion=3, router="token", capacity_slack=slack)).train()
        out = model(idx, targets)
        assert (out.dropped > 0) == dropping
        assert out.dropped == (out.choice > out.depth).sum()  # a token stops once
        assert model.eval()(idx, targets).dropped == 0


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two contiguous tensors share memory: those of one storage need not."""
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    return x.data_ptr() < y.data_ptr() + y.nbytes and y.data_ptr() < x.data_ptr() + x.nbytes


class Readers(TorchDispatchMode):
    """Notes whether any operation reads one of some tensors."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.tensors = tensors
        self.read = False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs or {})):
            if isinstance(x, Tensor):
                self.read |= any(overlap(x, y) for y in self.tensors)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("kv,projects", [("share", False), ("recursion", True)])
def test_serving_with_shared_kv_projects_none_after_recursion_0(kv, projects):
    model = make_model(tiny(n_recursion=3, router="expert", kv=kv)).eval()
    engine = Engine(model, 7, 4, MAX_LEN, slack=4, compile=False)
    weights = [w.weight for layer in model.block for w in (layer.wk, layer.wv)]
    stage, seen = engine.block, []

    def watched(row: Tensor, r: Tensor) -> Tensor:
        with Readers(weights) as readers:
            out = stage(row, r)
        seen.append(readers.read)
        return out

    engine.block = watched
    for n in (3, 5, 9):
        engine.submit(list(range(1, n)), 6)
    engine.run()
    assert seen and set(seen) == {projects}


def test_windows_that_leave_the_cache_are_found_when_the_engine_is_made():
    model = make_model(tiny(n_recursion=3, router="expert")).eval()
    cache = model.make_cache(4, MAX_LEN)
    assert_windows_lie_inside(cache)
    cache.slots[1] += cache.slots[2] + 1  # as if a later recursion had more room
    with pytest.raises(AssertionError, match="window"):
        assert_windows_lie_inside(cache)


RELEASED = [  # (settings of a released 360M run, its steps, forward FLOPs against vanilla by the paper's convention)
    (dict(), 9438, 1.0),
    (dict(n_recursion=2, router="expert"), 12619, 0.7479),
    (dict(n_recursion=3, router="expert"), 14161, 0.6665),
    (dict(n_recursion=4, router="expert"), 14216, 0.6639),
    (dict(n_recursion=3, router="expert", kv="share"), 14672, 0.6433),
]


@pytest.mark.parametrize("settings,steps,ratio", RELEASED, ids=lambda x: str(x))
def test_flops_by_the_papers_convention(settings, steps, ratio):
    with torch.device("meta"):
        vanilla = MoR(MoRConfig.preset("360M"))
        model = MoR(MoRConfig.preset("360M", **settings))
    per_token = model.flops_per_token(2048, convention="paper")
    assert per_token / vanilla.flops_per_token(2048, convention="paper") == pytest.approx(ratio, abs=1e-3)
    assert per_token * steps * 1024 * 2048 == pytest.approx(16.50e18, rel=1e-3)
    exact = model.flops_per_token(2048)
    assert exact < per_token  # grouped queries make K and V cheaper
    with pytest.raises(ValueError, match="convention"):
        model.flops_per_token(2048, convention="theirs")


def test_qk_norm_bounds_every_score_and_keeps_the_cache_exact():
    plain, normed = tiny(n_recursion=3, router="expert"), tiny(n_recursion=3, router="expert", qk_norm=True)
    idx, _ = make_batch(plain, B=3, T=24)
    model = make_model(normed).eval()
    assert not torch.allclose(model(idx).logits, make_model(plain).eval()(idx).logits, atol=1e-2)
    with torch.no_grad():  # larger projections change nothing: queries and keys have unit RMS
        before = model(idx).logits
        for layer in (model.first, *model.block, model.last):
            layer.wq.weight.mul_(3)
            layer.wk.weight.mul_(0.5)
        torch.testing.assert_close(model(idx).logits, before, atol=1e-3, rtol=1e-3)
    whole = model(idx)
    for row, t, logits in decoded_logits(model, idx, torch.tensor([5, 9, 14]), slack=4):
        torch.testing.assert_close(logits, whole.logits[row, t], atol=1e-4, rtol=0)


def test_a_model_made_without_memory_routes_as_one_made_with_it():
    """Tables that no state dict holds are made anew when a model is moved or given memory."""
    config = tiny(n_recursion=3, router="expert")
    made = make_model(config).eval()
    with torch.device("meta"):
        empty = MoR(config)
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(made.state_dict())
    idx, _ = make_batch(config)
    torch.testing.assert_close(empty(idx).logits, made(idx).logits, atol=0, rtol=0)
    assert torch.equal(empty(idx).depth, made(idx).depth)


def test_settings_that_would_go_unheard_are_refused():
    model = make_model(tiny(n_recursion=3, router="expert")).eval()
    decoder = Decoder(model, 1, MAX_LEN, compile=False)
    with pytest.raises(ValueError, match="threshold"):
        generate(model, [[1]], 3, decoder=decoder, threshold=0.9)
    with pytest.raises(ValueError, match="one entry per recursion"):
        tiny(n_recursion=3, router="expert", capacity=0.5)
    with pytest.raises(ValueError, match="sharing=None"):
        MoRConfig.preset("nano", n_recursion=3, sharing=None)
    with pytest.raises(ValueError, match="0 tokens"):
        model(torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e300])
def test_extreme_settings_sample_as_their_limits_do(temperature):
    """Next to no temperature is greedy; any other is a draw among all; slack and top-k beyond all are all."""
    model = make_model(tiny(n_recursion=3, router="expert")).eval()
    options = dict(compile=False, slack=1e308)
    greedy = generate(model, [[1, 2, 3]], 12, **options).tokens[0]
    drawn = generate(model, [[1, 2, 3]], 12, temperature=temperature, top_k=2**70, **options).tokens[0]
    engine = Engine(model, 2, 2, MAX_LEN, **options)
    request = engine.submit([1, 2, 3], 12, temperature=temperature, top_k=2**70)
    engine.run()
    assert request.tokens == drawn
    assert (drawn == greedy) == (temperature < 1)
