"""Continuous depth-wise batching (paper Section 3.3): serving a Mixture-of-Recursions with full batches at every depth.

    engine = Engine(model, slots=63, width=32, max_len=512)
    requests = [engine.submit(prompt, max_new_tokens=256) for prompt in prompts]
    engine.run()                     # or engine.step() from a loop of your own; submit and cancel at any time
    requests[0].tokens

All recursions share one block of layers, so rows at different depths go through it together. A row whose token has had
its recursions leaves the block batch, and a waiting row takes its place at once:

    turn    last layer, head, sampling; then embedding, first layer, recursion 0 of the new token    `turn_width` lanes
    block   one of the later recursions for each row, whichever it is                                `width` lanes

Every token runs recursion 0, so it needs no choice of rows, and a turn that ends with it saves a stage per token. Both
are static graphs over row numbers; K/V stays where it is, in one static cache, and is read by index inside the
attention kernel. A vanilla model has no later recursions: a turn is its whole step, which makes the same engine
ordinary continuous (sequence-wise) batching.

A request is resident in a seat, which is a row of the cache; one more row is scratch for lanes without a request.
Compiled functions, prefill and sampling are those of generate.py, the parts of a token's way those of `MoR.decode`.

Shapes: W lanes of a stage, B rows, V vocabulary.
"""

import copy
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cache import KVCache
from generate import Graphs, prefill, prepare_weights, sample_token, setting_errors
from model import OF_ONE_STAGE, MoR, State

# ----------------------------------------------------------------------------------------------------------------------
# serving


