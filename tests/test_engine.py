"""The engine against decoding every request alone: joins, exits, overflow, slot reuse, cancellation, bad requests."""

import random

import pytest
import torch
from conftest import make_model, tiny

from engine import Engine
from model import MoR

VARIANTS = {
    "vanilla": dict(n_layer=3),
    "recursive": dict(n_layer=5, n_recursion=3),
    "expert": dict(n_layer=5, n_recursion=3, router="expert"),
    "expert-4": dict(n_layer=4, n_recursion=4, router="expert", sharing="cycle"),
    "expert-aux-share": dict(n_layer=5, n_recursion=3, router="expert", causality="aux_router", kv="share"),
    "expert-capacity": dict(n_layer=5, n_recursion=3, router="expert", capacity=(0.8, 0.5, 0.3)),
    "token": dict(n_layer=5, n_recursion=3, router="token"),
    "token-share": dict(n_layer=5, n_recursion=3, router="token", kv="share"),
}
MAX_LEN = 40


def model_of(name: str) -> MoR:
    return make_model(tiny(**VARIANTS[name]), seed=1).eval()


def alone(model: MoR, prompt: list[int], n: int, slack: float) -> tuple[list[int], list[int]]:
    """Greedy tokens of one request decoded by itself, and how many tokens overflowed."""
    cache = model.make_cache(1, MAX_LEN, slack=slack)
    logits = model.prefill(torch.tensor([prompt]), torch.tensor([len(prompt)]), cache)
    tokens = [logits.argmax(-1).item()]
    while len(tokens) < n:
        tokens.append(model.decode(torch.tensor(tokens[-1:]), cache).argmax(-1).item())
    return tokens, cache.overflow.item()


def some_requests(model: MoR, engine: Engine, n: int, seed: int, lengths: tuple = (1, 1, 2, 5, 15)) -> list:
    rng, V = random.Random(seed), model.config.vocab_size
    return [engine.submit([rng.randrange(V) for _ in range(rng.choice(lengths))], rng.randint(1, 20)) for _ in range(n)]


@pytest.mark.parametrize("slack", [1.25, 0.6])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_request_equals_decoding_it_alone(name, slack):
    model = model_of(name)
    engine = Engine(model, slots=7, width=4, max_len=MAX_LEN, turn_width=3, slack=slack, compile=False)
    requests = some_requests(model, engine, 16, seed=2)
    engine.run()
    overflowed = 0
    for request in requests:
        tokens, overflow = alone(model, request.prompt, request.max_new_tokens, slack)
        assert request.status == "done" and request.tokens == tokens
        assert len(request.depth) == len(request.prompt) + len(tokens) - 1
        assert request.overflow == overflow
        overflowed += overflow
    assert (overflowed > 0) == (slack < 1 and model.config.kv == "recursion") or name not in ("vanilla", "recursive")
    assert sorted(engine.free) == list(range(7)) and not engine.inside and not engine.leaving


def test_compiled_stages_serve_the_same_tokens_without_recompiling(compiler):
    model = make_model(tiny(n_layer=3, n_recursion=3, router="expert", sharing="cycle"), seed=1).eval()
    engine = Engine(model, slots=5, width=3, max_len=MAX_LEN, turn_width=2, freeze=True)
    eager = Engine(model, slots=5, width=3, max_len=MAX_LEN, turn_width=2, compile=False)
    ours, theirs = (some_requests(model, e, 8, seed=3, lengths=(1, 5)) for e in (engine, eager))
    engine.run()
    eager.run()
    assert [r.tokens for r in ours] == [r.tokens for r in theirs]
    graphs = dict(engine.graphs)
    assert {name for name, *_ in graphs} == {"turn", "block", "prefill"}
    some_requests(model, engine, 8, seed=4, lengths=(1, 3))  # no graph may compile twice: it would raise
    engine.run()
    assert engine.graphs == graphs


