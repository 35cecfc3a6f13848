"""How text comes out of a model: compiled functions, prefill in buckets, sampling a token, decoding.

    out = generate(model, [[1, 2, 3], [4]], max_new_tokens=50, temperature=0.8)
    out.tokens

`generate` fills a static cache with the prompts (`prefill`) and then calls `Decoder.step` once per token. With early
exit, which pays where rows are few, a step stops recursing as soon as no row goes on; otherwise it is one graph, which
computes every recursion and masks. engine.py serves many requests at once with the same parts.

Shapes: B rows, P prompt tokens with padding, V vocabulary.
"""

import copy
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch._inductor.config
from torch import Tensor
from torch.utils._pytree import register_dataclass, tree_flatten, tree_leaves, tree_unflatten

from cache import KVCache
from model import Layer, MoR, Pass, State
from ops import Matrix, join, scramble

# ----------------------------------------------------------------------------------------------------------------------
# compiled functions

register_dataclass(Pass)  # so that what it holds is found, as in a State


class Graphs(dict[tuple, Callable]):
    """Functions by key, compiled when first run and never again: a recompilation raises.

    On CUDA a function is recorded when it runs for the second time, compiled or not, and played back from then on: a
    call costs one launch, not one per kernel. freeze: on CPUs, weights are packed into each graph as constants, and its
    kernels called from C++, which is faster and takes the weights' memory again. compile=False runs functions as they
    are."""

    def __init__(self, compile: bool, freeze: bool, device: torch.device):
        super().__init__()
        self.compile = compile
        self.freeze = freeze and device.type == "cpu"
        self.cuda = device.type == "cuda"
        self.handed: dict[tuple, list[Tensor]] = {}  # memory of what recorded stages hand to one another
        self.place: dict[str, Any] = {}  # where functions are recorded: a stream and memory for all of them

    def run(self, key: tuple, function: Callable, *args):
        """Returns function(*args), compiled under this key."""
        if key in self:
            return self[key](*args)
        if not self.compile:
            result = function(*args)
        else:
            function, result = self.compile_and_run(function, *args)
        if self.cuda:
            result = each(copy_tensor, result)  # a tensor may be a view of a State, which is overwritten now
            self[key] = self.record(function, args, result)
        elif self.compile:
            self[key] = function
        return result

    def compile_and_run(self, function: Callable, *args) -> tuple[Callable, Any]:
        """Returns the compiled function, and function(*args)."""
        compiled = torch.compile(
            function,
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": only_arguments},
            isolate_recompiles=True,
            recompile_limit=1,
        )
        # not among the options above, of which Dynamo would not hear: it has to leave the weights out of the inputs
        settings = {"freezing": self.freeze, "cpp.enable_concat_linear": self.freeze, "cpp_wrapper": self.freeze}
        # every index is clamped or was checked on the host; to check again takes a seventh of attention's time
        settings["assert_indirect_indexing"] = False
        # a product and its sum as one instruction: int8 decoding takes 5 % less
        settings["cpp.enable_floating_point_contract_flag"] = "fast"
        # on CUDA, the many sums that top-k and top-p take over a row are then one kernel, not two for each
        settings["split_reductions"] = False
        with torch._inductor.config.patch(settings):
            return compiled, compiled(*args)

    def record(self, function: Callable, args: tuple, result: Any) -> Callable:
        """Returns a function that was run before, with these args and this result, as a CUDA graph.

        It is recorded at its first call. Tensors are copied into the memory that the graph reads, and out of what it
        writes. But State and Pass stay there: the next stage reads them where they lie, and they are good until then. A
        cache stays where it is, and with another one the function runs as it is. What else the function reads or
        changes must not move. (By hand, as mode="reduce-overhead" declines graphs that write to their inputs, such as
        caches, unless all of these are marked, and overwrites its outputs too.)"""
        graph, outputs = None, None
        inputs = tuple(self.keep(x) for x in args)
        mine = tree_leaves(inputs)
        each(self.keep_structure, result)  # memory made while a graph is recorded would be the graph's own

        def play(*args):
            nonlocal graph, outputs
            given = tree_leaves(args)
            if any(a != b for a, b in zip(mine, given, strict=True) if not isinstance(a, Tensor)):
                return function(*args)
            if graph is None:
                graph, outputs = self.capture(function, inputs)
            copy_tensors(mine, given)
            graph.replay()
            return each(copy_tensor, outputs)

        return play

    def capture(self, function: Callable, inputs: tuple) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Returns a graph of function(*inputs), and the results that it will write. The kernels are noted, not run."""
        device = next(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            if not self.place:  # results are copied before another graph runs, so that all can share their memory
                self.place = dict(stream=torch.cuda.Stream(device), pool=torch.cuda.graph_pool_handle())
            # thread_local: what other threads of the program ask of CUDA meanwhile is no error
            with torch.cuda.graph(graph, capture_error_mode="thread_local", **self.place):
                results = function(*inputs)
                results = each(copy_tensor, results)  # before a State is overwritten here too
                return graph, each(self.keep_structure, results)

    def keep_structure(self, x: Any) -> Any:
        """Returns x, a State or a Pass in the memory of all graphs."""
        return x if isinstance(x, Tensor) else self.keep(x)

    def keep(self, x: Any) -> Any:
        """Returns a copy of x, in memory that stays: of a State or a Pass the same for all graphs."""
        if isinstance(x, Tensor):
            return x.clone()
        leaves, structure = tree_flatten(x)
        key = type(x), *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves)
        if key not in self.handed:
            self.handed[key] = [copy_tensor(leaf) for leaf in leaves]
        kept = self.handed[key]
        copy_tensors(kept, leaves)
        mine = [a if isinstance(a, Tensor) else b for a, b in zip(kept, leaves, strict=True)]
        return tree_unflatten(mine, structure)


def each(function: Callable, results: Any) -> Any:
    """Returns function(x) of each of several results, or of the only one. (A State is one, although it is a tuple.)"""
    return tuple(function(x) for x in results) if type(results) is tuple else function(results)


def copy_tensor(x: Any) -> Any:
    """Returns a copy of a tensor; anything else as it is."""
    return x.clone() if isinstance(x, Tensor) else x


def copy_tensors(to: list, given: list) -> None:
    """Copies tensors to memory where they are not yet; other things in the lists are left."""
    for mine, theirs in zip(to, given, strict=True):
        if isinstance(mine, Tensor) and mine.data_ptr() != theirs.data_ptr():
            mine.copy_(theirs)


def only_arguments(guards: list) -> list[bool]:
    """Returns which guards to keep: those on the arguments. Checking every weight and every field of the model on each
    call costs 5 % of a stage, so do not change a model that has graphs."""
    return [re.fullmatch(r"L\['\w+'\]", guard.name) is not None for guard in guards]


def prepare_weights(model: MoR, quantize: str | None = None) -> MoR:
    """Returns the model with the matrices joined that read the same: itself, or with quantize="int8" a copy, whose
    matrices and head are int8. What is trained or loaded later changes the model, not the copy. Raises ValueError."""
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} must be 'int8' or None")
    head = model.head_weight
    if quantize and head.dtype != torch.int8:
        kept = {id(m.weight): m.weight for m in model.modules() if isinstance(m, Matrix)}
        model = copy.deepcopy(model, kept)  # of the matrices, which are replaced, nothing is copied
        model.lm_head = Matrix(*head.mT.shape)
        model.lm_head.weight = head
        for module in model.modules():
            if isinstance(module, Matrix):
                module.quantize()
    for module in model.modules():
        if isinstance(module, Layer):
            join(module.wq, module.wk, module.wv)
            join(module.w_gate, module.w_up)
    return model


def bucket(n: int, limit: int) -> int:
    """Returns the padded length for n tokens: few lengths, so few graphs, and from 16 up less than 25 % padding."""
    size = min(16, limit)
    while size < n:
        size = min(limit, size * 4 // 3 // 4 * 4)
    return size


def prefill(graphs: Graphs, model: MoR, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Fills the first rows of a cache with prompts, padded to a bucket -> logits [B, V] at each row's last token."""
    lengths = [len(p) for p in prompts]
    lengths += [1] * (cache.batch - len(prompts))  # a row without a prompt gets some token
    P = bucket(max(lengths), cache.max_len)
    idx = torch.zeros(cache.batch, P, dtype=torch.long)
    for row, prompt in zip(idx, prompts, strict=False):
        row[: len(prompt)] = torch.tensor(prompt)
    device = cache.position.device
    args = idx.to(device), torch.tensor(lengths, device=device), cache

    # long prompts compute only what routing should admit, and if it admitted more, again without that
    if P >= 128 and model.config.router != "none":
        logits = graphs.run(("prefill", P, True), lambda i, n, c: model.prefill(i, n, c, tight=True), *args)
        if not cache.short:
            return logits
    return graphs.run(("prefill", P, False), lambda i, n, c: model.prefill(i, n, c), *args)