@dataclass
class Request:
    """What was asked for, and what came of it. status: waiting, running, done, cancelled or failed (see `error`)."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop_token: int | None = None
    on_token: Callable[["Request", int], None] | None = None
    tokens: list[int] = field(default_factory=list)  # new tokens, without the stop token
    depth: list[int] = field(default_factory=list)  # recursions of every token fed: all but the last one sampled
    overflow: int = 0  # tokens that ended early for want of a cache slot
    status: str = "waiting"
    error: str | None = None


class Stage(NamedTuple):
    """One stage of the engine, as it ran."""

    stage: str  # turn, block or prefill
    seconds: float
    rows: int  # lanes that had a request
    recursions: list[int] | None = None  # block: rows in each recursion


class Engine:
    """Serves requests in `slots` seats, by turns of turn_width lanes and blocks of width lanes.

    Where slots >= width + turn_width - 1 one of the two is always full (a vanilla model only turns: slots >=
    turn_width). A seat has room for max_len tokens (slack * capacity_r of them in recursion r), so what was admitted
    always finishes: a request waits for a seat, and one longer than max_len fails when it is submitted. Raises
    ValueError as make_cache does."""

    @torch.no_grad()
    def __init__(
        self,
        model: MoR,
        slots: int,
        width: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        *,
        turn_width: int | None = None,
        slack: float | None = None,
        threshold: float = 0.5,
        max_depth: int | None = None,
        compile: bool = True,
        freeze: bool = False,
        quantize: str | None = None,
        vocab_size: int | None = None,
    ):
        c = model.config
        if "sequence" in c.sharing:
            raise ValueError(f"sharing={c.sharing!r} has no block that recursions share: use a cycle sharing")
        turn_width = width if turn_width is None else turn_width
        if min(slots, width, turn_width) < 1:
            raise ValueError(f"slots={slots}, width={width} and turn_width={turn_width} must be positive")
        model = model.eval() if dtype is None else model.eval().to(dtype)
        model = self.model = prepare_weights(model, quantize)
        self.vocab_size = vocab_size
        self.slots, self.width, self.turn_width = slots, width, turn_width
        self.cache = model.make_cache(slots + 1, max_len, slack, threshold, max_depth)
        assert_windows_lie_inside(self.cache)
        device = model.wte.weight.device
        self.graphs = Graphs(compile, freeze, device)

        # per row: what is kept of its State between stages, and how it samples
        self.state = self.blank_state()
        real = torch.zeros(slots + 1, device=device)
        whole = torch.zeros(slots + 1, dtype=torch.long, device=device)
        self.knobs = dict(temperature=real, top_p=real.clone(), top_k=whole, seed=whole.clone())

        self.waiting: deque[Request] = deque()
        self.free = deque(range(slots))  # seats
        self.owner: list[Request | None] = [None] * slots
        self.given: dict[int, int] = {}  # seat -> token to enter with, instead of a sampled one
        self.leaving: deque[int] = deque()  # seats that wait for a turn
        self.inside: deque[tuple[int, int]] = deque()  # (seat, recursion) that wait for the block
        self.history: deque[Stage] = deque(maxlen=10_000)  # the latest stages

    # ---- stages: static graphs over row numbers [W]

    def blank_state(self) -> dict[str, Tensor]:
        """Returns what each row keeps of its State between stages, zeros [slots + 1, 1, ...]: all that a token has
        after its first decision, but for the fields of one stage alone."""
        row = torch.tensor([self.slots], device=self.cache.position.device)  # the scratch row
        p = self.model.decode_pass(torch.zeros_like(row), self.cache.rows(row))
        s = self.model.decode_enter(torch.zeros_like(row), p)
        s = self.model.route(0, s, p)
        kept = {}
        for name, value in s._asdict().items():
            if name not in OF_ONE_STAGE and value is not None:
                kept[name] = value.new_zeros(self.slots + 1, *value.shape[1:])
        return kept

    def load(self, row: Tensor, active: Tensor) -> State:
        fields = {name: rows[row] for name, rows in self.state.items()}
        return State(active=active, **fields)

    def save(self, row: Tensor, s: State) -> None:
        for name, rows in self.state.items():
            rows[row] = getattr(s, name)

    def turn(self, row: Tensor, given: Tensor, filtered: bool | None) -> Tensor:
        """Takes row numbers and given tokens (-1: sample one), int64 [W] -> int64 [4, W]: token, depth of the token
        that left, overflow up to it, whether the new one runs recursion 1."""
        model, cache, real = self.model, self.cache.rows(row), row < self.slots
        leaves = real & (given < 0)
        p = model.decode_pass(torch.where(leaves, 0, -1), cache)
        s = self.load(row, p.valid)
        logits = model.decode_leave(s, p)
        left, overflow = s.depth[:, 0], cache.overflow[row]
        knobs = {name: rows[row] for name, rows in self.knobs.items()}
        sampled = sample_token(logits[:, : self.vocab_size], knobs, cache.position[row], filtered)
        token = torch.where(given < 0, sampled, given)

        p = model.decode_pass(torch.where(real, token, -1), cache)
        s = model.decode_enter(token, p)
        s = model.route(0, s, p)
        s = model.recurse(0, s, p)
        s = model.go_on(0, s, p)
        self.save(row, s)
        return torch.stack((token, left, overflow, s.active[:, 0]))

    def block(self, row: Tensor, r: Tensor) -> Tensor:
        """Runs recursion r > 0 of each row, int64 [W] -> bool [W]: rows that run the next one."""
        model, r = self.model, r[:, None]
        p = model.decode_pass(torch.where(row < self.slots, 0, -1), self.cache.rows(row))
        s = self.load(row, p.valid)
        s = model.recurse(r, s, p)
        s = model.go_on(r, s, p)
        self.save(row, s)
        return s.active[:, 0]

    # ---- requests

    def submit(self, prompt: list[int], max_new_tokens: int, **sampling) -> Request:
        """Queues a request; sampling: temperature, top_k, top_p, seed, stop_token, on_token. One that can never run is
        returned as failed, and disturbs no other."""
        request = Request(list(prompt), max_new_tokens, **sampling)
        V, room = self.model.config.vocab_size, self.cache.max_len
        errors = setting_errors(max_new_tokens, request.temperature, request.top_k, request.top_p)
        if not prompt:
            errors.append("the prompt is empty: begin with the end-of-text token")
        if any(not 0 <= t < V for t in prompt):
            errors.append(f"the prompt has token ids outside of the vocabulary of {V}")
        if len(prompt) + max_new_tokens > room:
            errors.append(f"{len(prompt)} prompt tokens and {max_new_tokens} new ones never fit max_len={room}")
        if errors:
            request.status = "failed"
            request.error = "; ".join(errors)
        else:
            self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request now; its seat is free for the next."""
        if request.status == "waiting":
            self.waiting.remove(request)
        elif request.status == "running":
            seat = next(i for i, owner in enumerate(self.owner) if owner is request)
            self.leaving = deque(s for s in self.leaving if s != seat)
            self.inside = deque((s, r) for s, r in self.inside if s != seat)
            self.release(seat)
        else:
            return
        request.status = "cancelled"

    def release(self, seat: int) -> None:
        """Frees a seat."""
        self.owner[seat] = None
        self.given.pop(seat, None)
        self.free.append(seat)

    def admit(self) -> None:
        """Seats waiting requests, first come, first served: prefills the prompt but its last token, which enters with a
        turn."""
        while self.waiting and self.free:
            request, seat = self.waiting.popleft(), self.free.popleft()
            self.owner[seat], request.status = request, "running"
            V = self.model.config.vocab_size
            self.knobs["temperature"][seat] = min(request.temperature, 1e30)  # what fp32 holds
            self.knobs["top_p"][seat] = request.top_p
            self.knobs["top_k"][seat] = min(request.top_k or V, V)
            self.knobs["seed"][seat] = request.seed % 2**32

            *body, self.given[seat] = request.prompt
            self.leaving.append(seat)
            self.cache.position[seat] = 0
            self.cache.fill[:, seat] = 0
            self.cache.overflow[seat] = 0
            if body:
                start = time.perf_counter()
                own = one_row(self.cache, seat)
                prefill(self.graphs, self.model, [body], own)
                request.depth += own.depth[0, : len(body)].tolist()
                self.history.append(Stage("prefill", time.perf_counter() - start, 1))

    # ---- the loop

    @torch.no_grad()
    def step(self) -> bool:
        """Admits what fits and runs one stage; False when there was nothing to do. One host sync for the stage, and one
        for each request admitted with a prompt.

        The policy: a full turn first, since what leaves it is what keeps the block full; else a full block; else
        whichever is fuller. Every resident row waits for one of them, so with width + turn_width - 1 of them one is
        full; queues are first in, first out, so no row waits for long."""
        self.admit()
        turn = len(self.leaving) / self.turn_width
        block = len(self.inside) / self.width
        if not turn and not block:
            return False
        if turn >= 1 or (block < 1 and turn >= block):
            self.run_turn()
        else:
            self.run_block()
        return True

    def run(self) -> None:
        """Runs until every request is done."""
        while self.step():
            pass

    def lanes(self, values: list[int], width: int, unused: int) -> Tensor:
        """Returns one value per lane [width], `unused` for the lanes without one, on the device."""
        return torch.tensor(values + [unused] * (width - len(values)), device=self.cache.position.device)

    def run_turn(self) -> None:
        """Runs a turn over the seats that have waited longest."""
        start = time.perf_counter()
        seats = [self.leaving.popleft() for _ in range(min(self.turn_width, len(self.leaving)))]
        given = [self.given.pop(seat, -1) for seat in seats]
        asked = [self.owner[seat] for seat in seats]
        filtered = None  # the least of three graphs that serves all
        for request in asked:
            if request.temperature > 0:
                filtered = bool(filtered or request.top_k or request.top_p < 1)
        row = self.lanes(seats, self.turn_width, self.slots)
        given_row = self.lanes(given, self.turn_width, -1)
        result = self.graphs.run(("turn", filtered), lambda a, b: self.turn(a, b, filtered), row, given_row)
        result = result.T.tolist()  # the host sync
        self.history.append(Stage("turn", time.perf_counter() - start, len(seats)))

        for i, seat in enumerate(seats):
            token, depth, overflow, more = result[i]
            request = asked[i]
            if given[i] < 0 and request.status == "running":
                request.depth.append(depth)
                request.overflow = overflow
                self.take(seat, request, token)
            if request.status != "running":  # over, or cancelled by a callback
                continue
            if more:
                self.inside.append((seat, 1))
            else:
                self.leaving.append(seat)

    def take(self, seat: int, request: Request, token: int) -> None:
        """Takes in a sampled token, which may be the request's last."""
        stop = token == request.stop_token
        if not stop:
            request.tokens.append(token)
            if request.on_token is not None:
                request.on_token(request, token)
        full = len(request.tokens) == request.max_new_tokens
        if request.status == "running" and (stop or full):
            request.status = "done"
            self.release(seat)

    def run_block(self) -> None:
        """Runs one recursion of the rows that have waited longest."""
        start = time.perf_counter()
        batch = [self.inside.popleft() for _ in range(min(self.width, len(self.inside)))]
        seats = [seat for seat, _ in batch]
        recursions = [r for _, r in batch]
        row = self.lanes(seats, self.width, self.slots)
        r = self.lanes(recursions, self.width, 1)  # of the scratch row: any but 0, see assert_windows_lie_inside
        goes_on = self.graphs.run(("block",), self.block, row, r).tolist()  # the host sync
        counts = [recursions.count(i) for i in range(self.model.config.n_recursion)]
        self.history.append(Stage("block", time.perf_counter() - start, len(seats), counts))

        for (seat, recursion), more in zip(batch, goes_on, strict=False):
            if more:
                self.inside.append((seat, recursion + 1))
            else:
                self.leaving.append(seat)


def assert_windows_lie_inside(cache: KVCache) -> None:
    """Checks on the host what no kernel checks: that the window of every row at every later recursion lies inside the
    buffers. Those of late recursions end in the row behind; the scratch row, the last, is only at recursion 1."""
    if len(cache.slots) < 2:
        return
    row_length = cache.k[len(cache.k) // 2].size(1)  # of a layer of the block
    for r, start in enumerate(cache.start):
        last_row = cache.batch - 1 if r == 1 else cache.batch - 2
        end = last_row * row_length + start + cache.longest_window
        assert r == 0 or end <= cache.batch * row_length, f"recursion {r}: a window ends at {end}"


def one_row(cache: KVCache, row: int) -> KVCache:
    """Returns one row of a cache as a cache of its own, in the same memory."""
    own = copy.copy(cache)
    one = slice(row, row + 1)
    own.batch = 1
    own.every_row = cache.every_row[:1]
    own.k = [t[one] for t in cache.k]
    own.v = [t[one] for t in cache.v]
    own.position = cache.position[one]
    own.fill = cache.fill[:, one]
    own.overflow = cache.overflow[one]
    own.depth = cache.depth[one]
    return own
