"""How text comes out of a model: compiled functions, prefill in buckets, drawing a token, decoding.

Shapes: B rows, P prompt tokens with padding, V vocabulary.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch._inductor.config
from torch import Tensor

from model import KVCache, MoR, Pass, State


class Graphs(dict[tuple, Callable]):
    """Functions by key, compiled when first run and never again: a recompilation raises. On CUDA, functions from
    tensors to tensors (decoding and serving stages, not prefill) are played back as CUDA graphs. freeze: on CPUs,
    weights are packed into each graph as constants, and its kernels called from C++, which is faster and takes the
    weights' memory again. compile=False runs functions as they are."""

    def __init__(self, compile: bool, freeze: bool, device: torch.device):
        super().__init__()
        self.compile, self.freeze, self.cuda = compile, freeze and device.type == "cpu", device.type == "cuda"

    def run(self, key: tuple, function: Callable, *args):
        if not self.compile:
            return function(*args)
        if key in self:
            return self[key](*args)
        options = dict(options={"guard_filter_fn": only_arguments}, isolate_recompiles=True, recompile_limit=1)
        compiled = torch.compile(function, fullgraph=True, dynamic=False, **options)
        # not among the options above, of which Dynamo would not hear: it has to leave the weights out of the inputs
        packed = {"freezing": self.freeze, "cpp.enable_concat_linear": self.freeze, "cpp_wrapper": self.freeze}
        # every index is clamped or was checked on the host; to check again takes a seventh of attention's time
        with torch._inductor.config.patch(packed | {"assert_indirect_indexing": False}):
            result = compiled(*args)
        tensors = all(isinstance(x, Tensor) for x in (*args, *(result if isinstance(result, tuple) else (result,))))
        self[key] = played_back(compiled) if self.cuda and tensors else compiled
        return result


def played_back(compiled: Callable) -> Callable:
    """A function from tensors to tensors, compiled and run before, as a CUDA graph: recorded at its first call and
    played back from then on, so that a step costs one launch, not one per kernel. What else it reads or changes must
    stay where it is. (By hand, as mode="reduce-overhead" declines graphs that write to their inputs, such as caches,
    unless all of these are marked, and overwrites its outputs too.)"""
    graph, inputs, outputs = None, (), ()

    def play(*args: Tensor):
        nonlocal graph, inputs, outputs
        if graph is None:
            graph, inputs = torch.cuda.CUDAGraph(), [x.clone() for x in args]
            with torch.cuda.graph(graph):  # notes the kernels, and runs none
                outputs = compiled(*inputs)
        for mine, given in zip(inputs, args, strict=True):
            mine.copy_(given)
        graph.replay()
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(x.clone() for x in outputs)

    return play


def only_arguments(guards: list) -> list[bool]:
    """What may change between calls is the arguments: looking at each weight and each field of the model as well would
    take a twentieth of a stage's time. So a model must not change while it has graphs."""
    return [re.fullmatch(r"L\['\w+'\]", guard.name) is not None for guard in guards]


