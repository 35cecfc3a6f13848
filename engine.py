"""
Continuous depth-wise batching (paper Section 3.3): serving a Mixture-of-Recursions with full batches at every depth.

    engine = Engine(model, slots=63, width=32, max_len=512)
    requests = [engine.submit(prompt, max_new_tokens=256) for prompt in prompts]
    engine.run()                     # or engine.step() from a loop of your own; submit and cancel at any time
    requests[0].tokens

All recursions share one block of layers, so rows at different depths go through it together. A row whose token has had
its recursions leaves the block batch, and a waiting row takes its place at once:

    turn    last layer, head, sampling; then embedding, first layer, recursion 0 of the token drawn    `turn_width` rows
    block   one of the later recursions for each row, whichever it is                                  `width` rows

Every token runs recursion 0, so it needs no choice of rows, and a turn that ends with it saves a stage per token. Both
are static graphs over row numbers; K/V stays where it is, in one static cache, and is read by index inside the
attention kernel. A vanilla model has no later recursions: a turn is its whole step, which makes the same engine
ordinary continuous (sequence-wise) batching.

Here too, since generation of one batch (sample.py) shares them: `Graphs`, `prefill` and `draw`.

Shapes: S slots (resident requests; one more row is scratch for unused lanes), W lanes of a stage, B rows, V vocabulary.
"""

import copy
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from generate import Graphs, draw, prefill, setting_errors
from model import KVCache, MoR, Pass, State

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
    depth: list[int] = field(default_factory=list)  # recursions of every token fed: all but the last one drawn
    overflow: int = 0  # tokens that ended early for want of a cache slot
    status: str = "waiting"
    error: str | None = None


class Run(NamedTuple):
    """One stage of the engine, as it ran."""

    stage: str  # turn, block or prefill
    seconds: float
    rows: int
    recursions: list[int] | None = None  # block: rows in each recursion