# ----------------------------------------------------------------------------------------------------------------------
# sampling a token


def uniform(seed: Tensor, position: Tensor, V: int) -> Tensor:
    """Returns noise in (0, 1), fp32 [B, V], hashed from seed [B], position [B] and token. There is no generator state,
    so a row samples the same whatever runs beside it, on any device, compiled or not."""
    # one round per row, one per token: more would cost minutes of compiling, since Inductor inlines them all
    key = scramble(seed * 0x9E3779B1 + position * 0x632BE5AB & 0xFFFFFFFF)[:, None]
    x = scramble((key + torch.arange(V, device=seed.device) * 0x1B873593) & 0xFFFFFFFF)
    return ((x >> 9).float() + 0.5) * 2.0**-23


def sample_token(logits: Tensor, knobs: dict[str, Tensor], position: Tensor, filtered: bool | None) -> Tensor:
    """Returns tokens [B] for logits [B, V] by each row's temperature (0: greedy), top_k and top_p, tensors [B] like the
    seed. filtered=False leaves top-k and top-p out, None all but the argmax.

    Softmax over exponential noise, whose argmax is a sample: no multinomial, no host sync."""
    if filtered is None:
        return logits.argmax(-1)
    temperature = knobs["temperature"][:, None]
    # bounded, as a quotient of infinities has no best token
    z = logits.float() / torch.where(temperature > 0, temperature.clamp(1e-30, 1e30), 1.0)
    gap = z.amax(-1, keepdim=True) - z
    weight = torch.exp(-gap)
    if filtered:
        bits = gap.view(torch.int32)  # floats >= 0 sort like their bits
        weight = weight * (bits <= find_cut(bits, torch.ones_like(weight), knobs["top_k"]))
        weight = weight * (bits <= find_cut(bits, weight, knobs["top_p"] * weight.sum(-1)))
    noise = -torch.log(uniform(knobs["seed"], position, z.size(1)))
    return (weight / torch.where(temperature > 0, noise, 1.0)).argmax(-1)