def bucket(n: int, limit: int) -> int:
    """The padded length for n tokens: few lengths, so few graphs, and from 16 up less than 25 % padding."""
    size = min(16, limit)
    while size < n:
        size = min(limit, size * 4 // 3 // 4 * 4)
    return size


def prefill(graphs: Graphs, model: MoR, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Prompts into the first rows of a cache, padded to a bucket -> logits [B, V] at each row's last token."""
    lengths = [len(p) for p in prompts] + [1] * (cache.batch - len(prompts))  # a row without a prompt gets some token
    idx = torch.zeros(cache.batch, bucket(max(lengths), cache.max_len), dtype=torch.long)
    for row, prompt in zip(idx, prompts, strict=False):
        row[: len(prompt)] = torch.tensor(prompt)
    args = idx.to(cache.position.device), torch.tensor(lengths, device=cache.position.device), cache
    # long prompts compute only what routing should admit, and if it admitted more, again without that
    if idx.size(1) >= 128 and model.config.router != "none":
        logits = graphs.run(("prefill", idx.size(1), True), lambda i, n, c: model.prefill(i, n, c, tight=True), *args)
        if not cache.short:
            return logits
    return graphs.run(("prefill", idx.size(1), False), lambda i, n, c: model.prefill(i, n, c), *args)


def uniform(seed: Tensor, position: Tensor, V: int) -> Tensor:
    """Noise in (0, 1), fp32 [B, V], hashed from seed [B], position [B] and token. There is no generator state, so a row
    draws the same whatever runs beside it, on any device, compiled or not."""

    def mix(x: Tensor) -> Tensor:  # 32 bits in int64, where the products cannot overflow
        x = (((x >> 16) ^ x) * 0x45D9F3B) & 0xFFFFFFFF
        x = (((x >> 15) ^ x) * 0x2C1B3C6D) & 0xFFFFFFFF
        return (x >> 16) ^ x

    # one round per row, one per token: more would cost minutes of compiling, since Inductor inlines them all
    key = mix(seed * 0x9E3779B1 + position * 0x632BE5AB & 0xFFFFFFFF)[:, None]
    x = mix((key + torch.arange(V, device=seed.device) * 0x1B873593) & 0xFFFFFFFF)
    return ((x >> 9).float() + 0.5) * 2.0**-23


def draw(logits: Tensor, knobs: dict[str, Tensor], position: Tensor, filtered: bool | None) -> Tensor:
    """Tokens [B] from logits [B, V] by each row's temperature (0: greedy), top_k and top_p, tensors [B] like the seed.

    Softmax over exponential noise, whose argmax is a sample: no multinomial, no host sync. Where top-k and top-p cut is
    found by bisecting the bits of the distance to the best logit (floats >= 0 sort like their bits): exact, keeps ties,
    and several times faster than a sort. filtered=False leaves it out, None all but the argmax."""
    if filtered is None:
        return logits.argmax(-1)
    temperature = knobs["temperature"][:, None]
    z = logits.float() / torch.where(temperature > 0, temperature, 1.0)
    gap = z.amax(-1, keepdim=True) - z
    weight = torch.exp(-gap)
    if filtered:
        bits = gap.view(torch.int32)

        def cut(weight: Tensor, target: Tensor) -> Tensor:
            """The smallest bits t [B, 1] such that the tokens with bits <= t weigh at least target [B]."""
            t = torch.zeros_like(bits[:, :1])
            for power in range(30, -1, -1):
                trial = t + (1 << power)
                t = torch.where((weight * (bits < trial)).sum(-1, keepdim=True) < target[:, None], trial, t)
            return t

        weight = weight * (bits <= cut(torch.ones_like(weight), knobs["top_k"]))
        weight = weight * (bits <= cut(weight, knobs["top_p"] * weight.sum(-1)))
    noise = -torch.log(uniform(knobs["seed"], position, z.size(1)))
    return (weight / torch.where(temperature > 0, noise, 1.0)).argmax(-1)


def setting_errors(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> list[str]:
    rules = [
        (max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1"),
        (0 <= temperature < math.inf, f"temperature={temperature} must be a number >= 0 (0: always the likeliest)"),
        (top_k is None or top_k >= 1, f"top_k={top_k} must be at least 1"),
        (0 < top_p <= 1, f"top_p={top_p} must lie in (0, 1]"),
    ]
    return [complaint for holds, complaint in rules if not holds]


class Decoder:
    """A model with a static cache for `batch` rows of up to `max_len` tokens, and the compiled functions that fill and
    read it: one prefill graph per bucket, one graph per decoding step (one per stage with early exit). Keep it between
    calls of `generate`. Raises ValueError as make_cache does."""

    def __init__(
        self, model: MoR, batch: int, max_len: int, *, threshold: float = 0.5, max_depth: int | None = None,
        slack: float | None = None, compile: bool = True, freeze: bool = False, early_exit: bool | None = None,
    ):  # fmt: skip
        self.model, self.cache = model, model.make_cache(batch, max_len, slack, threshold, max_depth)
        device, routed = model.wte.weight.device, model.config.router != "none"
        self.graphs, self.depth = Graphs(compile, freeze, device), self.cache.knobs["max_depth"]
        # Stopping when no row goes on costs a host sync per recursion: it pays where syncs are free and rows are few.
        self.early_exit = routed and (device.type == "cpu" and batch <= 4 if early_exit is None else early_exit)
        whole, real = (torch.zeros(batch, dtype=t, device=device) for t in (torch.long, torch.float32))
        self.left, self.stop = whole, whole[:1].clone()  # tokens still to draw per row; the token that ends a row
        self.ahead: Sequence = ()  # early exit: state and pass of the tokens drawn last, recursion 0 behind them
        self.knobs = dict(temperature=real, top_p=real.clone(), top_k=whole.clone(), seed=whole.clone())

    def choose(self, logits: Tensor, filtered: bool | None) -> Tensor:
        token = torch.where(self.left > 0, draw(logits, self.knobs, self.cache.position, filtered), -1)
        self.left.sub_(1)
        return token

    def step(self, token: Tensor, filtered: bool | None) -> tuple[Tensor, Tensor]:
        """Feeds a token per row [B] (-1: none) -> the next tokens [B] (-1: the row is over), depths of the fed [B]."""
        run = self.graphs.run
        if not self.early_exit:
            return run(("step", filtered), lambda t: self.leave(*self.enter(t, self.depth), filtered), token)
        s, p = self.ahead or run(("enter",), lambda t: self.enter(t, 1), token)
        for r in range(1, self.depth):
            if not s.active.any():  # the host sync
                break
            s = run(("recurse", r), lambda s, p, r=r: self.model.recurse(r, s, p), s, p)
        # the drawn token goes through recursion 0 in the same graph: a call less per token
        token, depth, *self.ahead = run(("turn", filtered), lambda s, p: self.turn(s, p, filtered), s, p)
        return token, depth

    def enter(self, token: Tensor, recursions: int) -> tuple[State, Pass]:
        p = self.model.decode_pass(torch.where(token == self.stop, -1, token), self.cache)
        s = self.model.decode_enter(token, p)
        for r in range(recursions):
            s = self.model.recurse(r, s, p)
        return s, p

    def leave(self, s: State, p: Pass, filtered: bool | None) -> tuple[Tensor, Tensor]:
        logits = self.model.decode_leave(s, p)
        return torch.where(p.valid[:, 0], self.choose(logits, filtered), -1), s.depth[:, 0]

    def turn(self, s: State, p: Pass, filtered: bool | None) -> tuple[Tensor, Tensor, State, Pass]:
        token, depth = self.leave(s, p, filtered)
        return token, depth, *self.enter(token, 1)


class Generated(NamedTuple):
    tokens: list[list[int]]  # new tokens of each row, without the stop token
    depth: list[list[int]]  # recursions of each token, prompt included
    stopped: list[bool]  # by the stop token, rather than by length
    prefill_seconds: float
    seconds: float  # of decoding
    overflow: int  # tokens that ended early for want of a cache slot


@torch.no_grad()
def generate(
    model: MoR, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0, top_k: int | None = None,
    top_p: float = 1.0, seed: int | list[int] = 0, stop_token: int | None = None, on_token: Callable | None = None,
    decoder: Decoder | None = None, **options,
) -> Generated:  # fmt: skip
    """Continues all prompts in one batch; a row ends at stop_token, after max_new_tokens, or where the context does.

    on_token(row, token, depth) hears of every token as it becomes known, first those of the prompts, and (row, None,
    None) when a row ends. Row i draws with seed + i, or seed[i]. `decoder` brings cache and graphs of earlier calls;
    else one is made with **options (threshold, max_depth, slack, compile, freeze, early_exit). Raises ValueError."""
    check_request(model, prompts, max_new_tokens, temperature, top_k, top_p)
    lengths = [len(p) for p in prompts]
    if decoder is None:
        block = model.config.block_size
        decoder = Decoder(model, len(prompts), bucket(min(block, max(lengths) + max_new_tokens), block), **options)
    cache, decoder.ahead = decoder.cache, ()
    if len(prompts) > cache.batch or max(lengths) >= cache.max_len:
        size = f"{cache.batch} rows of {cache.max_len} tokens"
        raise ValueError(f"{len(prompts)} prompts of up to {max(lengths)} tokens do not fit a decoder for {size}")
    idle = [0] * (cache.batch - len(prompts))
    room = [min(max_new_tokens, cache.max_len - n) for n in lengths]
    decoder.left.copy_(torch.tensor(room + idle))
    decoder.stop.fill_(-1 if stop_token is None else stop_token)
    settings = dict(temperature=temperature, top_p=top_p, top_k=top_k or model.config.vocab_size)
    for name, value in settings.items():
        decoder.knobs[name].fill_(value)
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else seed
    decoder.knobs["seed"].copy_(torch.tensor([s % 2**32 for s in seeds] + idle))
    filtered = None if temperature == 0 else top_k is not None or top_p < 1  # of three graphs, the least that serves

    start = time.perf_counter()
    token = decoder.choose(prefill(decoder.graphs, model, prompts, cache), filtered)
    depth = [row[:n] for row, n in zip(cache.depth.tolist(), lengths, strict=False)]
    tokens, stopped, running = [[] for _ in prompts], [False for _ in prompts], set(range(len(prompts)))
    say = on_token or (lambda row, token, depth: None)
    for row, prompt in enumerate(prompts):
        for t, d in zip(prompt, depth[row], strict=True):
            say(row, t, d)
    prefilled = time.perf_counter()

    def read(host: Tensor, event: torch.cuda.Event | None) -> None:
        """Takes in what a step was fed, and the depths that it found."""
        if event is not None:
            event.synchronize()
        for row, (t, d) in enumerate(host.T.tolist()):
            if row not in running:
                continue
            if t < 0 or t == stop_token:
                stopped[row] = t == stop_token
                running.discard(row)
                say(row, None, None)
            else:
                tokens[row].append(t)
                depth[row].append(d)
                say(row, t, d)

    behind = None
    for _ in range(max(room)):  # the last step gives nothing but the depth of the last token
        fed = token
        token, d = decoder.step(fed, filtered)
        if behind is not None:  # the host reads step i while the device computes step i + 1
            read(*behind)
        behind = to_host(torch.stack((fed, d)))
        if not running:
            break
    read(*behind)
    for row in sorted(running):
        say(row, None, None)
    seconds = time.perf_counter() - prefilled
    return Generated(tokens, depth, stopped, prefilled - start, seconds, int(cache.overflow[: len(prompts)].sum()))


def to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy of x in host memory, and the event to wait for before reading it."""
    if x.device.type != "cuda":
        return x.cpu(), None
    host, event = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    event.record()
    return host, event


def check_request(
    model: MoR, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    c, bad = model.config, [] if prompts else ["there are no prompts"]
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < c.block_size:
            bad.append(f"prompt {i} has {len(prompt)} tokens, but needs 1 to {c.block_size - 1}: the context less one")
        elif min(prompt) < 0 or max(prompt) >= c.vocab_size:
            bad.append(f"prompt {i} has token ids outside of the model's vocabulary of {c.vocab_size}")
    bad += setting_errors(max_new_tokens, temperature, top_k, top_p)
    if bad:
        raise ValueError("; ".join(bad))
