"""The engine against decoding every request alone: joins, exits, overflow, slot reuse, cancellation, bad requests."""

import random
from collections import Counter

import pytest
import torch
from conftest import make_model, tiny

import engine as engine_file
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


def alone(model: MoR, prompt: list[int], n: int, slack: float, max_len: int = MAX_LEN) -> tuple[list[int], int]:
    """Greedy tokens of one request decoded by itself, and how many tokens overflowed."""
    cache = model.make_cache(1, max_len, slack=slack)
    logits = model.prefill(torch.tensor([prompt]), torch.tensor([len(prompt)]), cache)
    tokens = [logits.argmax(-1).item()]
    while len(tokens) < n:
        tokens.append(model.decode(torch.tensor(tokens[-1:]), cache).argmax(-1).item())
    return tokens, cache.overflow.item()


def some_requests(model: MoR, engine: Engine, n: int, seed: int, lengths: tuple = (1, 1, 2, 5, 15)) -> list:
    rng, V = random.Random(seed), model.config.vocab_size
    return [engine.submit([rng.randrange(V) for _ in range(rng.choice(lengths))], rng.randint(1, 20)) for _ in range(n)]


class LateCopy:
    """A copy to the host that arrives when its event is waited for, as one from a GPU may."""

    def __init__(self, x: torch.Tensor):
        self.value = x.clone()
        self.host = torch.full_like(x, -9 if x.dtype == torch.long else 1)

    def synchronize(self) -> None:
        self.host.copy_(self.value)


def launch_ahead(engine: Engine, monkeypatch) -> list[int]:
    """Lets an engine work as on a GPU, a stage ahead of what the host has read. Returns a list that will tell how many
    stages were in flight at each read."""
    flights = []
    read = engine.read

    def copy_late(x: torch.Tensor) -> tuple[torch.Tensor, LateCopy]:
        copy = LateCopy(x)
        return copy.host, copy

    def note_read() -> None:
        flights.append(len(engine.flight))
        read()

    monkeypatch.setattr(engine_file, "copy_to_host", copy_late)
    engine.ahead, engine.read = 1, note_read
    return flights


@pytest.mark.parametrize("slack, ahead", [(1.25, False), (0.6, True)])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_request_equals_decoding_it_alone(name, slack, ahead, monkeypatch):
    model = model_of(name)
    engine = Engine(model, slots=7, width=3, max_len=MAX_LEN, turn_width=2, slack=slack, compile=False)
    flights = launch_ahead(engine, monkeypatch) if ahead else []
    requests = some_requests(model, engine, 16, seed=2)
    engine.run()
    assert not ahead or Counter(flights)[2] > len(flights) / 2  # the next stage runs while this one is read
    overflowed = 0
    for request in requests:
        tokens, overflow = alone(model, request.prompt, request.max_new_tokens, slack)
        assert request.status == "done" and request.tokens == tokens
        assert len(request.depth) == len(request.prompt) + len(tokens) - 1
        assert request.overflow == overflow
        overflowed += overflow
    assert (overflowed > 0) == (slack < 1 and model.config.kv == "recursion") or name not in ("vanilla", "recursive")
    assert max(run.rows for run in engine.history if run.stage == "prefill") > 1
    assert sorted(engine.free) == list(range(7)) and not engine.inside and not engine.leaving and not engine.flight


def test_compiled_stages_serve_the_same_tokens_without_recompiling(compiler):
    model = make_model(tiny(n_layer=3, n_recursion=3, router="expert", sharing="cycle"), seed=1).eval()
    engine = Engine(model, slots=5, width=3, max_len=MAX_LEN, turn_width=2, freeze=True)
    engine.warm_up(filtered=(None,))
    graphs = dict(engine.graphs)
    assert {name for name, *_ in graphs} == {"turn", "block", "prefill"} and not engine.history
    eager = Engine(model, slots=5, width=3, max_len=MAX_LEN, turn_width=2, compile=False)
    ours, theirs = (some_requests(model, e, 8, seed=3, lengths=(1, 5)) for e in (engine, eager))
    engine.run()
    eager.run()
    assert [r.tokens for r in ours] == [r.tokens for r in theirs]
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


# ---- prompts


@pytest.mark.parametrize("capacity, longest", [(None, 300), ((1.0, 0.3, 0.1), 150)])
def test_prompts_that_go_deeper_than_expected_are_prefilled_again_with_room(capacity, longest):
    """Of a long prompt only as many tokens are computed as routing should admit; where it admits more, all of them."""
    size = dict(n_layer=5, n_recursion=3, router="expert", block_size=512, capacity=capacity)
    model = make_model(tiny(**size), seed=1).eval()
    engine = Engine(model, slots=5, width=4, max_len=320, slack=0.7, compile=False)
    rng = random.Random(8)
    prompts = [[rng.randrange(61) for _ in range(n)] for n in (longest, 129, 140, 20)]
    requests = [engine.submit(prompt, 6) for prompt in prompts]
    engine.run()
    for request in requests:
        assert (request.tokens, request.overflow) == alone(model, request.prompt, 6, 0.7, 320)
        assert len(request.depth) == len(request.prompt) + 5
    prefills = [run for run in engine.history if run.stage == "prefill"]
    assert len(prefills) > len(requests)  # some were void