class Engine:
    """slots: resident requests. width, turn_width: rows of a block and of a turn; where slots >= width + turn_width - 1
    one of the two is always full (a vanilla model only turns: slots >= turn_width).

    Memory is given out in slots, each with room for max_len tokens (slack * capacity_r of them in recursion r), so what
    was admitted always finishes: a request waits for a slot, and one longer than max_len fails when it is submitted.
    Raises ValueError as make_cache does."""

    def __init__(
        self, model: MoR, slots: int, width: int, max_len: int, dtype: torch.dtype | None = None, *,
        turn_width: int | None = None, slack: float | None = None, threshold: float = 0.5, max_depth: int | None = None,
        compile: bool = True, freeze: bool = False,
    ):  # fmt: skip
        c = model.config
        if "sequence" in c.sharing:
            raise ValueError(f"sharing={c.sharing!r} has no block that recursions share: use a cycle sharing")
        turn_width = width if turn_width is None else turn_width
        if min(slots, width, turn_width) < 1:
            raise ValueError(f"slots={slots}, width={width} and turn_width={turn_width} must be positive")
        self.model = model.eval() if dtype is None else model.eval().to(dtype)
        self.slots, self.width, self.turn_width = slots, width, turn_width
        self.cache = model.make_cache(slots + 1, max_len, slack, threshold, max_depth)
        device = model.wte.weight.device
        self.graphs = Graphs(compile, freeze, device)
        rows = {"x": (1, c.d_model), "depth": (1,)}  # the State of each row between stages
        if c.router == "expert":
            rows |= {"gate": (1,)}
        if c.router == "token":
            rows |= {"gate": (1, c.n_recursion), "choice": (1,), "entry": (1, c.d_model)}
        kind = {"depth": torch.long, "choice": torch.long}
        self.state = {k: torch.zeros(slots + 1, *v, dtype=kind.get(k), device=device) for k, v in rows.items()}
        kind = {"temperature": torch.float32, "top_p": torch.float32, "top_k": torch.long, "seed": torch.long}
        self.knobs = {k: torch.zeros(slots + 1, dtype=t, device=device) for k, t in kind.items()}
        self.waiting: deque[Request] = deque()
        self.free = deque(range(slots))
        self.owner: list[Request | None] = [None] * slots
        self.given: dict[int, int] = {}  # slot -> token to enter with, instead of one drawn
        self.leaving: deque[int] = deque()  # slots that wait for a turn
        self.inside: deque[tuple[int, int]] = deque()  # (slot, recursion) that wait for the block
        self.history: deque[Run] = deque(maxlen=10_000)  # the latest stages

    # ---- stages: static graphs over row numbers [W]

    def load(self, row: Tensor, active: Tensor) -> State:
        return State(active=active, **{k: v[row] for k, v in self.state.items()})

    def save(self, row: Tensor, s: State) -> None:
        for k, v in self.state.items():
            v[row] = getattr(s, k)

    def pass_over(self, row: Tensor, live: Tensor) -> Pass:
        cache = self.cache
        return Pass(cache.position[row][:, None], live[:, None], cache=cache, row=row, decoding=True, **cache.knobs)

    def turn(self, row: Tensor, given: Tensor, filtered: bool | None) -> Tensor:
        """Row numbers and given tokens (-1: draw one), int64 [W] -> int64 [4, W]: token, depth of the token that left,
        overflow up to it, whether the new one runs recursion 1."""
        cache, real = self.cache, row < self.slots
        p = self.pass_over(row, real & (given < 0))
        s = self.load(row, p.valid)
        logits, left, overflow = self.model.decode_leave(s, p), s.depth[:, 0], cache.overflow[row]
        knobs = {k: v[row] for k, v in self.knobs.items()}
        token = torch.where(given < 0, draw(logits, knobs, cache.position[row], filtered), given)
        p = self.pass_over(row, real & (cache.position[row] < cache.max_len))
        s = self.model.recurse(0, self.model.decode_enter(token, p), p)
        self.save(row, s)
        return torch.stack((token, left, overflow, s.active[:, 0] & (p.max_depth > 1)))

    def block(self, row: Tensor, r: Tensor) -> Tensor:
        """Recursion r > 0 of each row, int64 [W] -> bool [W]: rows that run the next one."""
        p = self.pass_over(row, row < self.slots)
        s = self.model.recurse(r, self.load(row, p.valid), p)
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
            request.status, request.error = "failed", "; ".join(errors)
        else:
            self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request now; its slot is free for the next."""
        if request.status == "waiting":
            self.waiting.remove(request)
        elif request.status == "running":
            slot = next(i for i, owner in enumerate(self.owner) if owner is request)
            self.leaving = deque(s for s in self.leaving if s != slot)
            self.inside = deque((s, r) for s, r in self.inside if s != slot)
            self.release(slot)
        else:
            return
        request.status = "cancelled"

    def release(self, slot: int) -> None:
        self.owner[slot] = None
        self.given.pop(slot, None)
        self.free.append(slot)

    def admit(self) -> None:
        """First come, first served: prefill a waiting request's prompt but its last token, which enters with a turn."""
        while self.waiting and self.free:
            request, slot = self.waiting.popleft(), self.free.popleft()
            self.owner[slot], request.status = request, "running"
            top_k = request.top_k or self.model.config.vocab_size
            knobs = dict(temperature=request.temperature, top_p=request.top_p, top_k=top_k, seed=request.seed % 2**32)
            for k, v in knobs.items():
                self.knobs[k][slot] = v
            *body, self.given[slot] = request.prompt
            self.leaving.append(slot)
            self.cache.position[slot], self.cache.fill[:, slot], self.cache.overflow[slot] = 0, 0, 0
            if body:
                start, own = time.perf_counter(), row_view(self.cache, slot)
                prefill(self.graphs, self.model, [body], own)
                request.depth += own.depth[0, : len(body)].tolist()
                self.history.append(Run("prefill", time.perf_counter() - start, 1))

    # ---- the loop

    @torch.no_grad()
    def step(self) -> bool:
        """Admits what fits and runs one stage; False when there was nothing to do. One host sync.

        The policy: a full turn first, since what leaves it is what keeps the block full; else a full block; else
        whichever is fuller. Every resident row waits for one of them, so with width + turn_width - 1 of them one is
        full; queues are first in, first out, so no row waits for long."""
        self.admit()
        turn, block = len(self.leaving) / self.turn_width, len(self.inside) / self.width
        if not turn and not block:
            return False
        if turn >= 1 or (block < 1 and turn >= block):
            self.run_turn()
        else:
            self.run_block()
        return True

    def run(self) -> None:
        """Until every request is done."""
        while self.step():
            pass

    def lanes(self, values: list[int], width: int, unused: int) -> Tensor:
        return torch.tensor(values + [unused] * (width - len(values)), device=self.cache.position.device)

    def run_turn(self) -> None:
        start = time.perf_counter()
        slots = [self.leaving.popleft() for _ in range(min(self.turn_width, len(self.leaving)))]
        given = [self.given.pop(slot, -1) for slot in slots]
        asked = [self.owner[slot] for slot in slots]
        drawn = [a for a in asked if a.temperature > 0]
        filtered = any(a.top_k or a.top_p < 1 for a in drawn) if drawn else None
        row, given_row = self.lanes(slots, self.turn_width, self.slots), self.lanes(given, self.turn_width, -1)
        result = self.graphs.run(("turn", filtered), lambda a, b: self.turn(a, b, filtered), row, given_row)
        result = result.T.tolist()  # the host sync
        self.history.append(Run("turn", time.perf_counter() - start, len(slots)))
        for i, (slot, request) in enumerate(zip(slots, asked, strict=True)):
            token, depth, overflow, more = result[i]
            if given[i] < 0 and request.status == "running":
                request.depth.append(depth)
                request.overflow = overflow
                self.take(slot, request, token)
            if request.status != "running":  # over, or cancelled by a callback
                continue
            if more:
                self.inside.append((slot, 1))
            else:
                self.leaving.append(slot)

    def take(self, slot: int, request: Request, token: int) -> None:
        """Takes in a drawn token, which may be the request's last."""
        stop = token == request.stop_token
        if not stop:
            request.tokens.append(token)
            if request.on_token is not None:
                request.on_token(request, token)
        if request.status == "running" and (stop or len(request.tokens) == request.max_new_tokens):
            request.status = "done"
            self.release(slot)

    def run_block(self) -> None:
        start = time.perf_counter()
        batch = [self.inside.popleft() for _ in range(min(self.width, len(self.inside)))]
        slots, recursions = zip(*batch, strict=True)
        row, r = self.lanes(list(slots), self.width, self.slots), self.lanes(list(recursions), self.width, 1)
        goes_on = self.graphs.run(("block",), self.block, row, r).tolist()  # the host sync
        counts = [recursions.count(i) for i in range(self.model.config.n_recursion)]
        self.history.append(Run("block", time.perf_counter() - start, len(slots), counts))
        for slot, recursion, more in zip(slots, recursions, goes_on, strict=False):
            if more:
                self.inside.append((slot, recursion + 1))
            else:
                self.leaving.append(slot)


def row_view(cache: KVCache, row: int) -> KVCache:
    """One row of a cache as a cache of its own, in the same memory."""
    own, one = copy.copy(cache), slice(row, row + 1)
    own.batch = 1
    own.k, own.v = [t[one] for t in cache.k], [t[one] for t in cache.v]
    own.position, own.fill, own.overflow = cache.position[one], cache.fill[:, one], cache.overflow[one]
    own.depth = cache.depth[one]
    return own