def find_cut(bits: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Returns the smallest t [B, 1] such that the tokens with bits <= t weigh at least target [B]; int32 bits [B, V].

    Bisects the bits: exact, keeps ties, and several times faster than a sort."""
    t = torch.zeros_like(bits[:, :1])
    for power in range(30, -1, -1):
        trial = t + (1 << power)
        below = (weight * (bits < trial)).sum(-1, keepdim=True)
        t = torch.where(below < target[:, None], trial, t)
    return t


def setting_errors(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> list[str]:
    """Returns what is wrong with the settings of sampling."""
    bad = []
    if max_new_tokens < 1:
        bad.append(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < math.inf:
        bad.append(f"temperature={temperature} must be a number >= 0 (0: always the likeliest)")
    if top_k is not None and top_k < 1:
        bad.append(f"top_k={top_k} must be at least 1")
    if not 0 < top_p <= 1:
        bad.append(f"top_p={top_p} must lie in (0, 1]")
    return bad


# ----------------------------------------------------------------------------------------------------------------------
# decoding


class Decoder:
    """A model with a static cache for `batch` rows of up to `max_len` tokens, and the compiled functions that fill and
    read it: one prefill graph per bucket, one graph per decoding step (one per stage with early exit).

    quantize="int8" decodes with int8 weights; of the vocabulary the first vocab_size tokens are sampled (None: all).
    Keep it between calls of `generate`. Raises ValueError as make_cache does."""

    def __init__(
        self,
        model: MoR,
        batch: int,
        max_len: int,
        *,
        threshold: float = 0.5,
        max_depth: int | None = None,
        slack: float | None = None,
        compile: bool = True,
        freeze: bool = False,
        early_exit: bool | None = None,
        quantize: str | None = None,
        vocab_size: int | None = None,
    ):
        model = self.model = prepare_weights(model, quantize)
        self.vocab_size = vocab_size
        self.cache = model.make_cache(batch, max_len, slack, threshold, max_depth)
        device = model.wte.weight.device
        self.graphs = Graphs(compile, freeze, device)
        self.depth = self.cache.max_depth
        # Stopping when no row goes on costs a host sync per recursion, and pays where rows are few.
        pays = batch <= 4
        self.early_exit = model.config.router != "none" and (pays if early_exit is None else early_exit)

        self.left = torch.zeros(batch, dtype=torch.long, device=device)  # tokens still to sample per row
        self.stop = self.left[:1].clone()  # the token that ends a row
        self.ahead: Sequence = ()  # early exit: state and pass of the tokens sampled last, recursion 0 behind them
        real = torch.zeros(batch, device=device)
        self.knobs = dict(temperature=real, top_p=real.clone(), top_k=self.left.clone(), seed=self.left.clone())

    def start(self, prompts: list[list[int]], room: list[int], stop_token: int | None, **knobs) -> None:
        """Sets up a batch: tokens that each row may sample, the token that ends it, and temperature, top_p, top_k
        (a number for all rows) and seed (one per row)."""
        idle = [0] * (self.cache.batch - len(prompts))
        self.ahead = ()
        self.left.copy_(torch.tensor(room + idle))
        self.stop.fill_(-1 if stop_token is None else stop_token)
        self.knobs["seed"].copy_(torch.tensor([s % 2**32 for s in knobs.pop("seed")] + idle))
        for name, value in knobs.items():
            self.knobs[name].fill_(value)

    def choose(self, logits: Tensor, filtered: bool | None) -> Tensor:
        """Returns a token [B] for each row, -1 for rows that have sampled all they may."""
        sampled = sample_token(logits[:, : self.vocab_size], self.knobs, self.cache.position, filtered)
        token = torch.where(self.left > 0, sampled, -1)
        self.left.sub_(1)
        return token

    def step(self, token: Tensor, filtered: bool | None) -> tuple[Tensor, Tensor]:
        """Feeds a token per row [B] (-1: none) -> the next tokens [B] (-1: the row is over), depths of the fed [B]."""
        run = self.graphs.run
        if not self.early_exit:
            return run(("step", filtered), lambda t: self.whole_step(t, filtered), token)
        s, p = self.ahead or run(("enter",), self.enter, token)
        for r in range(1, self.depth):
            if not s.active.any():  # the host sync
                break
            s = run(("recurse", r), lambda s, p, r=r: self.recurse(r, s, p), s, p)
        # the sampled token goes through recursion 0 in the same graph: a call less per token
        token, depth, *self.ahead = run(("turn", filtered), lambda s, p: self.turn(s, p, filtered), s, p)
        return token, depth

    def whole_step(self, token: Tensor, filtered: bool | None) -> tuple[Tensor, Tensor]:
        s, p = self.enter(token)
        for r in range(1, self.depth):
            s = self.recurse(r, s, p)
        return self.leave(s, p, filtered)

    def enter(self, token: Tensor) -> tuple[State, Pass]:
        """Runs embedding, first layer and recursion 0 of a token per row; a row fed its stop token is idle."""
        p = self.model.decode_pass(torch.where(token == self.stop, -1, token), self.cache)
        s = self.model.route(0, self.model.decode_enter(token, p), p)
        return self.recurse(0, s, p), p

    def recurse(self, r: int, s: State, p: Pass) -> State:
        """Runs recursion r, and decides on the next one."""
        s = self.model.recurse(r, s, p)
        return self.model.go_on(r, s, p) if r + 1 < self.depth else s

    def leave(self, s: State, p: Pass, filtered: bool | None) -> tuple[Tensor, Tensor]:
        """Runs last layer and head, and samples -> the next tokens [B], depths of those that leave [B]."""
        logits = self.model.decode_leave(s, p)
        return torch.where(p.valid[:, 0], self.choose(logits, filtered), -1), s.depth[:, 0]

    def turn(self, s: State, p: Pass, filtered: bool | None) -> tuple[Tensor, Tensor, State, Pass]:
        """Lets rows leave, and enters what they sampled -> the tokens, depths, and the new state and pass."""
        token, depth = self.leave(s, p, filtered)
        return token, depth, *self.enter(token)


class Generated(NamedTuple):
    tokens: list[list[int]]  # new tokens of each row, without the stop token
    depth: list[list[int]]  # recursions of each token, prompt included
    stopped: list[bool]  # by the stop token, rather than by length
    prefill_seconds: float
    seconds: float  # of decoding
    overflow: int  # tokens that ended early for want of a cache slot


@torch.no_grad()
def generate(
    model: MoR,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | list[int] = 0,
    stop_token: int | None = None,
    on_token: Callable | None = None,
    decoder: Decoder | None = None,
    **options,
) -> Generated:
    """Continues all prompts in one batch; a row ends at stop_token, after max_new_tokens, or where the context does.

    on_token(row, token, depth) hears of every token as it becomes known, first those of the prompts, and (row, None,
    None) when a row ends. Row i samples with seed + i, or seed[i]. `decoder` brings cache and graphs of earlier calls;
    else one is made with **options, which are Decoder's. Raises ValueError."""
    check_request(model, prompts, max_new_tokens, temperature, top_k, top_p)
    lengths = [len(p) for p in prompts]
    if decoder is not None and options:
        raise ValueError(f"{', '.join(options)}: settings of a decoder; give them where it is made")
    if decoder is None:
        limit = model.config.block_size
        max_len = bucket(min(limit, max(lengths) + max_new_tokens), limit)
        decoder = Decoder(model, len(prompts), max_len, **options)
    cache = decoder.cache
    if len(prompts) > cache.batch or max(lengths) >= cache.max_len:
        size = f"{cache.batch} rows of {cache.max_len} tokens"
        raise ValueError(f"{len(prompts)} prompts of up to {max(lengths)} tokens do not fit a decoder for {size}")

    room = [min(max_new_tokens, cache.max_len - n) for n in lengths]
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else seed
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each, or a number")
    top = min(top_k or model.config.vocab_size, model.config.vocab_size)
    temperature = min(temperature, 1e30)  # what fp32 holds
    decoder.start(prompts, room, stop_token, seed=seeds, temperature=temperature, top_p=top_p, top_k=top)
    filtered = None if temperature == 0 else top_k is not None or top_p < 1  # of three graphs, the least that serves

    began = time.perf_counter()
    token = decoder.choose(prefill(decoder.graphs, decoder.model, prompts, cache), filtered)
    depth = [row[:n] for row, n in zip(cache.depth.tolist(), lengths, strict=False)]
    log = Log(depth, stop_token, on_token or (lambda row, token, depth: None))
    for row, prompt in enumerate(prompts):
        for t, d in zip(prompt, depth[row], strict=True):
            log.say(row, t, d)
    prefilled = time.perf_counter()

    behind = None
    for _ in range(max(room)):  # the last step gives nothing but the depth of the last token
        fed = token
        token, d = decoder.step(fed, filtered)
        if behind is not None:  # the host reads step i while the device computes step i + 1
            log.read(*behind)
        behind = copy_to_host(torch.stack((fed, d)))
        if not log.running:
            break
    log.read(*behind)
    for row in sorted(log.running):
        log.say(row, None, None)
    seconds = time.perf_counter() - prefilled
    overflow = int(cache.overflow[: len(prompts)].sum())
    return Generated(log.tokens, depth, log.stopped, prefilled - began, seconds, overflow)


class Log:
    """What the rows of one call of `generate` have given so far."""

    def __init__(self, depth: list[list[int]], stop_token: int | None, say: Callable):
        self.depth, self.stop_token, self.say = depth, stop_token, say
        self.tokens: list[list[int]] = [[] for _ in depth]
        self.stopped = [False for _ in depth]
        self.running = set(range(len(depth)))

    def read(self, host: Tensor, event: torch.cuda.Event | None) -> None:
        """Takes in what a step was fed, and the depths that it found: int64 [2, B]."""
        if event is not None:
            event.synchronize()
        for row, (token, depth) in enumerate(host.T.tolist()):
            if row not in self.running:
                continue
            if token < 0 or token == self.stop_token:
                self.stopped[row] = token == self.stop_token
                self.running.discard(row)
                self.say(row, None, None)
            else:
                self.tokens[row].append(token)
                self.depth[row].append(depth)
                self.say(row, token, depth)


def copy_to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Returns a copy of x in host memory, and the event to wait for before reading it."""
    if x.device.type != "cuda":
        return x.cpu(), None
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    event = torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    event.record(torch.cuda.current_stream(x.device))
    return host, event


def check_request(
    model: MoR, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    """Raises one ValueError that lists all that is wrong."""
    c = model.config
    bad = [] if prompts else ["there are no prompts"]
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < c.block_size:
            bad.append(f"prompt {i} has {len(prompt)} tokens, but needs 1 to {c.block_size - 1}: the context less one")
        elif min(prompt) < 0 or max(prompt) >= c.vocab_size:
            bad.append(f"prompt {i} has token ids outside of the model's vocabulary of {c.vocab_size}")
    bad += setting_errors(max_new_tokens, temperature, top_k, top_p)
    if bad:
        raise ValueError("; ".join(bad))