def test_warming_up_makes_every_graph_that_prompts_may_need():
    """Also those of prompts that are prefilled again."""
    model = make_model(tiny(n_layer=5, n_recursion=3, router="expert", block_size=512), seed=1).eval()
    for longest in (60, 150, 300):
        engine = Engine(model, slots=5, width=4, max_len=400, slack=0.5, compile=False)
        ran = []
        engine.graphs.run = lambda key, function, *args, ran=ran: ran.append(key) or function(*args)
        engine.warm_up(longest)
        assert engine.history.maxlen and not engine.history and len(engine.free) == 5
        made = set(ran)
        ran.clear()
        for n in range(1, longest + 1, 7):
            engine.submit([n % 61] * n, 1, temperature=n % 2, top_k=n % 3 or None)
        engine.submit([5] * longest, 1)
        engine.run()
        assert set(ran) <= made and len(made) < 20


@pytest.mark.parametrize("allowed, in_a_row", [(40, 1), (20, 1), (80, 2)])
def test_prompts_of_others_do_not_hold_up_a_token_for_long(allowed, in_a_row):
    """A step prefills on average no more tokens than it may, so that running requests go on."""
    model = model_of("vanilla")
    engine = Engine(model, slots=9, width=9, max_len=MAX_LEN, prefill_tokens=allowed, compile=False)
    requests = some_requests(model, engine, 30, seed=3, lengths=(20,))
    row = worst = steps = 0
    while engine.step():
        steps += 1
        stages = [run.stage for run in engine.history]
        assert stages.count("prefill") * MAX_LEN <= steps * allowed + MAX_LEN
    for stage in stages:
        row = row + 1 if stage == "prefill" else 0
        worst = max(worst, row)
    assert worst == in_a_row and all(request.status == "done" for request in requests)


@pytest.mark.parametrize("name", ["vanilla", "expert"])
def test_a_callback_that_raises_fails_its_own_request_alone(name):
    model = model_of(name)
    engine = Engine(model, slots=3, width=3, max_len=MAX_LEN, compile=False)

    def complain(request, token):
        if len(request.tokens) == 2:
            raise KeyError(token)

    first, others = engine.submit([1, 2], 6, on_token=complain), [engine.submit([3], 6), engine.submit([4, 5], 6)]
    with pytest.raises(KeyError):
        engine.run()
    engine.run()
    assert first.status == "failed" and "KeyError" in first.error and len(first.tokens) == 2
    for request in others:
        assert request.status == "done" and request.tokens == alone(model, request.prompt, 6, 1.25)[0]
    assert sorted(engine.free) == [0, 1, 2]


def test_equal_requests_are_two():
    """Cancelling one of them leaves the other in the queue."""
    engine = Engine(model_of("vanilla"), slots=1, width=1, max_len=MAX_LEN, compile=False)
    twins = [engine.submit([1, 2], 3) for _ in range(3)]
    engine.cancel(twins[2])
    engine.run()
    assert [r.status for r in twins] == ["done", "done", "cancelled"] and twins[0].tokens == twins[1].tokens


# ---- all of it for long


@pytest.mark.parametrize("name, ahead", [("expert", True), ("token-share", False)])
def test_two_thousand_requests_with_cancellations_lose_no_seat_and_change_no_token(name, ahead, monkeypatch):
    """Cancelled are requests that wait, that run, and that are in flight, between steps and from within callbacks."""
    rng = random.Random(9)
    model = model_of(name)
    kinds = []
    for length in (1, 2, 9) * 4:
        prompt = [rng.randrange(61) for _ in range(length)]
        kinds.append((prompt, rng.randint(1, 8)))
    expected = [alone(model, prompt, n, 1.25)[0] for prompt, n in kinds]
    engine = Engine(model, slots=150, width=64, max_len=MAX_LEN, turn_width=60, compile=False)
    if ahead:
        launch_ahead(engine, monkeypatch)
    open_requests, cancelled, asked = [], Counter(), []

    def cancel_one(*_) -> None:
        if open_requests and rng.random() < 0.02:
            request = rng.choice(open_requests)
            cancelled[request.status] += 1
            engine.cancel(request)

    for _ in range(2000):
        kind = rng.randrange(len(kinds))
        request = engine.submit(*kinds[kind], on_token=cancel_one)
        asked.append((request, expected[kind]))
        open_requests.append(request)
        if len(open_requests) > 600:
            while len(engine.waiting) > 200:
                for _ in range(10):
                    cancel_one()
                engine.step()
            open_requests = [r for r in open_requests if r.status in ("waiting", "running")]
    engine.run()

    assert min(cancelled["waiting"], cancelled["running"]) > 20
    assert sorted(engine.free) == list(range(150))
    assert not (engine.waiting or engine.leaving or engine.inside or engine.flight)
    done = 0
    for request, tokens in asked:
        assert request.status in ("done", "cancelled")
        assert request.tokens == tokens[: len(request.tokens)]
        assert request.status == "cancelled" or request.tokens == tokens
        done += request.status == "done"
    assert 2000 - done == cancelled["waiting"] + cancelled["running"]
