"""Continuous depth-wise batching (paper Section 3.3): serving a Mixture-of-Recursions with full batches at every depth.

    engine = Engine(model, slots=63, width=32, max_len=512)
    engine.warm_up()                 # or every stage compiles when it is first needed
    requests = [engine.submit(prompt, max_new_tokens=256) for prompt in prompts]
    engine.run()                     # or engine.step() from a loop of your own; submit and cancel at any time
    requests[0].tokens

All recursions share one block of layers, so rows at different depths go through it together. A row whose token has had
its recursions leaves the block batch, and a waiting row takes its place at once:

    prefill  prompts, but for the last token of each                                                 1 or 4 lanes
    turn     last layer, head, sampling; then embedding, first layer, recursion 0 of the new token   `turn_width` lanes
    block    one of the later recursions for each row, whichever it is                               `width` lanes

Every token runs recursion 0, so it needs no choice of rows, and a turn that ends with it saves a stage per token. All
are static graphs over row numbers; K/V stays where it is, in one static cache, and is read by index inside the
attention kernel. A vanilla model has no later recursions: a turn is its whole step, which makes the same engine
ordinary continuous (sequence-wise) batching.

A request is resident in a seat, which is a row of the cache; one more row is scratch for lanes without a request. It is
in one place at a time: it waits for a stage (waiting, leaving, inside), or it is in one whose result was not read yet
(flight). On CUDA the host launches a stage before it reads the one before, so that neither waits for the other.
Compiled functions and sampling are those of generate.py, the parts of a token's way those of `MoR.decode`.

Shapes: W lanes of a stage, R prompts at once, P tokens of a prompt with padding, B rows, V vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from cache import KVCache
from generate import Graphs, copy_to_host, prepare_weights, sample_token, setting_errors
from model import OF_ONE_STAGE, MoR, State

PROMPTS_AT_ONCE = 4  # short prompts that share a prefill: more would seldom come together, and each takes a cache row

# ----------------------------------------------------------------------------------------------------------------------
# serving


@dataclass(eq=False)  # two requests for the same are two requests
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
    # the engine's own notes
    seat: int = field(default=-1, repr=False)
    given: int = field(default=-1, repr=False)  # token to enter with next, instead of a sampled one
    recursion: int = field(default=0, repr=False)  # the one that it waits for, inside the block


class Stage(NamedTuple):
    """One stage of the engine, as it ran."""

    stage: str  # prefill, turn or block
    seconds: float
    rows: int  # lanes that had a request
    recursions: list[int] | None = None  # block: rows in each recursion


class Launched(NamedTuple):
    """A stage whose result was not read yet."""

    stage: str
    requests: list[Request]  # one a lane
    start: float
    result: Tensor  # in host memory, once the event has come
    event: torch.cuda.Event | None
    take: Callable[[list], None]  # what to do with the result


class Engine:
    """Serves requests in `slots` seats, by turns of turn_width lanes and blocks of width lanes.

    Where slots >= width + turn_width - 1 one of the two is always full (a vanilla model only turns: slots >=
    turn_width). On CUDA it takes as many seats more as one stage has lanes. A seat has room for max_len tokens (slack *
    capacity_r of them in recursion r), so what was admitted always finishes: a request waits for a seat, and one longer
    than max_len fails when it is submitted.

    prefill_tokens bounds how long tokens wait for the prompts of others: a step computes on average no more tokens of
    prompts, padding included. Raises ValueError as make_cache does."""

    @torch.no_grad()
    def __init__(
        self,
        model: MoR,
        slots: int,
        width: int,
        max_len: int,
        *,
        turn_width: int | None = None,
        prefill_tokens: int = 512,
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
        if min(slots, width, turn_width, prefill_tokens) < 1:
            raise ValueError(f"{slots=}, {width=}, {turn_width=} and {prefill_tokens=} must be positive")
        model = self.model = prepare_weights(model.eval(), quantize)
        self.vocab_size = vocab_size
        self.slots, self.width, self.turn_width = slots, width, turn_width
        self.cache = model.make_cache(slots + 1, max_len, slack, threshold, max_depth)
        assert_windows_lie_inside(self.cache)
        self.device = model.wte.weight.device
        self.graphs = Graphs(compile, freeze, self.device)

        # prompts are prefilled elsewhere, in one of few shapes, and copied to their seats
        batches = (1, PROMPTS_AT_ONCE) if slots >= PROMPTS_AT_ONCE else (1,)
        self.staging = {R: model.make_cache(R, max_len, slack, threshold, max_depth) for R in batches}
        self.lengths = list_lengths(max_len)
        self.prefill_tokens = prefill_tokens
        self.allowance = 0  # tokens of prompts that may be launched now; below 0 after a long one

        # per row: what is kept of its State between stages, and how it samples
        self.state = self.blank_state()
        real = torch.zeros(slots + 1, device=self.device)
        whole = torch.zeros(slots + 1, dtype=torch.long, device=self.device)
        self.knobs = dict(temperature=real, top_p=real.clone(), top_k=whole, seed=whole.clone())

        self.free = deque(range(slots))  # seats
        self.waiting: deque[Request] = deque()  # for a seat
        self.leaving: deque[Request] = deque()  # for a turn
        self.inside: deque[Request] = deque()  # for the block
        self.flight: deque[Launched] = deque()
        self.ahead = 1 if self.device.type == "cuda" else 0  # stages that may be in flight while the host goes on
        self.last_read = 0.0
        self.history: deque[Stage] = deque(maxlen=10_000)  # the latest stages

    # ---- stages: static graphs over row numbers

    def blank_state(self) -> dict[str, Tensor]:
        """Returns what each row keeps of its State between stages, zeros [slots + 1, 1, ...]: all that a token has
        after its first decision, but for the fields of one stage alone."""
        row = torch.tensor([self.slots], device=self.device)  # the scratch row
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

    def prefill(self, prompts: Tensor) -> Tensor:
        """Takes int64 [R, 2 + P]: row, length, tokens -> int64 [R, 1 + P]: whether all is void for want of slots, which
        a longer P has; recursions of each token."""
        row, lengths, idx = prompts[:, 0], prompts[:, 1], prompts[:, 2:]
        staging, P = self.staging[len(prompts)], idx.size(1)
        self.model.prefill(idx, lengths, staging, self.is_tight(P))
        self.copy_prompts(staging, row, P)
        return torch.cat((staging.short.expand(len(prompts), 1), staging.depth[:, :P]), dim=1)

    def copy_prompts(self, staging: KVCache, row: Tensor, P: int) -> None:
        """Copies what the rows of a staging cache hold, prompts of up to P tokens, to rows [R] of the cache."""
        cache, at_every_token = self.cache, [(0, self.cache.max_len)]
        outer = (0, len(cache.k) - 1) if self.model.config.n_unshared else ()
        for layer in range(len(cache.k)):
            windows = at_every_token if layer in outer else zip(cache.start, cache.slots, strict=True)
            for start, slots in windows:  # by index: a slice is written by a copy of it for every row of the cache
                at = torch.arange(start, start + min(P, slots), device=row.device)
                cache.k[layer][row[:, None], at] = staging.k[layer][:, at]
                cache.v[layer][row[:, None], at] = staging.v[layer][:, at]
        cache.position[row] = staging.position
        cache.fill[:, row] = staging.fill
        cache.overflow[row] = staging.overflow

    def turn(self, row: Tensor, given: Tensor, filtered: bool | None) -> Tensor:
        """Takes row numbers and given tokens (-1: sample one), int64 [W] -> int64 [W, 4]: token, depth of the token
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
        return torch.stack((token, left, overflow, s.active[:, 0]), dim=1)

    def block(self, row: Tensor, r: Tensor) -> Tensor:
        """Runs recursion r > 0 of each row, int64 [W] -> bool [W]: rows that run the next one."""
        model, r = self.model, r[:, None]
        p = model.decode_pass(torch.where(row < self.slots, 0, -1), self.cache.rows(row))
        s = self.load(row, p.valid)
        s = model.recurse(r, s, p)
        s = model.go_on(r, s, p)
        self.save(row, s)
        return s.active[:, 0]

    @torch.no_grad()
    def warm_up(self, longest_prompt: int | None = None, filtered: Sequence[bool | None] = (None, False, True)) -> None:
        """Compiles every stage, so that none is in mid-service. longest_prompt: tokens (None: what fits max_len).
        filtered: for greedy requests (None), drawn ones (False), and those with top-k or top-p (True)."""
        body = (longest_prompt or self.cache.max_len) - 1
        last = self.find_length(body, roomy=self.is_tight(self.find_length(body)))
        for _ in range(2):  # on CUDA the second call records
            for kind in filtered:
                self.launch_turn([], kind)
            if self.model.config.router != "none":
                self.launch_block([])
            for P in self.lengths[: self.lengths.index(last) + 1]:
                self.launch_prefill([], P, 1)
                if self.fits_many(P):
                    self.launch_prefill([], P, PROMPTS_AT_ONCE)
        while self.flight:
            self.read()
        self.history.clear()
        self.allowance = 0

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
        """Ends a request now; its seat is free for the next. What is in flight for it still runs, before anything of
        the next, and is then forgotten."""
        if request.status not in ("waiting", "running"):
            return
        for queue in (self.waiting, self.leaving, self.inside):
            if request in queue:
                queue.remove(request)
        if request.status == "running":
            self.free.append(request.seat)
        request.status = "cancelled"

    # ---- prompts

    def is_tight(self, P: int) -> bool:
        """Returns whether a prefill of P tokens computes only what routing should admit of so many."""
        return self.model.config.router != "none" and 128 <= P < self.cache.max_len

    def fits_many(self, P: int) -> bool:
        """Returns whether several prompts of P tokens are prefilled at once."""
        return len(self.staging) > 1 and PROMPTS_AT_ONCE * P <= self.prefill_tokens

    def find_length(self, tokens: int, roomy: bool = False) -> int:
        """Returns the padded length for a prompt; roomy: one with slots for all of its tokens in every recursion."""
        c = self.model.config
        for P in self.lengths:
            room = min(c.slots(r, P, self.cache.slack) for r in range(c.n_recursion)) if roomy else P
            if room >= tokens:
                return P
        return self.cache.max_len  # where a prompt finds all the slots that the cache has

    def admit(self) -> None:
        """Seats waiting requests, first come, first served. Their prompts are prefilled but for the last token, which
        enters with a turn."""
        while self.waiting and self.free and self.allowance > 0:
            batch = self.choose_prompts()
            for request in batch:
                self.waiting.remove(request)
                self.take_seat(request)
            R = 1 if len(batch) == 1 else PROMPTS_AT_ONCE
            if body := len(batch[0].prompt) - 1:
                self.launch_prefill(batch, self.find_length(body), R)
            else:
                self.leaving += batch

    def choose_prompts(self) -> list[Request]:
        """Returns the first request, and others of those that have a seat whose prompts are of like length."""
        first = self.waiting[0]
        body = len(first.prompt) - 1
        P = self.find_length(body)
        if not body or not self.fits_many(P):
            return [first]
        seated = [r for r in islice(self.waiting, len(self.free)) if len(r.prompt) > 1]
        alike = [r for r in seated if self.find_length(len(r.prompt) - 1) == P]
        # lanes without a prompt take as long as those with one
        return alike[:PROMPTS_AT_ONCE] if len(alike) >= PROMPTS_AT_ONCE / 2 else [first]

    def take_seat(self, request: Request) -> None:
        """Gives a request a row of the cache, and sets up what is kept by row."""
        V = self.model.config.vocab_size
        request.status = "running"
        request.seat = seat = self.free.popleft()
        request.given = request.prompt[-1]
        self.knobs["temperature"][seat] = min(request.temperature, 1e30)  # what fp32 holds
        self.knobs["top_p"][seat] = request.top_p
        self.knobs["top_k"][seat] = min(request.top_k or V, V)
        self.knobs["seed"][seat] = request.seed % 2**32
        self.cache.position[seat] = 0
        self.cache.fill[:, seat] = 0
        self.cache.overflow[seat] = 0

    def launch_prefill(self, requests: list[Request], P: int, R: int) -> None:
        """Launches the prefill of up to R prompts, padded to P tokens."""
        start = time.perf_counter()
        self.allowance -= R * P
        prompts = [[r.seat, len(r.prompt) - 1, *r.prompt[:-1]] for r in requests]
        prompts += [[self.slots, 1]] * (R - len(requests))
        lanes = self.upload([prompt + [0] * (2 + P - len(prompt)) for prompt in prompts])
        result = self.graphs.run(("prefill", R, P), self.prefill, lanes)
        self.launch("prefill", requests, start, result, lambda result: self.take_prefill(requests, result))

    def take_prefill(self, requests: list[Request], result: list[list[int]]) -> None:
        """Takes in the depths of prompts, or runs them again, one by one and with room for all."""
        for request, (void, *depth) in zip(requests, result, strict=False):
            body = len(request.prompt) - 1
            if request.status != "running":
                continue
            if void:
                self.launch_prefill([request], self.find_length(body, roomy=True), 1)
            else:
                request.depth += depth[:body]
                self.queue(request, more=False)

    # ---- the loop

    @torch.no_grad()
    def step(self) -> bool:
        """Admits what fits and launches a stage, or else reads one; returns whether anything is left to do.

        The policy: a full turn first, since what leaves it is what keeps the block full; else a full block; else
        whichever is fuller, once no stage is in flight from which it could be filled. Every resident row waits for one
        of them, so with width + turn_width - 1 of them one is full; queues are first in, first out, so no row waits for
        long."""
        self.allowance = min(self.allowance, 0) + self.prefill_tokens
        self.admit()
        turn = len(self.leaving) / self.turn_width
        block = len(self.inside) / self.width
        if self.flight and turn < 1 and block < 1:
            self.read()
        elif turn >= 1 or (turn and block < 1 and turn >= block):
            self.launch_turn([self.leaving.popleft() for _ in range(min(self.turn_width, len(self.leaving)))])
        elif block:
            self.launch_block([self.inside.popleft() for _ in range(min(self.width, len(self.inside)))])
        return bool(self.waiting or self.leaving or self.inside or self.flight)

    def run(self) -> None:
        """Runs until every request is done."""
        while self.step():
            pass

    def upload(self, lanes: list[list[int]]) -> Tensor:
        """Returns numbers as an int64 tensor on the device, which nobody waits for."""
        host = torch.tensor(lanes, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def launch(self, stage: str, requests: list[Request], start: float, result: Tensor, take: Callable) -> None:
        """Notes a stage that the device was given, and reads those for which it is time."""
        self.flight.append(Launched(stage, requests, start, *copy_to_host(result), take))
        while len(self.flight) > self.ahead:
            self.read()

    def read(self) -> None:
        """Takes in the result of the stage that was launched first: the only place that waits for the device."""
        launched = self.flight.popleft()
        if launched.event is not None:
            launched.event.synchronize()
        result = launched.result.tolist()
        now = time.perf_counter()
        counts = None
        if launched.stage == "block":
            recursions = [request.recursion for request in launched.requests]
            counts = [recursions.count(r) for r in range(self.model.config.n_recursion)]
        seconds = now - max(launched.start, self.last_read)
        self.history.append(Stage(launched.stage, seconds, len(launched.requests), counts))
        self.last_read = now
        launched.take(result)

    def launch_turn(self, requests: list[Request], filtered: bool | None = None) -> None:
        """Launches a turn by the least of three graphs that serves all of the requests."""
        start = time.perf_counter()
        rows = [request.seat for request in requests]
        given = [request.given for request in requests]
        for request in requests:
            request.given = -1
            if request.temperature > 0:
                filtered = bool(filtered or request.top_k or request.top_p < 1)
        unused = self.turn_width - len(requests)
        row, enters = self.upload([rows + [self.slots] * unused, given + [-1] * unused])
        result = self.graphs.run(("turn", filtered), lambda a, b: self.turn(a, b, filtered), row, enters)
        self.launch("turn", requests, start, result, lambda result: self.take_turn(requests, given, result))

    def take_turn(self, requests: list[Request], given: list[int], result: list[list[int]]) -> None:
        """Takes in what a turn sampled. If somebody's on_token raises, that request fails, all others go on, and then
        the first error is raised."""
        errors = []
        for request, entered, (token, depth, overflow, more) in zip(requests, given, result, strict=False):
            if entered < 0 and request.status == "running":
                request.depth.append(depth)
                request.overflow = overflow
                try:
                    self.take_token(request, token)
                except BaseException as e:
                    errors.append(e)
                    self.cancel(request)
                    request.status = "failed"
                    request.error = f"on_token: {e!r}"
            request.recursion = 0
            self.queue(request, more)
        if errors:
            raise errors[0]

    def queue(self, request: Request, more: bool) -> None:
        """Lets a request wait for the block if it runs one recursion more, else for a turn, unless it is over."""
        if request.status != "running":
            return
        if more:
            request.recursion += 1
            self.inside.append(request)
        else:
            self.leaving.append(request)

    def take_token(self, request: Request, token: int) -> None:
        """Takes in a sampled token, which may be the request's last."""
        stop = token == request.stop_token
        if not stop:
            request.tokens.append(token)
            if request.on_token is not None:
                request.on_token(request, token)
        full = len(request.tokens) == request.max_new_tokens
        if request.status == "running" and (stop or full):
            request.status = "done"
            self.free.append(request.seat)

    def launch_block(self, requests: list[Request]) -> None:
        """Launches the recursion that each request waits for."""
        start = time.perf_counter()
        rows = [request.seat for request in requests]
        recursions = [request.recursion for request in requests]
        unused = self.width - len(requests)
        # of the scratch row: any recursion but 0, see assert_windows_lie_inside
        row, r = self.upload([rows + [self.slots] * unused, recursions + [1] * unused])
        result = self.graphs.run(("block",), self.block, row, r)
        self.launch("block", requests, start, result, lambda result: self.take_block(requests, result))

    def take_block(self, requests: list[Request], result: list[bool]) -> None:
        for request, more in zip(requests, result, strict=False):
            self.queue(request, more)


def list_lengths(max_len: int) -> list[int]:
    """Returns the lengths that prompts are padded to: 64, 128, 192, 256, 384, 512, 768, 1024 and so on, up to max_len.
    Few, so few graphs, and from 64 up a seventh of what is computed is padding."""
    lengths = [64]
    while lengths[-1] < max_len:
        half = 1 << lengths[-1].bit_length() - 2  # of the power of two below
        lengths.append(lengths[-1] + max(64, half))
    return [*lengths[:-1], max_len]


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