def test_rows_at_different_depths_share_a_batch_and_no_request_starves():
    model = model_of("expert")
    engine = Engine(model, slots=7, width=4, max_len=MAX_LEN, turn_width=4, compile=False)
    done = []
    requests = some_requests(model, engine, 30, seed=5)
    for request in requests:
        request.on_token = lambda r, token: done.append(id(r)) if len(r.tokens) == r.max_new_tokens else None
    engine.run()
    assert any(sum(n > 0 for n in run.recursions) > 1 for run in engine.history if run.stage == "block")
    busy = list(engine.history)[: len(engine.history) // 2]
    for stage, width in (("block", engine.width), ("turn", engine.turn_width)):
        rows = [run.rows for run in busy if run.stage == stage]
        assert sum(rows) / len(rows) > 0.9 * width  # full while requests wait
    # first come, first served: nobody finishes later than all requests that came two full houses after it
    order = [done.index(id(r)) for r in requests]
    assert all(order[i] < max(order[i + 14 :]) for i in range(len(order) - 14))


def test_sampling_is_reproducible_and_independent_of_the_batch():
    model = model_of("token")
    knobs = dict(temperature=0.9, top_k=20, top_p=0.9)

    def serve(slots: int, others: int) -> list[int]:
        engine = Engine(model, slots=slots, width=2, max_len=MAX_LEN, compile=False)
        some_requests(model, engine, others, seed=6)
        request = engine.submit([3, 1, 4], 12, seed=11, **knobs)
        engine.run()
        return request.tokens

    assert serve(3, 0) == serve(5, 6)
    assert len(serve(3, 0)) == 12


def test_bad_requests_fail_alone():
    model = model_of("expert")
    engine = Engine(model, slots=3, width=2, max_len=MAX_LEN, compile=False)
    good = engine.submit([1, 2, 3], 5)
    cases = {
        "empty": ([], 5, {}),
        "vocabulary": ([1, 10**6], 5, {}),
        "max_new_tokens": ([1], 0, {}),
        "never fit": ([1] * 30, 20, {}),
        "temperature": ([1], 5, dict(temperature=-1.0)),
        "top_p": ([1], 5, dict(top_p=0.0)),
        "top_k": ([1], 5, dict(top_k=0)),
    }
    for word, (prompt, n, sampling) in cases.items():
        request = engine.submit(prompt, n, **sampling)
        assert request.status == "failed" and word in request.error and "\n" not in request.error
    engine.run()
    assert good.status == "done" and len(good.tokens) == 5


def test_cancelled_and_stopped_requests_free_their_slots():
    model = model_of("expert")
    engine = Engine(model, slots=3, width=2, max_len=MAX_LEN, compile=False)
    requests = some_requests(model, engine, 6, seed=7)
    requests[0].on_token = lambda r, token: engine.cancel(r)
    stop = alone(model, requests[1].prompt, 3, 1.25)[0][-1]
    requests[1].stop_token, requests[1].max_new_tokens = stop, 20
    engine.step()
    engine.cancel(requests[2])
    engine.cancel(requests[5])
    engine.run()
    assert requests[0].status == "cancelled" and len(requests[0].tokens) == 1
    assert requests[1].status == "done" and stop not in requests[1].tokens and len(requests[1].tokens) < 3
    assert requests[2].status == requests[5].status == "cancelled"
    for request in requests[3:5]:
        assert request.tokens == alone(model, request.prompt, request.max_new_tokens, 1.25)[0]
    assert sorted(engine.free) == [0, 1, 2]


def test_impossible_engines_are_refused():
    model = make_model(tiny(n_layer=6, n_recursion=3, sharing="sequence"))
    with pytest.raises(ValueError, match="sharing"):
        Engine(model, 2, 2, MAX_LEN)
    with pytest.raises(ValueError, match="width=0"):
        Engine(model_of("vanilla"), 2, 0, MAX_LEN)
    with pytest.raises(ValueError, match="max_len"):
        Engine(model_of("vanilla"), 2, 2, 10**6)


@pytest.mark.soak
def test_two_thousand_requests_leak_nothing():
    import resource

    model = model_of("expert")
    engine = Engine(model, slots=15, width=8, max_len=MAX_LEN, compile=False)
    memory = []
    for i in range(8):
        requests = some_requests(model, engine, 250, seed=i)
        for request in requests[::50]:
            engine.cancel(request)
        engine.run()
        engine.history.clear()
        assert all(r.status in ("done", "cancelled") for r in requests) and len(engine.free) == 15
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert memory[-1] < memory[1] * 1.02
