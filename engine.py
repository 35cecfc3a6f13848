"""
Continuous depth-wise batching (paper Section 3.3): serving a Mixture-of-Recursions with full batches at every depth.

    engine = Engine(model, slots=63, width=32, max_len=512)
    requests = [engine.submit(prompt, max_new_tokens=256) for prompt in prompts]
    engine.run()                     # or engine.step() from a loop of your own; submit and cancel at any time
    requests[0].tokens

All recursions share one block of layers, so rows at different depths go through it together. A row whose token has had
its recursions leaves the block batch, and a waiting row takes its place at once:

    turn    last layer, head, sampling, then embedding and first layer of the token drawn       `turn_width` rows
    block   one recursion for each row, whatever its depth                                      `width` rows

Both are static graphs over row numbers; K/V stays where it is, in one static cache, and is read by index inside the
attention kernel. With a vanilla model the same engine is ordinary continuous (sequence-wise) batching: one recursion.

Shapes: S slots (resident requests; one more row is scratch for unused lanes), W lanes of a stage, D width.
"""

import copy
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import KVCache, MoR, Pass, State
from sample import bucket, draw


@dataclass
class Request:
    """What was asked for, and what came of it. status: waiting, running, done, cancelled or failed (see `error`)."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    seed: int = 0
    stop_token: int = -1
    on_token: Callable[["Request", int], None] | None = None
    tokens: list[int] = field(default_factory=list)  # new tokens, without the stop token
    depth: list[int] = field(default_factory=list)  # recursions of every token fed: all but the last one drawn
    status: str = "waiting"
    error: str | None = None


class Engine:
    """slots: resident requests. width, turn_width: rows per block and per turn batch; slots >= width + turn_width - 1
    always has a full batch for one of them. A slot reserves K/V for max_len tokens (recursion r: slack * capacity_r of
    it), so a request waits until a slot is free, and one longer than max_len fails. Raises ValueError as make_cache."""

    def __init__(
        self, model: MoR, slots: int, width: int, max_len: int, dtype: torch.dtype | None = None, *,
        turn_width: int | None = None, slack: float | None = None, threshold: float = 0.5, max_depth: int | None = None,
        compile: bool = True, freeze: bool = False,
    ):  # fmt: skip
        if "sequence" in model.config.sharing:
            raise ValueError(
                f"sharing={model.config.sharing!r} has no block that recursions share: use a cycle sharing"
            )
        if min(slots, width, turn_width or width) < 1:
            raise ValueError(f"slots={slots}, width={width} and turn_width={turn_width} must be positive")
        self.model = model.eval() if dtype is None else model.eval().to(dtype)
        self.slots, self.width, self.turn_width = slots, width, turn_width or width
        self.cache = model.make_cache(slots + 1, max_len, slack, threshold, max_depth)
        c, device = model.config, model.wte.weight.device
        rows = {"x": (1, c.d_model), "depth": (1,)}  # the State of each row between stages
        if c.router == "expert":
            rows |= {"gate": (1,)}
        if c.router == "token":
            rows |= {"gate": (1, c.n_recursion), "choice": (1,), "entry": (1, c.d_model)}
        kind = {"depth": torch.long, "choice": torch.long}
        self.state = {k: torch.zeros(slots + 1, *v, dtype=kind.get(k), device=device) for k, v in rows.items()}
        kind = {"temperature": torch.float32, "top_p": torch.float32, "top_k": torch.long, "seed": torch.long}
        self.knobs = {k: torch.zeros(slots + 1, dtype=t, device=device) for k, t in kind.items()}
        self.compile, self.options, self.graphs = compile, {"freezing": True} if freeze else {}, {}
        self.waiting: deque[Request] = deque()
        self.free = deque(range(slots))
        self.owner: list[Request | None] = [None] * slots
        self.given: dict[int, int] = {}  # slot -> token to enter with, instead of one drawn
        self.leaving: deque[int] = deque()  # slots that wait for a turn
        self.inside: deque[tuple[int, int]] = deque()  # (slot, recursion) that wait for the block
        self.history: list[tuple] = []  # per stage run: (seconds, stage, rows used, rows per recursion)

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
        """Row numbers and given tokens (-1: draw one), int64 [W] -> int64 [3, W]: token, depth of the token that left,
        whether the new one runs recursion 0."""
        real = row < self.slots
        p = self.pass_over(row, real & (given < 0))
        s = self.load(row, p.valid)
        logits, left = self.model.decode_leave(s, p), s.depth[:, 0]
        knobs = {k: v[row] for k, v in self.knobs.items()}
        token = torch.where(given < 0, draw(logits, knobs, self.cache.position[row], filtered), given)
        s = self.model.decode_enter(token, self.pass_over(row, real & (self.cache.position[row] < self.cache.max_len)))
        self.save(row, s)
        return torch.stack((token, left, s.active[:, 0].long()))

    def block(self, row: Tensor, r: Tensor) -> Tensor:
        """Recursion r of each row, int64 [W] -> bool [W]: rows that run the next one."""
        p = self.pass_over(row, row < self.slots)
        s = self.model.recurse(r, self.load(row, p.valid), p)
        self.save(row, s)
        return s.active[:, 0]

    def launch(self, name: tuple, function: Callable, *args: Tensor) -> Tensor:
        if not self.compile:
            return function(*args)
        if name not in self.graphs:
            once = dict(fullgraph=True, dynamic=False, isolate_recompiles=True, recompile_limit=1)
            self.graphs[name] = torch.compile(function, options=self.options, **once)
        return self.graphs[name](*args)

    # ---- requests

    def submit(self, prompt: list[int], max_new_tokens: int, **sampling) -> Request:
        """Queues a request; sampling: temperature, top_k, top_p, seed, stop_token, on_token. One that can never run is
        returned as failed, and disturbs no other."""
        request = Request(list(prompt), max_new_tokens, **sampling)
        V, room = self.model.config.vocab_size, self.cache.max_len
        problems = [
            (not prompt, "the prompt is empty: begin with the end-of-text token"),
            (any(not 0 <= t < V for t in prompt), f"the prompt has token ids outside of the vocabulary of {V}"),
            (max_new_tokens < 1, f"max_new_tokens={max_new_tokens} must be positive"),
            (len(prompt) + max_new_tokens > room,
             f"{len(prompt)} prompt tokens and {max_new_tokens} new ones never fit max_len={room}"),
            (not 0 <= request.temperature < float("inf"), f"temperature={request.temperature} must be >= 0"),
            (request.top_k < 0 or not 0 < request.top_p <= 1, "top_k must be >= 0 and top_p in (0, 1]"),
        ]  # fmt: skip
        request.error = next((text for wrong, text in problems if wrong), None)
        if request.error:
            request.status = "failed"
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
            for k, v in self.knobs.items():
                v[slot] = top_k if k == "top_k" else getattr(request, k)
            start, own = time.perf_counter(), row_view(self.cache, slot)
            *body, last = request.prompt
            for t in (own.position, own.fill, own.overflow):
                t.zero_()
            if body:
                idx = torch.zeros(1, bucket(len(body), self.cache.max_len), dtype=torch.long)
                idx[0, : len(body)] = torch.tensor(body)
                args = idx.to(own.position.device), torch.tensor([len(body)], device=own.position.device)
                self.launch(("prefill", idx.size(1)), lambda i, n, own: self.model.prefill(i, n, own), *args, own)
                request.depth += own.depth[0, : len(body)].tolist()
                self.history.append((time.perf_counter() - start, "prefill", 1, None))
            self.given[slot] = last
            self.leaving.append(slot)

    # ---- the loop

    @torch.no_grad()
    def step(self) -> bool:
        """Admits what fits and runs one stage; False when there was nothing to do. One host sync.

        The policy: a full turn batch first, since what leaves it is what keeps the block batch full; else a full block
        batch; else whichever is fuller. With width + turn_width - 1 resident requests one of them always is full."""
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
        result = self.launch(("turn", filtered), lambda a, b: self.turn(a, b, filtered), row, given_row)
        tokens, depths, active = result.tolist()  # the host sync
        self.history.append((time.perf_counter() - start, "turn", len(slots), None))
        for i, (slot, request) in enumerate(zip(slots, asked, strict=True)):
            if given[i] < 0:
                request.depth.append(depths[i])
                if self.finish(slot, request, tokens[i]):
                    continue
            if active[i]:
                self.inside.append((slot, 0))
            else:  # a first recursion of limited capacity, not taken
                self.leaving.append(slot)

    def finish(self, slot: int, request: Request, token: int) -> bool:
        """Takes in a drawn token; True when the request is over (also when a callback cancelled it)."""
        if token != request.stop_token:
            request.tokens.append(token)
            if request.on_token is not None:
                request.on_token(request, token)
        if request.status == "running" and (
            token == request.stop_token or len(request.tokens) == request.max_new_tokens
        ):
            request.status = "done"
            self.release(slot)
        return request.status != "running"

    def run_block(self) -> None:
        start = time.perf_counter()
        batch = [self.inside.popleft() for _ in range(min(self.width, len(self.inside)))]
        slots, recursions = zip(*batch, strict=True)
        row, r = self.lanes(list(slots), self.width, self.slots), self.lanes(list(recursions), self.width, 0)
        goes_on = self.launch(("block",), self.block, row, r).tolist()  # the host sync
        counts = [recursions.count(i) for i in range(self.model.config.n_recursion)]
        self.history.append((time.perf_counter() - start, "block", len(slots), counts))
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
