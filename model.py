"""Mixture-of-Recursions (MoR), the model in one file. Bae et al., NeurIPS 2025, arXiv 2507.10524.

A MoR is a Llama-style decoder that applies one stack of layers (the *block*) up to N times. A router decides for each
token how many times. Every recursion r = 0, 1, ..., N-1 takes the same four steps, in `MoR.route` and `MoR.recurse`:

    decide     which tokens run recursion r          active [B, T], bool
    compact    gather those tokens into K slots      h [B, K, D]
    block      run the shared layers                 y [B, K, D]
    scatter    add the gated result to the stream    x [B, T, D]

K is fixed by the configuration, never by the data. So all shapes are static, and the model compiles to one graph:
torch.compile(fullgraph=True, dynamic=False). The same code serves five purposes, which differ in what a `Pass` says:

                 positions       who runs recursion r           K                     keys and values
    training     0..T-1          top-k of its candidates        floor(capacity * T)   of the K tokens
    evaluation   0..T-1          router above its threshold     T                     of the K tokens
    prefill      0..P-1          router above its threshold     slots of the cache    of the K tokens, then cached
    decoding     tokens seen     router above its threshold     1                     read from the cache
    serving      tokens seen     the same; a row has its own r  1                     read from the cache

That is expert choice. Token choice picks a depth per token once, before recursion 0; in training it has
ceil(capacity_slack * capacity * T) slots. With kv="share", keys and values are those of recursion 0.

To change the routing rule, change `MoR.decide`; what a token attends to, a class under "what a layer attends to"; what
is kept, `KVCache` in cache.py. Kernels are in ops.py, which knows nothing of a MoR; settings in config.py.

Shapes: B batch, T time, K tokens that run a recursion, D width (d_model), H query heads, G key/value heads, E width of
a head, N recursions, L layers of the block, C slots of a cache, V vocabulary. Recursions count from 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cache import KVCache, cache_slots
from config import MoRConfig, check_cache, check_forward, check_prompts, check_routing, round_down
from ops import Matrix, attend, attend_cache, compact, linear, linear_cross_entropy, linears, scramble, take, take_rows

# ----------------------------------------------------------------------------------------------------------------------
# layers


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        # computed in fp32, returned in the dtype of the weights: the residual stream x itself stays fp32
        weight = self.weight.float()
        y = F.rms_norm(x, weight.shape, weight, self.eps)
        return y.to(self.weight.dtype)


def rope_table(config: MoRConfig, device: torch.device | None = None) -> Tensor:
    """Returns cosines and sines, fp32 [block_size + 1, E]. The last row is for the position of a full cache row."""
    half = config.head_dim // 2
    exponent = -torch.arange(half, device=device, dtype=torch.float32) / half
    frequency = config.rope_theta**exponent
    position = torch.arange(config.block_size + 1, device=device)
    angle = position[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Returns x [B, T, heads, E] under RoPE, in Llama's rotate-half convention; rope [B, T, E]: rows of the table."""
    cos, sin = rope[..., None, :].chunk(2, -1)
    a, b = x.float().chunk(2, -1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return rotated.to(x.dtype)


class Layer(nn.Module):
    """One pre-norm Llama layer: grouped-query attention, then SwiGLU, each with its residual addition."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.config = config
        D, E = config.d_model, config.head_dim
        self.attn_norm = RMSNorm(D, config.norm_eps)
        self.wq = Matrix(D, D)
        self.wk = Matrix(D, config.n_kv_head * E)
        self.wv = Matrix(D, config.n_kv_head * E)
        self.wo = Matrix(D, D)
        self.mlp_norm = RMSNorm(D, config.norm_eps)
        self.w_gate = Matrix(D, config.d_ff)
        self.w_up = Matrix(D, config.d_ff)
        self.w_down = Matrix(config.d_ff, D)

    def forward(self, x: Tensor, rope: Tensor, context: "Context", j: int = 0) -> tuple[Tensor, tuple]:
        """Returns y [B, K, D] for x [B, K, D], and this layer's (k, v) [B, K, G, E]. rope [B, K, E] is of the tokens'
        original positions; j is the layer's place in its stack."""
        c = self.config
        B, K, _ = x.shape
        H, G, E = c.n_head, c.n_kv_head, c.head_dim
        h = self.attn_norm(x)
        if context.projects:
            qkv = linears(h, self.wq, self.wk, self.wv)
            heads = qkv.view(B, K, H + 2 * G, E)
            qk, v = heads.split((H + G, G), dim=2)
            q, k = self.prepare_heads(qk, rope).split((H, G), dim=2)
        else:  # kv="share": the keys and values of recursion 0 are used again
            q = linears(h, self.wq).view(B, K, H, E)
            q = self.prepare_heads(q, rope)
            k = v = None
        y = context.attend(j, q, k, v)
        x = x + linears(y.reshape(B, K, H * E), self.wo)

        h = self.mlp_norm(x)
        gate, up = linears(h, self.w_gate, self.w_up).chunk(2, -1)
        x = x + linears(F.silu(gate) * up, self.w_down)
        return x, (k, v)

    def prepare_heads(self, heads: Tensor, rope: Tensor) -> Tensor:
        """Returns queries and keys [B, K, heads, E] as attention compares them: normed if asked, and rotated."""
        if self.config.qk_norm:
            unit = F.rms_norm(heads.float(), heads.shape[-1:], eps=self.config.norm_eps)
            heads = unit.to(heads.dtype)
        return rotate(heads, rope)


# ----------------------------------------------------------------------------------------------------------------------
# what a layer attends to: one class for each way


class Among:
    """The tokens of this pass attend to one another: training, evaluation and prefill."""

    projects = True

    def __init__(self, segments: Tensor | None, cache: "KVCache | None" = None, layer: int = 0, start: int = 0):
        self.mask = None  # plain causal
        if segments is not None:  # causal, and within one document
            same = segments[:, :, None] == segments[:, None, :]
            self.mask = same.tril()[:, None]
        self.cache = cache
        self.layer = layer
        self.start = start

    def attend(self, j: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cache is not None:
            self.cache.write_prompt(self.layer + j, self.start, k, v)
        return attend(q, k, v, self.mask)


class Shared:
    """kv="share", recursions 1 and later: every earlier token, through the keys and values of recursion 0."""

    projects = False

    def __init__(self, kv: list[tuple[Tensor, Tensor]], mask: Tensor):
        self.kv, self.mask = kv, mask

    def attend(self, j: int, q: Tensor, k: None, v: None) -> Tensor:
        return attend(q, *self.kv[j], self.mask)


class Cached:
    """Decoding: the one token of a row takes a slot of the cache and attends to all slots up to it.

    r: whose slots these are, int or [B, 1]; None where a layer keeps every token. used [B, 1]: slots filled before.
    live [B, 1] bool: rows whose token takes one. projects: whether the token has a K/V."""

    def __init__(self, cache: "KVCache", layer: int, r: Any, used: Tensor, live: Tensor, projects: bool = True):
        self.cache = cache
        self.layer = layer
        self.r = r
        self.used = used
        self.live = live
        self.projects = projects
        self.length = (used + live).clamp(min=1)[:, 0]  # rows that nobody reads must not take a softmax over nothing

    def attend(self, j: int, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        layer = self.layer + j
        if self.projects:
            self.cache.write_token(layer, self.r, self.used, self.live, k, v)
        window = self.cache.window(layer, self.r)
        return attend_cache(q, *window, self.length)


Context = Among | Shared | Cached

# ----------------------------------------------------------------------------------------------------------------------
# routers


class Router(nn.Module):
    """Logits fp32 [B, T, out] of the raw residual stream. "mlp" and "wide_mlp" are one, as in the released code."""

    def __init__(self, config: MoRConfig, out: int):
        super().__init__()
        D = config.d_model
        self.net = nn.Linear(D, out, bias=False)
        if config.router_arch != "linear":
            up = nn.Linear(D, 2 * D, bias=False)
            down = nn.Linear(2 * D, out, bias=False)
            self.net = nn.Sequential(up, nn.GELU(), down)

    def forward(self, x: Tensor) -> Tensor:
        # always fp32: a rounded logit flips decisions, and the router is a thousandth of the work
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            weights = [w.float() for w in self.parameters()]
            if len(weights) == 2:
                x = F.gelu(linear(x, weights[0]))
            return linear(x, weights[-1])


def ask(routers: nn.ModuleList, r: int | Tensor, x: Tensor) -> Tensor:
    """Returns the logits [B, T] of recursion r's router; r [B, 1] where each row is at a recursion of its own."""
    if isinstance(r, int):
        return routers[r](x)[..., 0]
    every = torch.cat([router(x) for router in routers], dim=-1)
    return every.gather(-1, r[..., None])[..., 0]


def top_k(logit: Tensor, candidates: Tensor, slots: int, k: int | Tensor) -> Tensor:
    """Returns the k best candidates of each row, bool [B, T]. k <= slots may be a tensor; `slots` is static."""
    ranked = logit.masked_fill(~candidates, -math.inf)
    best = ranked.topk(slots).indices
    rank = torch.arange(slots, device=best.device)
    chosen = (rank < k).expand_as(best)
    return torch.zeros_like(candidates).scatter(1, best, chosen)


def hash_depth(capacities: tuple[float, ...], position: Tensor, token: Tensor | None) -> Tensor:
    """Returns depths such that a share capacities[r] exceeds r: evenly spread over positions, or by chance by token."""
    x = position * 0x9E3779B1 & 0xFFFFFFFF  # the golden ratio: its multiples fill [0, 1) evenly
    if token is not None:
        x = scramble(scramble(x) + token * 0x85EBCA6B & 0xFFFFFFFF)
    fraction = (x >> 8).float() * 2.0**-24  # below 1, exactly
    return sum((fraction < capacity).long() for capacity in capacities)


# ----------------------------------------------------------------------------------------------------------------------
# the model


class Output(NamedTuple):
    logits: Tensor | None  # [B, T, V]; None in training when targets are given
    loss: Tensor | None  # language-model loss plus weighted router losses
    losses: dict[str, Tensor]  # detached and unweighted: "lm" and, where they apply, "aux", "balance", "z"
    depth: Tensor  # [B, T] recursions that each token ran
    router: Tensor | None  # [B, T, max_depth] fp32, detached: logits of the router that decides at inference
    dropped: Tensor  # tokens that wanted a recursion and found no slot
    choice: Tensor | None  # [B, T] the depth 1..N that each token chose; None where tokens do not choose
    hidden: Tensor | None  # [B, T, D] the normed stream that the head reads, on request


@dataclass
class Pass:
    """What one pass through the model does; see the table at the head of this file."""

    position: Tensor  # [B, T] or [1, T]
    slots: list[int]  # K of each recursion
    room: list[int | Tensor | None]  # tokens of a row, int or [B, 1], that each recursion takes; None: all
    max_depth: int
    threshold: float = 0.0  # logit from which a token goes on
    topk: bool = False  # expert choice by top-k, which sees the future
    valid: Tensor | None = None  # [B, T] bool: not padding, not an idle row; None: all
    segments: Tensor | None = None  # [B, T] document of each token
    cache: KVCache | None = None
    decoding: bool = False


class Decision(NamedTuple):
    """What `route` found at one recursion: what losses and counts are made of."""

    logit: Tensor | None  # [B, T] of the router whose gate it is
    decider: Tensor | None  # [B, T] of the router that decides at inference
    candidates: Tensor  # [B, T] bool
    wanted: Tensor  # [B, T] bool: what `decide` said
    active: Tensor  # [B, T] bool: what found a slot


class State(NamedTuple):
    """What a recursion hands to the next."""

    x: Tensor  # [B, T, D] fp32 residual stream
    active: Tensor  # [B, T] bool: after `route` tokens that run its recursion; before it, those that ran the last one
    depth: Tensor  # [B, T] recursions run, the next one included
    gate: Tensor | None = None  # [B, T] of the next recursion; token choice: [B, T, N] of every depth
    logit: Tensor | None = None  # of the router, in the shape of the gate
    decider: Tensor | None = None  # [B, T] of the router that decides at inference
    choice: Tensor | None = None  # [B, T] chosen depth, 1..N
    entry: Tensor | None = None  # token choice: [B, T, D] stream before the first recursion
    shared: list | None = None  # kv="share": (k, v) of recursion 0 per layer of the block
    decisions: tuple[Decision, ...] = ()


OF_ONE_STAGE = ("active", "shared", "decisions")  # of a served row, engine.py keeps all other fields between stages


class MoR(nn.Module):
    """A vanilla, recursive or Mixture-of-Recursions language model: one class, one forward."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        c = self.config = config
        self.checkpoint_recursions = False  # True: recompute recursions in the backward pass instead of keeping them
        self.wte = nn.Embedding(c.vocab_size, c.d_model)
        self.first = Layer(c) if c.n_unshared else None
        self.block = nn.ModuleList(Layer(c) for _ in range(c.n_block))
        self.last = Layer(c) if c.n_unshared else None
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.lm_head = None if c.tie_embeddings else Matrix(c.d_model, c.vocab_size)
        if c.gated:
            self.routers = nn.ModuleList(Router(c, 1) for _ in range(c.n_recursion))
        if c.causality == "aux_router":
            self.aux_routers = nn.ModuleList(Router(c, 1) for _ in range(c.n_recursion))
        if c.router == "token":
            self.router = Router(c, c.n_recursion)
            if c.balance == "bias":
                self.register_buffer("balance_bias", torch.zeros(c.n_recursion))
        # a table, since computing it in the kernels that use it takes five times as long as the rotation itself
        self.register_buffer("rope", rope_table(c), persistent=False)
        self.register_buffer("takes_all", torch.tensor(c.takes_all), persistent=False)
        for p in self.parameters():
            if p.dim() == 2:  # N(0, 0.02) as in Llama and the paper's code; norms are 1
                nn.init.normal_(p, std=0.02)

    def _apply(self, fn, recurse=True):
        """Moves and casts the model; the tables are made anew, RoPE's in fp32."""
        super()._apply(fn, recurse)
        device = self.wte.weight.device
        self.rope = rope_table(self.config, device)
        self.takes_all = torch.tensor(self.config.takes_all, device=device)
        return self

    # ---- a pass is: enter; route and recurse for r = 0, 1, ...; leave

    def backbone(self, idx: Tensor, p: Pass) -> tuple[Tensor, State]:
        """Returns the normed stream [B, T, D] of idx int64 [B, T], and the final State."""
        s = self.enter(idx, p)
        for r in range(p.max_depth):
            s = self.route(r, s, p)
            s = self.recurse(r, s, p)
        return self.leave(s, p), s

    def enter(self, idx: Tensor, p: Pass) -> State:
        """Embeds, runs the first layer, and chooses the depth of each token where that is chosen once."""
        x = self.wte(idx).float()
        if self.first is not None:
            context = self.every_token(0, p)
            x, _ = self.first(x, self.rope[p.position], context)
        active = torch.ones_like(idx, dtype=torch.bool) if p.valid is None else p.valid
        s = State(x, active, depth=torch.zeros_like(idx))
        c = self.config
        if c.router == "token":
            func, alpha = c.gate
            logit = self.router(x)
            gate = alpha * (logit.sigmoid() if func == "sigmoid" else logit.softmax(-1))
            score = gate
            if c.balance == "bias":
                score = score + self.balance_bias.float()
            choice = score.argmax(-1) + 1
            return s._replace(gate=gate, logit=logit, choice=choice, entry=x)
        if c.router in ("random", "position"):
            choice = hash_depth(c.capacities, p.position, idx if c.router == "random" else None)
            return s._replace(choice=choice.expand(idx.shape))
        return s

    def decide(self, r: int | Tensor, s: State, p: Pass) -> Tensor:
        """The routing rule: returns the tokens that run recursion r, bool [B, T].

        Only tokens that ran recursion r-1 count; where capacities[r] is 1.0 all of them go on. Of more than there are
        slots for, the last are dropped (out.dropped). May read p.position, s.x, s.depth, s.choice, s.logit (the gate's
        router) and s.decider (the one obeyed at inference). If it looks only at a token and those before it, decoding
        stays equal to the full forward. r is an int, or int64 [B, 1] where rows are served at different depths."""
        if self.config.router != "expert":  # a depth was chosen before recursion 0
            return s.active if s.choice is None else s.choice > r
        if not p.topk:
            return s.decider >= p.threshold
        if self.config.takes_all[r]:
            return s.active
        # ranked by logit, not by gate: the same order, without the ties of a saturated sigmoid
        return top_k(s.logit, s.active, p.slots[r], p.room[r])

    def route(self, r: int | Tensor, s: State, p: Pass) -> State:
        """Sets who runs recursion r and at what gate: asks the routers, then `decide`, then gives out slots."""
        c = self.config
        if c.gated:
            func, alpha = c.gate
            logit = decider = ask(self.routers, r, s.x)
            if c.causality == "aux_router":  # it learns to imitate: it must not shape the stream that it reads
                decider = ask(self.aux_routers, r, s.x.detach())
            gate = alpha * (logit.tanh() if func == "tanh" else logit.sigmoid())
            s = s._replace(gate=gate, logit=logit, decider=decider)
        chosen = self.takes_all[r] | self.decide(r, s, p)
        wanted = s.active & chosen
        active = self.admit(r, wanted, p)
        if c.router != "none" and p.cache is None:
            decision = Decision(s.logit, s.decider, s.active, wanted, active)
            s = s._replace(decisions=(*s.decisions, decision))
        return s._replace(active=active, depth=s.depth + active)

    def admit(self, r: int | Tensor, wanted: Tensor, p: Pass) -> Tensor:
        """Returns the wanted tokens that find a slot, bool [B, T]. They get it in the order of their positions, so that
        which token is refused does not depend on later ones; a token without slot ends at the depth it has."""
        if p.decoding and self.config.own_kv:
            fits = wanted & (p.cache.used(r) < p.cache.slots_at[r])
        elif p.decoding or p.room[r] is None:
            return wanted
        else:
            fits = wanted & (wanted.cumsum(1) <= p.room[r])
        if p.cache is not None:
            p.cache.count(p.cache.overflow, p.cache.row, wanted & ~fits)
        return fits

    def recurse(self, r: int | Tensor, s: State, p: Pass) -> State:
        """Runs recursion r on the active tokens: compact, block, scatter."""
        c = self.config
        B, T = s.active.shape
        h, position, segments = s.x, p.position, p.segments
        whole = T == 1 or (p.slots[r] == T and c.takes_all[r])  # nothing to compact
        if not whole:
            # real tokens come first, so causal attention among the K never reaches an empty slot
            index, slot = compact(s.active, p.slots[r])  # [B, K], [B, T]
            h = take_rows(s.x, index, slot)  # [B, K, D]
            position = take(position.expand(B, T), index)  # empty slots take the last one's, to see some key
            segments = take(segments, index)

        rope = self.rope[position]
        context = self.block_context(r, position, segments, s, p)
        if self.checkpoint_recursions and torch.is_grad_enabled():
            y, kv = checkpoint(self.run_block, r, h, rope, context, use_reentrant=False)
        else:
            y, kv = self.run_block(r, h, rope, context)

        if not whole:
            y = take_rows(y, slot, index)  # [B, T, D], zeros for tokens that did not run
        if c.gated:
            gate = s.gate * s.active
            x = s.x + gate[..., None] * y
        elif whole and T > 1:
            x = y
        else:  # token choice replaces the stream, and gates once, when the token leaves
            x = torch.where(s.active[..., None], y, s.x)
        if p.cache is not None and c.own_kv:
            p.cache.count(p.cache.fill, (r, p.cache.row), s.active)
        keeps = not (c.own_kv or p.decoding) and r == 0
        return s._replace(x=x, shared=kv if keeps else s.shared)

    def run_block(self, r: int | Tensor, h: Tensor, rope: Tensor, context: Context) -> tuple[Tensor, list]:
        """Runs the shared layers: h [B, K, D] -> y [B, K, D], and the (k, v) of each layer."""
        c, kv = self.config, []
        for j in range(c.n_block):
            place = (r * c.n_block + j) // c.n_recursion if "sequence" in c.sharing else j
            h, layer_kv = self.block[place](h, rope, context, j)
            kv.append(layer_kv)
        return h, kv

    def block_context(self, r: int | Tensor, position: Tensor, segments: Tensor | None, s: State, p: Pass) -> Context:
        """Returns what the layers of the block attend to at recursion r."""
        c, cache = self.config, p.cache
        layer = 1 if c.n_unshared else 0
        later = not isinstance(r, int) or r > 0  # rows at different depths are all past recursion 0
        if p.decoding and c.own_kv:
            return Cached(cache, layer, r, cache.used(r), s.active)
        if p.decoding:
            return Cached(cache, layer, None, p.position, p.valid, projects=not later)
        if later and not c.own_kv:
            mask = position[:, :, None] >= p.position[:, None, :]
            if segments is not None:
                mask = mask & (segments[:, :, None] == p.segments[:, None, :])
            return Shared(s.shared, mask[:, None])
        return Among(segments, cache, layer, 0 if cache is None else cache.start[r])

    def every_token(self, layer: int, p: Pass) -> Context:
        """Returns what the first and the last layer attend to."""
        if p.decoding:
            return Cached(p.cache, layer, None, p.position, p.valid)
        return Among(p.segments, p.cache, layer)

    def leave(self, s: State, p: Pass) -> Tensor:
        """Applies token choice's gate, the last layer and the final norm -> [B, T, D]."""
        x = s.x
        if self.config.router == "token":  # H1 + p_d H_d, d the depth that ran (the released code's reading of eq. 2.2)
            depth = s.depth[..., None]
            gate = s.gate.gather(-1, (depth - 1).clamp(min=0))
            x = s.entry + torch.where(depth > 0, gate, 0.0) * x
        if self.last is not None:
            context = self.every_token(self.config.n_block + 1, p)
            x, _ = self.last(x, self.rope[p.position], context)
        return self.norm(x)

    def head(self, h: Tensor) -> Tensor:
        """Returns logits fp32 [..., V] of the normed stream."""
        return linears(h, self.lm_head or self.wte).float()

    @property
    def head_weight(self) -> Tensor:
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    # ---- training and evaluation

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        routing: str | None = None,
        *,
        labels: Tensor | None = None,
        valid: Tensor | None = None,
        segments: Tensor | None = None,
        capacity: Tensor | None = None,
        threshold: float = 0.5,
        max_depth: int | None = None,
        return_logits: bool | None = None,
        return_hidden: bool = False,
    ) -> Output:
        """Runs idx int64 [B, T] through the model -> Output. Raises ValueError.

        targets        int64 [B, T], already shifted; -100 is ignored
        labels         instead of targets: the same tokens as idx, shifted here
        routing        "topk": expert choice over the whole sequence; "causal": as at inference; None: topk in training
        valid          bool or int [B, T], an attention mask: padding on either side takes no slot and has no loss
        segments       int [B, T], the document of each token: attention never crosses documents
        capacity       fp32 [N], this step's capacities during capacity warm-up: a whole schedule costs one more graph
        threshold      causal routing: the probability from which expert choice goes on
        max_depth      the most recursions that a token runs
        return_logits  None: yes, except in training with targets, where they are never whole in memory
        """
        T = idx.size(1)
        routing = routing or ("topk" if self.training else "causal")
        check_forward(self.config, T, routing, targets, labels)
        threshold, max_depth = check_routing(self.config, routing, threshold, max_depth)
        if valid is not None:  # every row begins with its first token: then causal attention never sees padding
            index, slot = compact(valid.bool(), T)
            valid = index < T
            idx = take(idx, index, 0)
            segments = take(segments, index, -1)
            targets = take(targets, index, -100)
            labels = take(labels, index, -100)
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)

        tokens = T if valid is None else valid.sum(1, keepdim=True)
        slots, room = self.forward_slots(T, tokens, routing == "topk", capacity)
        position = torch.arange(T, device=idx.device)[None]
        p = Pass(position, slots, room, max_depth, threshold, routing == "topk", valid, segments)
        h, s = self.backbone(idx, p)

        logits = loss = None
        if return_logits is None:
            return_logits = targets is None or not self.training
        if return_logits:
            logits = self.head(h)
        losses = {}
        if targets is not None:
            loss, losses = self.losses(h, logits, targets, s, p)
        depth, choice, router = s.depth, s.choice, self.router_logits(s)
        if valid is not None:  # back to where the tokens stood; zeros at padding
            logits = take_rows(logits, slot, index)
            h = take_rows(h, slot, index)
            router = take_rows(router, slot, index)
            depth = take(depth, slot, 0)
            choice = take(choice, slot, 0)
        refused = [d.wanted.sum() - d.active.sum() for d in s.decisions]
        dropped = sum(refused, depth.new_zeros(()))
        return Output(logits, loss, losses, depth, router, dropped, choice, h if return_hidden else None)

    def forward_slots(self, T: int, tokens: int | Tensor, topk: bool, capacity: Tensor | None) -> tuple[list, list]:
        """Returns K of each recursion for sequences of T, and the room in it for a row of `tokens` tokens."""
        c, slots, room = self.config, [], []
        for r, fraction in enumerate(c.capacities):
            K, k = T, None
            if c.router == "expert" and topk:
                K = k = max(1, round_down(fraction * T))
                if capacity is not None:  # slots for all, of which the tensor says how many are used
                    K, fraction = T, capacity[r]
                if capacity is not None or isinstance(tokens, Tensor):
                    k = (fraction * tokens + 1e-4).floor().clamp(min=1)
            elif c.router not in ("none", "expert") and self.training:
                K = k = c.slots(r, T, c.capacity_slack)
                if isinstance(tokens, Tensor):
                    k = (c.capacity_slack * fraction * tokens - 1e-4).ceil()
            slots.append(K)
            room.append(None if c.takes_all[r] else k)
        return slots, room

    def router_logits(self, s: State) -> Tensor | None:
        """Returns the logits [B, T, N] of the router that decides at inference."""
        if not s.decisions:
            return None
        if self.config.router == "token":
            return s.logit.detach()
        return torch.stack([d.decider for d in s.decisions], -1).detach()

    def losses(self, h: Tensor, logits: Tensor | None, targets: Tensor, s: State, p: Pass) -> tuple[Tensor, dict]:
        """Returns the weighted sum, and each loss unweighted and detached (paper Sections 2.2.1 and 4.2)."""
        c = self.config
        if logits is None:
            lm = linear_cross_entropy(h, self.head_weight, targets)
        else:
            total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            lm = total / (targets != -100).sum().clamp(min=1)
        terms = {"lm": (1.0, lm)}
        if c.router == "expert" and p.topk:
            terms |= self.expert_losses(s.decisions)
        if c.router == "token":
            terms |= self.token_losses(s)
        loss = sum(weight * term for weight, term in terms.values())
        losses = {name: term.detach() for name, (_, term) in terms.items()}
        return loss, losses

    def expert_losses(self, decisions: tuple[Decision, ...]) -> dict[str, tuple[float, Tensor]]:
        """Returns name -> (coefficient, loss): sums over recursions of means over the candidates of each."""
        c, aux, z = self.config, 0.0, 0.0
        for d in decisions:
            share = d.candidates / d.candidates.sum().clamp(min=1)
            target = d.active.float()
            bce = F.binary_cross_entropy_with_logits(d.decider, target, reduction="none")
            aux = aux + (bce * share).sum()
            z = z + (d.logit.square() * share).sum()
        found = {}
        if c.causality != "none":
            found["aux"] = (c.aux_coef, aux)
        if c.z_coef:
            found["z"] = (c.z_coef, z)
        return found

    def token_losses(self, s: State) -> dict[str, tuple[float, Tensor]]:
        """Returns name -> (coefficient, loss): means over all tokens but padding."""
        c, real = self.config, s.decisions[0].candidates
        share = real / real.sum().clamp(min=1)  # [B, T], sums to 1
        depths = torch.arange(1, c.n_recursion + 1, device=share.device)
        chosen = s.choice[..., None] == depths  # [B, T, N]
        load = (chosen * share[..., None]).sum((0, 1))
        probability = (s.gate * share[..., None]).sum((0, 1))
        found = {}
        if c.balance == "loss":
            balance = c.n_recursion * (probability * load).sum()
            found["balance"] = (c.balance_coef, balance)
        if c.z_coef:
            z = s.logit.logsumexp(-1).square()
            found["z"] = (c.z_coef, (z * share).sum())
        return found

    @torch.no_grad()
    def update_balance_bias(self, counts: Tensor, rate: float = 1e-3) -> None:
        """Balances token choice without a loss, after an optimizer step. counts [N]: tokens that chose each depth."""
        missing = counts.float().mean() - counts.float()
        self.balance_bias += rate * missing.sign()

    # ---- cached inference

    @torch.no_grad()
    def make_cache(
        self,
        batch_size: int,
        max_len: int,
        slack: float | None = None,
        threshold: float = 0.5,
        max_depth: int | None = None,
    ) -> KVCache:
        """Returns a cache for `batch_size` rows of up to max_len tokens, like the weights. Recursion r has ceil(slack *
        capacity_r * max_len) slots a row (None: config.capacity_slack). A token that finds none stops there and is
        counted in cache.overflow [B]. Raises ValueError."""
        slack = self.config.capacity_slack if slack is None else slack
        check_cache(self.config, batch_size, max_len, slack)
        return KVCache(self, batch_size, max_len, slack, *check_routing(self.config, "causal", threshold, max_depth))

    @torch.no_grad()
    def prefill(self, idx: Tensor, lengths: Tensor, cache: KVCache, tight: bool = False) -> Tensor:
        """Starts every row with a right-padded prompt: idx int64 [B, P], lengths int64 [B] -> logits fp32 [B, V] of its
        last token. tight=True computes only as many tokens as routing should admit in a prompt of this length: if it
        admitted more, cache.short is set, the result is void, and the caller runs prefill again without it. Where
        config.prefills_once, all tokens but the last stop after recursion 0: a cost of about 1/N."""
        c, (B, P) = self.config, idx.shape
        check_prompts(B, P, cache.batch, cache.max_len)
        cache.fill.zero_()
        cache.overflow.zero_()
        slots = [c.slots(r, P, cache.slack if tight else math.inf) for r in range(c.n_recursion)]
        if c.own_kv:
            slots = [min(K, most) for K, most in zip(slots, cache.slots, strict=True)]
        room = [None if K == P else K for K in slots]
        position = torch.arange(P, device=idx.device)[None]
        valid = position < lengths[:, None]
        p = Pass(position, slots, room, cache.max_depth, cache.threshold, valid=valid, cache=cache)
        row, last = cache.every_row, lengths[:, None] - 1
        s = self.enter(idx, p)
        for r in range(p.max_depth):
            s = self.route(r, s, p)
            s = self.recurse(r, s, p)
            cache.depth[row, p.position] = s.depth
            if r == 0 and c.prefills_once:  # go on with the last token of each row alone
                of_last = {name: x[row, last] for name, x in s._asdict().items() if isinstance(x, Tensor)}
                s = State(**of_last)
                cache.position.copy_(lengths - 1)
                p = self.decode_pass(lengths, cache)
        h = self.leave(s, p)
        if not c.prefills_once:
            h = h[row, last]
        cache.short.copy_((cache.overflow > 0).any() & tight)
        cache.position.copy_(lengths)
        return self.head(h[:, 0])

    @torch.no_grad()
    def decode(self, token: Tensor, cache: KVCache) -> Tensor:
        """Appends one token per row: int64 [B] -> logits fp32 [B, V]. A row given -1, or full, is idle: it writes
        nothing and its logits mean nothing. One graph, no host sync; every recursion is computed, and masked."""
        p = self.decode_pass(token, cache)
        s = self.decode_enter(token, p)
        for r in range(p.max_depth):
            s = self.route(r, s, p)
            s = self.recurse(r, s, p)
        return self.decode_leave(s, p)

    # generate.py and engine.py compile these parts of `decode` by themselves, and look between them which rows go on

    def decode_pass(self, token: Tensor, cache: KVCache) -> Pass:
        """Returns the pass over one token per row of the cache, int64 [B]; -1: none."""
        position = cache.position[cache.row].view(-1, 1).clone()
        if token.shape != position.shape[:1]:
            raise ValueError(f"token {tuple(token.shape)} must be one per row of the cache: ({len(position)},)")
        live = (token[:, None] >= 0) & (position < cache.max_len)
        one = [1] * self.config.n_recursion
        return Pass(position, one, one, cache.max_depth, cache.threshold, valid=live, cache=cache, decoding=True)

    def decode_enter(self, token: Tensor, p: Pass) -> State:
        return self.enter(token[:, None].clamp(min=0), p)

    def go_on(self, r: int | Tensor, s: State, p: Pass) -> State:
        """Routes, after recursion r, the rows that may run another one. From the last recursion nobody goes on."""
        s = s._replace(active=s.active & (r + 1 < p.max_depth))
        return self.route((r + 1) % self.config.n_recursion, s, p)

    def decode_leave(self, s: State, p: Pass) -> Tensor:
        """Runs last layer and head -> logits fp32 [B, V]; the rows have then seen one token more."""
        logits = self.head(self.leave(s, p)[:, 0])
        p.cache.count(p.cache.position, p.cache.row, p.valid)
        return logits

    def generate(self, ids: Tensor | list[list[int]], max_new_tokens: int, **options) -> list[list[int]]:
        """Returns the tokens that continue each row of ids (int64 [B, T], or lists). options: generate.generate's."""
        from generate import generate

        rows = ids.tolist() if isinstance(ids, Tensor) else ids
        options.setdefault("compile", False)
        return generate(self, rows, max_new_tokens, **options).tokens

    # ---- counting

    def num_params(self, embedding: bool = False) -> int:
        """Returns the number of parameters; without embedding and head unless asked (paper Table 6)."""
        total = sum(p.numel() for p in self.parameters())
        outer = set() if embedding else {self.wte.weight, self.head_weight}
        return total - sum(w.numel() for w in outer)

    def flops_per_token(
        self, T: int, head: bool = False, fractions: Sequence[float] | None = None, convention: str = "exact"
    ) -> float:
        """Returns forward FLOPs per token of a sequence of T: 2 per weight, and the causal half of attention.

        Where k of T tokens run a recursion (by capacity, or by `fractions`), weights cost k/T, attention (k/T)^2, or
        k/T with shared K/V. convention="paper" counts K/V projections at full width: so do its figures come out."""
        if convention not in ("exact", "paper"):
            raise ValueError(f"convention={convention!r} must be 'exact' or 'paper'")
        c = self.config
        width = c.d_model if convention == "paper" else c.n_kv_head * c.head_dim
        kv = 4 * c.d_model * width
        weights = 4 * c.d_model**2 + 6 * c.d_model * c.d_ff + kv
        attention = 2 * T * c.d_model  # 2 matmuls x 2 FLOPs x T/2 keys x D
        total = c.n_unshared * (weights + attention)
        for r, capacity in enumerate(c.capacities):
            f = capacity
            if fractions is not None:
                f = fractions[r]
            elif c.router == "expert":
                f = max(1, round_down(capacity * T)) / T
            layer = weights + f * attention
            if r > 0 and not c.own_kv:
                layer = weights - kv + attention
            total += c.n_block * f * layer
        if head:
            total += 2 * c.d_model * c.vocab_size
        return total

    def kv_bytes(self, batch: int, T: int, dtype: torch.dtype) -> int:
        """Returns the bytes of keys and values for `batch` rows of T tokens, as make_cache(batch, T, slack=1) has."""
        c = self.config
        slots = c.n_unshared * T + c.n_block * sum(cache_slots(c, T, 1.0))
        return 2 * batch * slots * c.n_kv_head * c.head_dim * dtype.itemsize

    def load_reference_state_dict(self, sd: Mapping[str, Tensor]) -> None:
        """Loads weights in the authors' layout."""
        from checkpoint import load_reference_state_dict

        load_reference_state_dict(self, sd)

    @classmethod
    def from_pretrained(cls, path: Any, init: str = "stepwise", **overrides) -> "MoR":
        """Returns the model that a directory holds."""
        from checkpoint import from_pretrained

        return from_pretrained(path, init, **overrides)
