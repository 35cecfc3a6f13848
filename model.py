"""
Mixture-of-Recursions (MoR) in one file: Bae et al., NeurIPS 2025, arXiv 2507.10524.

A MoR is a Llama-style decoder that reuses one stack of layers (the *block*) up to N times; a router decides per token
how many times. Every recursion is the same four moves, all of them in `MoR.decide` and `MoR.recurse`:

    decide    which tokens run recursion r          -> a boolean [B, T]
    compact   their positions, ascending            -> index [B, K], K fixed by the configuration
    block     the shared layers on those K tokens   -> y [B, K, D]
    scatter   x += gate * y at their positions

K never depends on data, so the whole model is one static graph: torch.compile(fullgraph=True, dynamic=False). Training,
evaluation, prefill and one-token decoding run through the same code; what differs between them is in `Pass`.

Shapes: B batch, T time, K tokens that run a recursion, D width (d_model), H query heads, G key/value heads, E head
width, N recursions, L layers in the block, C cache slots, V vocabulary. Recursions count from 0.

To route in another way, change `decide`: whatever boolean it gives, the rest follows. Where it looks only at a token
and those before it, decoding stays equal to the full forward; the tests say so.

In order: configuration, layers, attention, routers, loss, cache, the model (routing, training, cached inference, cost
accounting, weights in). Attention on CPUs and weights in can be skipped on a first reading.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# configuration

PRESETS = {  # paper Table 6; "nano" is ours, for a laptop
    "nano": dict(vocab_size=8192, block_size=256, n_layer=8, n_head=4, n_kv_head=2, d_model=256, d_ff=768),
    "135M": dict(vocab_size=49152, block_size=2048, n_layer=30, n_head=9, n_kv_head=3, d_model=576, d_ff=1536),
    "360M": dict(vocab_size=49152, block_size=2048, n_layer=32, n_head=15, n_kv_head=5, d_model=960, d_ff=2560),
    "730M": dict(vocab_size=49152, block_size=2048, n_layer=26, n_head=24, n_kv_head=8, d_model=1536, d_ff=4096),
    "1.7B": dict(vocab_size=49152, block_size=2048, n_layer=24, n_head=32, n_kv_head=32, d_model=2048, d_ff=8192),
}
CHOICES = {
    "sharing": ("middle_cycle", "cycle", "sequence", "middle_sequence"),
    "router": ("none", "expert", "token"),
    "kv": ("recursion", "share"),
    "router_arch": ("linear", "mlp", "wide_mlp"),
    "router_func": (None, "sigmoid", "tanh", "softmax"),
    "causality": ("aux_loss", "aux_router", "none"),
    "balance": ("loss", "bias", "none"),
}


@dataclass
class MoRConfig:
    """Everything that defines a model. `n_recursion=1` is a vanilla Llama; `n_recursion>1, router="none"` the recursive
    baseline. Raises one ValueError that lists every mistake with its value and remedy."""

    vocab_size: int
    block_size: int  # longest context, tokens
    n_layer: int  # unrolled depth: layers a token of full depth passes
    n_head: int
    n_kv_head: int
    d_model: int
    d_ff: int
    n_recursion: int = 1  # N
    sharing: str = "middle_cycle"  # which unrolled layers are the same weights (paper Table 1)
    router: str = "none"  # expert: each recursion chooses tokens; token: each token chooses its depth
    kv: str = "recursion"  # recursion: a depth caches the tokens that run it; share: all read recursion 0's K/V
    capacity: tuple[float, ...] | None = None  # fraction of the full sequence that runs recursion r; None: (N-r)/N
    router_arch: str = "linear"
    router_func: str | None = None  # None: sigmoid for expert choice, softmax for token choice
    router_alpha: float | None = None  # gate scale; None: 0.1 for sigmoid and tanh, 1.0 for softmax
    causality: str = "aux_loss"  # what makes expert choice decidable without the future
    aux_coef: float = 1e-3
    balance: str = "loss"  # token choice: balancing loss, loss-free bias, or nothing
    balance_coef: float = 0.1
    z_coef: float = 0.0  # router z-loss
    capacity_slack: float = 1.25  # token-choice training slots and cache slots, relative to capacity
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self):
        if isinstance(self.capacity, list):  # JSON has no tuples
            self.capacity = tuple(self.capacity)
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _problems(self) -> list[str]:
        def positive(value, kind):
            return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf

        def name(field):
            return f"{field}={getattr(self, field)!r}"

        sizes = "vocab_size block_size n_layer n_head n_kv_head d_model d_ff n_recursion".split()
        bad = [f"{name(f)} must be a positive integer" for f in sizes if not positive(getattr(self, f), int)]
        for f in "rope_theta norm_eps capacity_slack aux_coef balance_coef z_coef router_alpha".split():
            may_be = {"router_alpha": None}.get(f, 0 if f.endswith("_coef") else math.nan)
            if getattr(self, f) != may_be and not positive(getattr(self, f), (int, float)):
                bad.append(f"{name(f)} must be a finite number {'>= 0' if may_be == 0 else '> 0'}")
        for f, choices in CHOICES.items():
            if getattr(self, f) not in choices:
                bad.append(f"{name(f)} must be one of {', '.join(map(str, choices))}")
        if bad:  # what follows computes with these
            return bad
        n, inner, routed = self.n_recursion, self.n_layer - self.n_unshared, self.router != "none"
        cyclic, func = "sequence" not in self.sharing, (self.router, self.router_func)
        rules = [  # what must hold, and the complaint when it does not
            (self.capacity_slack >= 1, f"{name('capacity_slack')} must be >= 1: fewer slots than capacity drop tokens"),
            (self.d_model % (2 * self.n_head) == 0,
             f"{name('d_model')} must be {name('n_head')} times an even head width: RoPE rotates pairs"),
            (self.n_head % self.n_kv_head == 0, f"{name('n_head')} must be a multiple of {name('n_kv_head')}"),
            (inner >= n and inner % n == 0,
             f"{name('n_layer')} minus {self.n_unshared} unshared layers must be a positive multiple of n_recursion={n}"
             f" for {name('sharing')}: use n_layer={self.n_unshared + n * max(1, math.ceil(inner / n))}"),
            (n > 1 or not routed, f"{name('router')} has nothing to route: use n_recursion>=2 or router='none'"),
            (cyclic or not routed, f"{name('router')} needs sharing='cycle' or 'middle_cycle', not {self.sharing!r}"),
            (n > 1 or self.kv != "share", "kv='share' needs n_recursion>=2: no later recursion would reuse the K/V"),
            (cyclic or self.kv != "share", f"kv='share' needs sharing='cycle' or 'middle_cycle', not {self.sharing!r}"),
            (func != ("expert", "softmax"), "router_func='softmax' is for depths: router='expert' takes sigmoid, tanh"),
            (func != ("token", "tanh"), "router_func='tanh' is for experts: router='token' takes softmax, sigmoid"),
            (self.router == "expert" or self.causality != "aux_router",
             f"causality='aux_router' needs router='expert', not {self.router!r}: the others are causal already"),
        ]  # fmt: skip
        if self.capacity is not None:
            cap, cap_is = self.capacity, name("capacity")
            numbers = all(isinstance(c, (int, float)) and 0 < c <= 1 for c in cap)
            every = self.kv == "share" or self.router == "token"
            rules += [
                (routed, f"{cap_is} needs a router: without one every token runs every recursion"),
                (len(cap) == n, f"{cap_is} must have one entry per recursion: {name('n_recursion')}"),
                (numbers, f"{cap_is} must lie in (0, 1]"),
                (not numbers or list(cap) == sorted(cap, reverse=True),
                 f"{cap_is} must not increase: a recursion chooses among the tokens of the one before"),
                (not every or cap[:1] == (1.0,),
                 f"{cap_is} must begin with 1.0 for kv='share' and for router='token': every token runs recursion 0"),
            ]  # fmt: skip
        return [complaint for holds, complaint in rules if not holds]

    @classmethod
    def preset(cls, name: str, **overrides) -> "MoRConfig":
        """The paper's sizes (Table 6). Unless n_layer is given, it grows to the next depth that n_recursion divides, as
        the paper's does: 360M has 32 layers, and 1 + 8x4 + 1 = 34 with four recursions."""
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} must be one of {', '.join(PRESETS)}")
        return cls.resized(PRESETS[name], overrides)

    @classmethod
    def resized(cls, settings: dict, overrides: dict) -> "MoRConfig":
        """`settings` with `overrides`; n_layer, unless it is among them, grows as `preset` says."""
        unknown = set(overrides) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown configuration fields: {', '.join(sorted(unknown))}")
        settings = settings | overrides
        n = settings.get("n_recursion", 1)
        if "n_layer" not in overrides and isinstance(n, int) and n > 1:
            unshared = 2 if settings.get("sharing", "middle_cycle").startswith("middle") else 0
            settings["n_layer"] = unshared + n * math.ceil((settings["n_layer"] - unshared) / n)
        return cls(**settings)

    @property
    def n_unshared(self) -> int:
        """First and last layer stand outside the recursion in the middle_ sharings."""
        return 2 if self.n_recursion > 1 and self.sharing.startswith("middle") else 0

    @property
    def n_block(self) -> int:
        """L, the layers of the shared block."""
        return (self.n_layer - self.n_unshared) // self.n_recursion

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def capacities(self) -> tuple[float, ...]:
        n = self.n_recursion
        if self.router == "none":
            return (1.0,) * n
        return self.capacity or tuple((n - r) / n for r in range(n))

    @property
    def gate(self) -> tuple[str, float]:
        """The router's function and scale, defaults resolved (paper Tables 4 and 5)."""
        func = self.router_func or ("softmax" if self.router == "token" else "sigmoid")
        return func, self.router_alpha or (1.0 if func == "softmax" else 0.1)

    def cache_slots(self, max_len: int, slack: float) -> list[int]:
        """C_r, the K/V slots per row of each recursion that has a cache of its own."""
        if self.kv == "share":  # recursion 0's, with room for every token
            return [max_len]
        return [min(max_len, _ceil(slack * c * max_len)) for c in self.capacities]

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def _ceil(x: float) -> int:  # 1.25 * (2/3) * 48 is 40, not 40.000000000000004
    return math.ceil(x - 1e-9)


def _floor(x: float) -> int:
    return math.floor(x + 1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# layers


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32, returned in the dtype of the weights: the residual stream stays fp32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.float(), self.eps).to(self.weight.dtype)


def rope_table(config: MoRConfig, device: torch.device | None = None) -> Tensor:
    """Cosines and sines, fp32 [block_size + 1, E], of every position, and of one more: that of a full cache row."""
    half = config.head_dim // 2
    freq = config.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(config.block_size + 1, device=device)[:, None] * freq
    return torch.cat((angle.cos(), angle.sin()), -1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE in Llama's rotate-half convention, on x [B, T, heads, E]; rope is its positions' rows of the table."""
    cos, sin = rope[..., None, :].chunk(2, -1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with x run in: autocast's dtype, where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., D] times weight [n, D] -> [..., n]."""
    if x.numel() == x.size(-1) and x.device.type == "cpu" and torch.compiler.is_compiling():
        # One token: products and sums, which Inductor turns into plain loops over the weights, one kernel with all that
        # happens between them: faster than a call per product, which waits for memory each time. (The sum is in fp32,
        # not the operands: freezing would keep a cast of the weights, twice as large.)
        return (x[..., None, :] * weight).sum(-1, dtype=torch.float32).to(x.dtype)
    return F.linear(x, weight)


def linears(x: Tensor, *layers: nn.Linear) -> Tensor:
    """The outputs of several linear layers on x [B, T, D], side by side: [B, T, sum of their widths]."""
    if x.size(1) == 1:  # one token waits for the weights to be read, which joining them first would do twice
        return torch.cat([linear(x, layer.weight) for layer in layers], -1)
    dtype = matmul_dtype(x)  # cast first: autocast would join them in fp32, and then cast
    return F.linear(x, torch.cat([layer.weight.to(dtype) for layer in layers]))  # one product instead of several


class Layer(nn.Module):
    """One pre-norm Llama layer with both residual additions: grouped-query attention, then SwiGLU."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        D, E, ff = config.d_model, config.head_dim, config.d_ff
        self.heads = config.n_head, config.n_kv_head, E
        self.attn_norm = RMSNorm(D, config.norm_eps)
        self.wq = nn.Linear(D, D, bias=False)
        self.wk = nn.Linear(D, config.n_kv_head * E, bias=False)
        self.wv = nn.Linear(D, config.n_kv_head * E, bias=False)
        self.wo = nn.Linear(D, D, bias=False)
        self.mlp_norm = RMSNorm(D, config.norm_eps)
        self.w_gate = nn.Linear(D, ff, bias=False)
        self.w_up = nn.Linear(D, ff, bias=False)
        self.w_down = nn.Linear(ff, D, bias=False)

    def forward(self, x: Tensor, view: "View", j: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x [B, K, D] -> y [B, K, D] and this layer's keys and values; j is the layer's place in its stack."""
        B, K, _ = x.shape
        H, G, E = self.heads
        h = self.attn_norm(x)
        if view.shared is None:
            qkv = linears(h, self.wq, self.wk, self.wv).view(B, K, H + 2 * G, E)
            q, k = rotate(qkv[:, :, : H + G], view.rope).split((H, G), 2)
            kv = k, qkv[:, :, H + G :]
            if view.cache is not None:
                view.write(j, *kv)
        else:  # recursive KV sharing: recursion 0 projected them once
            q, kv = rotate(linear(h, self.wq.weight).view(B, K, H, E), view.rope), view.shared[j]
        if view.length is not None:
            y = attend_cache(q, *view.read(j), view.length)
        else:
            y = attend(q, *kv, view.mask)
        x = x + linear(y.reshape(B, K, H * E), self.wo.weight)
        gate, up = linears(self.mlp_norm(x), self.w_gate, self.w_up).chunk(2, -1)
        return x + linear(F.silu(gate) * up, self.w_down.weight), kv


# ----------------------------------------------------------------------------------------------------------------------
# attention: every backend is chosen here


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, K, H, E] over k, v [B, S, G, E] -> [B, K, H, E]. mask bool [B, 1, K, S]; None: causal, S = K."""
    if q.device.type == "cpu":
        return attend_on_cpu(q, k, v, mask)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa).transpose(1, 2)


# On CPUs SDPA takes three times as long as these batched matrix products over a few queries at a time, whose scores
# stay in the processor's caches. Custom operators, since inlined into the graph they would double its compile time.


def grouped(x: Tensor, G: int) -> Tensor:
    """[B, T, heads, E] -> [B*G, heads/G * T, E] for heads that share a key head: query t of head i is row i*T + t."""
    B, T, heads, E = x.shape
    return x.view(B, T, G, heads // G, E).permute(0, 2, 3, 1, 4).reshape(B * G, -1, E)


def ungrouped(x: Tensor, B: int, T: int) -> Tensor:
    BG, rows, E = x.shape
    return x.view(B, BG // B, rows // T, T, E).permute(0, 3, 1, 2, 4).reshape(B, T, -1, E).contiguous()


def weight_blocks(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Attention weights, `rows` queries at a time with the keys that they may see: q [B, K, H, E] scaled,
    k [B*G, S, E] -> (which queries, number of keys, these queries [B*G, H/G * rows, E], weights [..., keys])."""
    (B, K, _, _), (BG, S, _), rows = q.shape, k.shape, 64
    end = torch.arange(1, S + 1, device=q.device)  # where the keys end that query i may see, in any row of the batch
    if mask is not None:
        end = (mask[:, 0].byte().amax(0) * end).amax(-1).clamp(min=1)
    for start in range(0, K, rows):
        at = slice(start, min(start + rows, K))
        n, keys = at.stop - start, int(end[at].max())
        queries = grouped(q[:, at], BG // B)
        score = torch.bmm(queries, k[:, :keys].mT)
        by_head = score.view(B, BG // B, -1, n, keys)
        # not -inf: a surplus slot may see nothing, and 0 * nan is not 0
        if mask is None:
            later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            by_head[..., start:].masked_fill_(later, torch.finfo(q.dtype).min)
        else:
            by_head.masked_fill_(~mask[:, :, None, at, :keys], torch.finfo(q.dtype).min)
        yield at, keys, queries, score.softmax(-1)


@torch.library.custom_op("nanomor::attend_on_cpu", mutates_args=())
def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    (B, _, _, E), G, out = q.shape, k.size(2), torch.empty_like(q)
    k, v = grouped(k, G), grouped(v, G)
    for at, keys, _, weight in weight_blocks(q * E**-0.5, k, mask):
        out[:, at] = ungrouped(torch.bmm(weight, v[:, :keys]), B, at.stop - at.start)
    return out


@torch.library.custom_op("nanomor::attend_on_cpu_backward", mutates_args=())
def attend_on_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights are computed again: keeping them would take K * S / 2 numbers a head and layer."""
    (B, S, G, E), dq = k.shape, torch.empty_like(q)
    k, v = grouped(k, G), grouped(v, G)
    exact = torch.promote_types(k.dtype, torch.float32)  # what sums over blocks
    dk, dv = (torch.zeros(k.shape, dtype=exact, device=k.device) for _ in range(2))
    for at, keys, queries, weight in weight_blocks(q * E**-0.5, k, mask):
        dout = grouped(grad[:, at], G)
        dv[:, :keys] += torch.bmm(weight.mT, dout)
        dscore = torch._softmax_backward_data(torch.bmm(dout, v[:, :keys].mT), weight, -1, q.dtype)
        dk[:, :keys] += torch.bmm(dscore.mT, queries)
        dq[:, at] = ungrouped(torch.bmm(dscore, k[:, :keys]) * E**-0.5, B, at.stop - at.start)
    return dq, ungrouped(dk, B, S).to(k.dtype), ungrouped(dv, B, S).to(v.dtype)


@attend_on_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.empty_like(q)


@attend_on_cpu_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


attend_on_cpu.register_autograd(
    lambda ctx, grad: (*attend_on_cpu_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def attend_cache(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """One query per row over the first length[b] slots: q [B, 1, H, E], k and v [B, C, G, E] -> [B, 1, H, E]."""
    if use_flash(q):
        return flash_decode(q, k, v, length)
    (B, _, H, E), (C, G) = q.shape, k.shape[1:3]
    empty = torch.arange(C, device=q.device) >= length[:, None]  # [B, C]
    if not torch.compiler.is_compiling():
        return attend(q, k, v, ~empty[:, None, None, :])
    # Products and sums, so that Inductor fuses reading the cache with the dot product; SDPA works in blocks made for
    # many queries. In eager mode nothing would fuse, and the products are E times the size of the scores.
    q = q.view(B, G, H // G, 1, E).float() * E**-0.5
    keys, values = (t.transpose(1, 2)[:, :, None].float() for t in (k, v))  # [B, G, 1, C, E]
    weight = (q * keys).sum(-1).masked_fill(empty[:, None, None], -math.inf).softmax(-1)  # [B, G, H/G, C]
    return (weight[..., None] * values).sum(3).to(v.dtype).view(B, 1, H, E)


def use_flash(q: Tensor) -> bool:
    """flash-attn decodes on CUDA in half precision, where it is installed."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and find_spec("flash_attn") is not None


@torch.library.custom_op("nanomor::flash_decode", mutates_args=())  # opaque to torch.compile, so fullgraph holds
def flash_decode(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """attend_cache by flash_attn_with_kvcache. q and k come rotated: its own rotary would use compacted positions."""
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(q, k, v, cache_seqlens=length.to(torch.int32), causal=True)


@flash_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    return torch.empty_like(q)


def document_mask(segments: Tensor | None) -> Tensor | None:
    """bool [B, 1, K, K]: causal and within one document, of segments int [B, K]. None stays None: plain causal."""
    if segments is None:
        return None
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril()[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# routers


class Router(nn.Module):
    """Logits, fp32 [B, T, out], from the raw (un-normed) residual stream. "mlp" and "wide_mlp" are both 2D wide, as in
    the released code, whose checkpoints must load."""

    def __init__(self, config: MoRConfig, out: int):
        super().__init__()
        D = config.d_model
        self.net = nn.Linear(D, out, bias=False)
        if config.router_arch != "linear":
            self.net = nn.Sequential(nn.Linear(D, 2 * D, bias=False), nn.GELU(), nn.Linear(2 * D, out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        # fp32 whatever the rest runs in: a rounded logit flips decisions, and the router is a thousandth of the work
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(self.net, nn.Linear):
                return linear(x.float(), self.net.weight.float())
            return linear(F.gelu(linear(x.float(), self.net[0].weight.float())), self.net[2].weight.float())


def route(routers: nn.ModuleList, r: int | Tensor, x: Tensor) -> Tensor:
    """Logits fp32 [B, T] of recursion r's router, r int64 [B] for rows at different depths."""
    if isinstance(r, int):
        return routers[r](x)[..., 0]
    return torch.cat([router(x) for router in routers], -1).gather(-1, r[:, None, None])[..., 0]


def per_recursion(values: list, r: int | Tensor) -> Any:
    """values[r], as a tensor [B, 1] for rows at different depths, r int64 [B]. (A choice among constants: to send them
    to the device would be a host sync, which a CUDA graph cannot hold.)"""
    if isinstance(r, int):
        return values[r]
    chosen = values[0]
    for i, value in enumerate(values[1:], 1):
        chosen = torch.where(r[:, None] == i, value, chosen)
    return chosen


def compact(active: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The first `slots` True entries per row, bool [B, T]: their positions, ascending [B, K], surplus slots T; and what
    undoes it, each token's slot [B, T], K for the others."""
    B, T = active.shape
    slot = torch.where(active, active.cumsum(1) - 1, slots).clamp(max=slots)
    index = torch.full((B, slots + 1), T, device=active.device)
    position = torch.arange(T, device=active.device).expand(B, T)
    # a selected token writes its position to its slot, all others to a bin behind the last
    return index.scatter(1, slot, position)[:, :slots], slot


class Take(torch.autograd.Function):
    """x [B, S, D] at index [B, K] -> [B, K, D], zeros where the index is S. `inverse` [B, S] undoes the index, so the
    gradient is a take as well: no atomic additions, slow on CPUs and in another order each time on GPUs."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return Take.rows(x, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return Take.rows(grad, inverse), None, None

    @staticmethod
    def rows(x: Tensor, index: Tensor) -> Tensor:
        B, S, D = x.shape
        row = index.clamp(max=S - 1)[..., None].expand(-1, -1, D)
        return torch.where((index < S)[..., None], x.gather(1, row), 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# loss


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of x @ weight.T, a chunk of rows at a time, so that logits [B*T, V] never exist. The
    gradients are formed in the forward pass, where the chunk's logits are at hand: nothing is computed twice. (As
    F.linear_cross_entropy does with chunking options, which torch.compile refuses.)"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, rows: int, dtype: torch.dtype, wants_grad: bool):
        w, dx, dw = weight.to(dtype), [], torch.zeros(weight.shape, device=x.device)
        total = torch.zeros((), device=x.device)
        for xc, tc in zip(x.to(dtype).split(rows), target.split(rows), strict=True):
            logits = xc @ w.T
            lse = logits.float().logsumexp(-1)
            keep, tc = tc != -100, tc.clamp(min=0)[:, None]
            total = total + ((lse - logits.gather(1, tc)[:, 0].float()) * keep).sum()
            if wants_grad:
                onehot = torch.arange(w.size(0), device=x.device) == tc
                d = (((logits.float() - lse[:, None]).exp() - onehot.float()) * keep[:, None]).to(dtype)
                dx.append(d @ w)
                dw = dw + (d.T @ xc).float()
        if wants_grad:
            ctx.save_for_backward(torch.cat(dx), dw)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Mean over the targets that are not -100: x [B, T, D], weight [V, D], target [B, T] -> fp32 scalar."""
    x, target = x.flatten(0, 1), target.flatten()
    rows = max(2**23 // weight.size(0), -(-x.size(0) // 16), 1)  # 8M logits at a time; at most 16 chunks are unrolled
    total = LinearCrossEntropy.apply(x, weight, target, rows, matmul_dtype(x), torch.is_grad_enabled())
    return total / (target != -100).sum().clamp(min=1)


# ----------------------------------------------------------------------------------------------------------------------
# cache


class KVCache:
    """Static K/V buffers for `batch` rows: full length for first and last layer, C_r slots for recursion r of each
    block layer (recursion-wise caching, paper Section 2.2.2; kv="share" has recursion 0's only). What a step changes
    is a tensor changed in place. The routing knobs live here, so that prefill and decode cannot disagree about them."""

    def __init__(self, model: "MoR", batch: int, max_len: int, slack: float, knobs: dict):
        c, device, dtype = model.config, model.wte.weight.device, model.wte.weight.dtype
        self.batch, self.max_len, self.slack, self.knobs = batch, max_len, slack, knobs
        self.slots = c.cache_slots(max_len, slack)
        self.start = [sum(self.slots[:r]) for r in range(len(self.slots))]  # where recursion r's slots begin in a row
        length = [sum(self.slots)] * c.n_block
        if c.n_unshared:
            length = [max_len, *length, max_len]

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, device=device, dtype=dtype)

        self.k = [zeros(batch, n, c.n_kv_head, c.head_dim, dtype=dtype) for n in length]
        self.v = [zeros(batch, n, c.n_kv_head, c.head_dim, dtype=dtype) for n in length]
        self.position = zeros(batch)  # tokens seen per row
        self.fill = zeros(len(self.slots), batch)  # slots used per recursion and row; kv="share": `position` is
        self.overflow = zeros(batch)  # tokens stopped early for want of a slot
        self.depth = zeros(batch, max_len)  # recursions that each token of the prompt ran
        self.short = zeros(dtype=torch.bool)  # a tight prefill wanted to compute more tokens than it could

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value buffers."""
        return sum(t.nbytes for t in (*self.k, *self.v))


@dataclass
class View:
    """What a stack of layers sees besides its tokens: rotation, mask, and its window on the cache."""

    rope: Tensor  # [B, K, E] fp32: rows of rope_table at the tokens' original positions
    mask: Tensor | None = None  # [B, 1, K, S] bool; None: causal among the K tokens
    shared: list | None = None  # per layer (k, v) of recursion 0 to use instead of projecting
    cache: KVCache | None = None
    layer: int = 0  # the stack's first layer in cache.k
    start: int | Tensor = 0  # the window: slots [start, start + slots); [B, 1] for rows at different depths
    slots: int = 0
    row: Any = ...  # [B] cache rows; ...: all, in order
    slot: Tensor | None = None  # [B] where in the window the decoded token goes
    live: Tensor | None = None  # [B] bool: rows that write
    length: Tensor | None = None  # [B] slots the decoded token attends to; None unless decoding

    def write(self, j: int, k: Tensor, v: Tensor) -> None:
        for buffer, new in ((self.cache.k[self.layer + j], k), (self.cache.v[self.layer + j], v)):
            if self.length is None:  # a fresh row: token i of the compacted prompt takes slot i, unread beyond `fill`
                buffer[:, self.start : self.start + k.size(1)] = new
            else:
                row = torch.arange(k.size(0), device=k.device) if self.row is ... else self.row
                slot = self.slot + (self.start if isinstance(self.start, int) else self.start[:, 0])
                buffer[row, slot] = torch.where(self.live[:, None, None], new[:, 0], buffer[row, slot])

    def read(self, j: int) -> tuple[Tensor, Tensor]:
        """Keys and values in the window, [B, slots, G, E]."""
        buffers = self.cache.k[self.layer + j], self.cache.v[self.layer + j]
        if self.row is ...:
            return tuple(t[:, self.start : self.start + self.slots] for t in buffers)
        # Every window is a view, so one index per row finds it, which the compiler fuses into the attention that reads
        # it; an index per slot would cost as much as the attention. (flash-attn gets a copy.) A window may end in the
        # next row, behind `length`, so rows at different depths need one more behind them.
        first = self.row * buffers[0].size(1) + (self.start if isinstance(self.start, int) else self.start[:, 0])
        return tuple(t.flatten(0, 1).unfold(0, self.slots, 1).permute(0, 3, 1, 2)[first] for t in buffers)


# ----------------------------------------------------------------------------------------------------------------------
# the model


class Output(NamedTuple):
    logits: Tensor | None  # [B, T, V]; None in training when targets are given
    loss: Tensor | None  # lm + weighted router losses
    losses: dict[str, Tensor]  # detached and unweighted: "lm" and, where they apply, "aux", "balance", "z"
    depth: Tensor  # [B, T] int: recursions each token ran
    router: Tensor | None  # [B, T, N] fp32, detached: logits of the router that decides at inference


@dataclass
class Pass:
    """How one pass through the model routes: the only difference between training, evaluation, prefill and decoding."""

    position: Tensor  # [B, T] or [1, T] original positions
    valid: Tensor | None = None  # [B, T] bool: not padding; None: all
    topk: bool = False  # expert choice by top-k, which sees the future; else by the causal threshold
    limited: bool = False  # token choice has fixed slots (training)
    capacity: Tensor | None = None  # [N] of this step, while capacity warm-up lasts
    segments: Tensor | None = None  # [B, T] document of each token
    threshold: float = 0.0  # logit from which a token goes on
    max_depth: int = 1
    cache: KVCache | None = None
    row: Any = ...  # [B] cache rows of this batch when it decodes some of them; ...: all, in order
    tight: bool = False  # prefill: compute only as many tokens as routing is expected to admit
    decoding: bool = False


class State(NamedTuple):
    """What flows from recursion to recursion."""

    x: Tensor  # [B, T, D] fp32 residual stream
    active: Tensor  # [B, T] bool: the tokens that run the next recursion
    depth: Tensor  # [B, T] int: recursions run, the next one included
    gate: Tensor | None = None  # expert: [B, T] gate of the next recursion; token: [B, T, N] gate of each depth
    choice: Tensor | None = None  # token: [B, T] depth chosen, 1..N
    entry: Tensor | None = None  # token: [B, T, D] input of the first recursion (H1)
    shared: list | None = None  # kv="share": recursion 0's (k, v) per block layer
    logits: tuple = ()  # of the deciding router
    aux: Tensor | float = 0.0  # router losses so far
    z: Tensor | float = 0.0
    balance: Tensor | float = 0.0


class MoR(nn.Module):
    """A vanilla, recursive or Mixture-of-Recursions language model: one class, one forward.

    `checkpoint_recursions = True` recomputes each recursion in the backward pass instead of keeping its activations."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        c = self.config = config
        self.checkpoint_recursions = False
        self.wte = nn.Embedding(c.vocab_size, c.d_model)
        self.first = Layer(c) if c.n_unshared else None
        self.block = nn.ModuleList(Layer(c) for _ in range(c.n_block))
        self.last = Layer(c) if c.n_unshared else None
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.lm_head = None if c.tie_embeddings else nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.router == "expert":
            self.routers = nn.ModuleList(Router(c, 1) for _ in range(c.n_recursion))
            if c.causality == "aux_router":
                self.aux_routers = nn.ModuleList(Router(c, 1) for _ in range(c.n_recursion))
        if c.router == "token":
            self.router = Router(c, c.n_recursion)
            if c.balance == "bias":
                self.register_buffer("balance_bias", torch.zeros(c.n_recursion))
        # a table, since computing it in the kernels that use it takes five times as long as the rotation itself
        self.register_buffer("rope", rope_table(c), persistent=False)
        for p in self.parameters():  # all initialisation: matrices N(0, 0.02) as in Llama and the paper's code, norms 1
            nn.init.normal_(p, std=0.02) if p.dim() == 2 else nn.init.ones_(p)

    def _apply(self, fn, recurse=True):
        """Moves and casts the model, but the table of RoPE stays fp32."""
        super()._apply(fn, recurse)
        self.rope = rope_table(self.config, self.wte.weight.device)
        return self

    # ---- routing: decide, then compact -> block -> scatter

    def decide(self, r: int | Tensor, s: State, p: Pass) -> State:
        """Which tokens run recursion r: sets `active` (a subset of what ran r-1), the gate, and the router losses.
        Decoding takes r > 0 int64 [B] too: rows at different depths in one batch, as the serving engine has them."""
        c, T, cache = self.config, s.x.size(1), p.cache
        candidates = active = s.active
        if c.router == "expert":
            logit = route(self.routers, r, s.x)
            func, alpha = c.gate
            gate = alpha * (logit.tanh() if func == "tanh" else logit.sigmoid())
            # an auxiliary router only learns to imitate: it must not shape what it reads, and the main one's gate stays
            decider = route(self.aux_routers, r, s.x.detach()) if c.causality == "aux_router" else logit
            taken = per_recursion([capacity == 1.0 for capacity in c.capacities], r)  # every candidate
            if taken is True:
                pass
            elif p.topk:
                # ranked by logit, not by gate: the same order, without the ties of a saturated sigmoid
                best = logit.masked_fill(~candidates, -math.inf).topk(self.slots(r, T, p)).indices
                k = T if p.capacity is None else (p.capacity[r] * T + 1e-4).floor().clamp(min=1)
                first = (torch.arange(best.size(1), device=best.device) < k).expand_as(best)
                active = torch.zeros_like(candidates).scatter(1, best, first)
            else:
                active = candidates & (taken | (decider >= p.threshold))
            s = s._replace(gate=gate, logits=(*s.logits, decider.detach()))
            if p.topk:
                share = candidates / candidates.sum()
                bce = F.binary_cross_entropy_with_logits(decider, active.float(), reduction="none")
                s = s._replace(aux=s.aux + (bce * share).sum(), z=s.z + (logit.square() * share).sum())
        elif c.router == "token":
            if s.choice is None:
                logit = self.router(s.x)
                func, alpha = c.gate
                gate = alpha * (logit.sigmoid() if func == "sigmoid" else logit.softmax(-1))
                choice = (gate + self.balance_bias.float() if c.balance == "bias" else gate).argmax(-1) + 1
                depths = torch.arange(1, c.n_recursion + 1, device=choice.device)
                share = (choice[..., None] == depths).float().mean((0, 1))
                balance = c.n_recursion * (gate.mean((0, 1)) * share).sum()
                s = s._replace(gate=gate, choice=choice, entry=s.x, logits=(logit.detach(),))
                s = s._replace(balance=balance, z=logit.logsumexp(-1).square().mean())
            active = candidates & (s.choice > (r if isinstance(r, int) else r[:, None]))
            if p.limited:  # slots go in position order: which token is dropped does not depend on later ones
                active = active & (active.cumsum(1) <= self.slots(r, T, p))
        if cache is not None and c.kv == "recursion":  # shared K/V have room for every token
            used = cache.fill[r, p.row][:, None] + 1 if p.decoding else active.cumsum(1)
            fits = active & (used <= per_recursion(cache.slots, r))
            cache.overflow[p.row] += (active & ~fits).sum(1)
            active = fits
        if p.tight:
            cache.short.logical_or_((active.sum(1) > self.slots(r, T, p)).any())
        return s._replace(active=active, depth=s.depth + active)

    def slots(self, r: int, T: int, p: Pass) -> int:
        """K, how many of T tokens per row recursion r computes: a constant of the configuration."""
        c = self.config
        if c.router == "expert" and p.topk and p.capacity is None:
            return max(1, _floor(c.capacities[r] * T))
        if c.router == "token" and p.limited:
            return min(T, _ceil(c.capacity_slack * c.capacities[r] * T))
        if p.tight:
            T = min(T, _ceil(p.cache.slack * c.capacities[r] * T))
        return min(T, p.cache.slots[r]) if p.cache is not None and r < len(p.cache.slots) else T

    def everyone(self, r: int, p: Pass) -> bool:
        """Whether every token is sure to run recursion r."""
        c, room = self.config, p.cache is None or self.config.kv == "share" or p.cache.slots[r] == p.cache.max_len
        return c.capacities[r] == 1.0 and p.capacity is None and room and (r == 0 or c.router != "token")

    def recurse(self, r: int | Tensor, s: State, p: Pass) -> State:
        """Runs recursion r on the active tokens (compact, block, scatter), then decides recursion r + 1."""
        c, (B, T) = self.config, s.active.shape
        h, position, segments = s.x, p.position, p.segments
        whole = T == 1 or self.everyone(r, p)  # nothing to compact
        if not whole:
            # real tokens come first, so causal attention among the K never reaches padding
            index, slot = compact(s.active, self.slots(r, T, p))  # [B, K], [B, T]
            h, row = Take.apply(s.x, index, slot), index.clamp(max=T - 1)  # [B, K, D]
            position = position.expand(B, T).gather(1, row)
            segments = None if segments is None else segments.gather(1, row)
        view = self.block_view(r, position, segments, s, p)
        if self.checkpoint_recursions and torch.is_grad_enabled():
            y, kv = checkpoint(self.run_block, r, h, view, use_reentrant=False)
        else:
            y, kv = self.run_block(r, h, view)
        if not whole:
            y = Take.apply(y, slot, index)  # [B, T, D]
        # expert choice adds the gated output; token choice replaces the state and gates once, when the token leaves
        if c.router == "expert":
            x = s.x + (s.gate * s.active)[..., None] * y
        elif whole and T > 1:
            x = y
        else:
            x = torch.where(s.active[..., None], y, s.x)
        if p.cache is not None and c.kv == "recursion":
            p.cache.fill[r, p.row] = s.active.sum(1) + (p.cache.fill[r, p.row] if p.decoding else 0)
        if c.kv == "share" and not p.decoding and r == 0:
            s = s._replace(shared=kv)
        s = s._replace(x=x)
        if isinstance(r, int):
            return self.decide(r + 1, s, p) if r + 1 < p.max_depth else s
        s = s._replace(active=s.active & (r + 1 < p.max_depth)[:, None])
        return self.decide((r + 1).clamp(max=c.n_recursion - 1), s, p)

    def run_block(self, r: int, h: Tensor, view: View) -> tuple[Tensor, list]:
        """The shared layers: h [B, K, D] -> y [B, K, D] and each layer's (k, v)."""
        c, kv = self.config, []
        for j in range(c.n_block):
            layer = self.block[(r * c.n_block + j) // c.n_recursion if "sequence" in c.sharing else j]
            h, layer_kv = layer(h, view, j)
            kv.append(layer_kv)
        return h, kv

    def block_view(self, r: int | Tensor, position: Tensor, segments: Tensor | None, s: State, p: Pass) -> View:
        """What recursion r attends to: the tokens that run it, or with kv="share" all, through recursion 0's K/V."""
        c, cache = self.config, p.cache
        view = View(self.rope[position], layer=1 if c.n_unshared else 0, cache=cache, row=p.row)
        reuse = c.kv == "share" and isinstance(r, int) and r > 0
        if p.decoding and c.kv == "share":
            view.slots, view.slot, view.length = cache.max_len, position[:, 0] % cache.max_len, position[:, 0] + 1
            view.live = s.active[:, 0] & (r == 0)
            view.shared = [None] * c.n_block if reuse else None  # later recursions find them in the cache
        elif p.decoding:
            used, slots = cache.fill[r, p.row], per_recursion(cache.slots, r)
            view.start = per_recursion(cache.start, r)
            view.slots = slots if isinstance(r, int) else max(cache.slots[1:])  # r > 0: recursion 0 is never among them
            view.live, view.slot = s.active[:, 0], used % (slots if isinstance(r, int) else slots[:, 0])
            view.length = (used + view.live).clamp(min=1)  # no softmax over nothing, in rows nobody reads
        elif reuse:
            view.mask, view.shared = position[:, None, :, None] >= p.position[:, None, None, :], s.shared
            if segments is not None:
                view.mask = view.mask & (segments[:, None, :, None] == p.segments[:, None, None, :])
        else:
            view.mask, view.start = document_mask(segments), cache.start[r] if cache is not None else 0
        return view

    def outer_view(self, layer: int, p: Pass) -> View:
        """What the first and the last layer attend to: every token."""
        view = View(self.rope[p.position], document_mask(p.segments), None, p.cache, layer, row=p.row)
        if p.decoding:
            view.slots, position = p.cache.max_len, p.position[:, 0]
            view.slot, view.live, view.length = position % view.slots, p.valid[:, 0], position + 1
        return view

    # A pass is enter, recurse for r = 0, 1, ..., leave. Whole-model paths run all in one graph; early-exit decoding and
    # the serving engine compile the stages apart and look between them which rows go on.

    def enter(self, idx: Tensor, p: Pass) -> State:
        """Embedding, first layer, first decision: idx int64 [B, T] -> State before recursion 0."""
        x = self.wte(idx).float()
        if self.first is not None:
            x, _ = self.first(x, self.outer_view(0, p))
        active = torch.ones(idx.shape, dtype=torch.bool, device=idx.device) if p.valid is None else p.valid
        return self.decide(0, State(x, active, torch.zeros_like(active, dtype=torch.long)), p)

    def leave(self, s: State, p: Pass) -> Tensor:
        """Token choice's gate, last layer, final norm: State -> [B, T, D]."""
        x = s.x
        if self.config.router == "token":  # H1 + p_d H_d, d the depth that ran (the released code's reading of eq. 2.2)
            gate = s.gate.gather(-1, (s.depth - 1).clamp(min=0)[..., None])
            x = s.entry + torch.where(s.depth[..., None] > 0, gate, 0.0) * x
        if self.last is not None:
            x, _ = self.last(x, self.outer_view(self.config.n_block + 1, p))
        return self.norm(x)

    def backbone(self, idx: Tensor, p: Pass) -> tuple[Tensor, State]:
        """idx [B, T] -> normed stream [B, T, D] and the final State."""
        s = self.enter(idx, p)
        for r in range(p.max_depth):
            s = self.recurse(r, s, p)
        return self.leave(s, p), s

    def head(self, h: Tensor) -> Tensor:
        """Logits fp32 [..., V] of the normed stream."""
        return linear(h, self.head_weight).float()

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
        return_logits: bool | None = None,
        capacity: Tensor | None = None,
        segments: Tensor | None = None,
        threshold: float = 0.5,
        max_depth: int | None = None,
    ) -> Output:
        """idx, targets int64 [B, T] (targets already shifted, -100 ignored) -> Output. Raises ValueError.

        routing: "topk" (expert choice over the whole sequence), "causal" (as at inference); None: topk in training
            mode, causal in eval mode.
        return_logits: None gives them except in training with targets, where they are never whole in memory.
        capacity: fp32 [N], this step's capacities during capacity warm-up. Slots are then T and the tensor says how
            many are used: a whole schedule costs one extra graph, and full-size recursions while it lasts.
        segments: int [B, T], document of each token; attention never crosses documents.
        threshold, max_depth: causal routing; probability from which expert choice goes on, bound on recursions."""
        T = idx.size(1)
        if not 1 <= T <= self.config.block_size:
            raise ValueError(f"{T} tokens do not fit block_size={self.config.block_size}: shorten the input")
        routing = routing or ("topk" if self.training else "causal")
        if routing not in ("topk", "causal"):
            raise ValueError(f"routing={routing!r} must be 'topk', 'causal' or None")
        p = Pass(
            torch.arange(T, device=idx.device)[None], topk=routing == "topk", limited=self.training, capacity=capacity,
            segments=segments, **self.routing_knobs(routing, threshold, max_depth),
        )  # fmt: skip
        h, s = self.backbone(idx, p)
        if return_logits is None:
            return_logits = targets is None or not self.training
        logits = self.head(h) if return_logits else None
        loss, losses = self.losses(h, logits, targets, s, p) if targets is not None else (None, {})
        router = None
        if s.logits:
            router = s.logits[0] if self.config.router == "token" else torch.stack(s.logits, -1)
        return Output(logits, loss, losses, s.depth, router)

    def losses(self, h: Tensor, logits: Tensor | None, targets: Tensor, s: State, p: Pass) -> tuple[Tensor, dict]:
        """Weighted sum, and the unweighted detached terms (reference: paper Sections 2.2.1 and 4.2)."""
        c = self.config
        if logits is None:
            lm = linear_cross_entropy(h, self.head_weight, targets)
        else:
            total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            lm = total / (targets != -100).sum().clamp(min=1)
        terms = {"lm": (1.0, lm)}
        if c.router == "expert" and p.topk and c.causality != "none":
            terms["aux"] = (c.aux_coef, s.aux)
        if c.router == "token" and c.balance == "loss":
            terms["balance"] = (c.balance_coef, s.balance)
        if c.z_coef and (c.router == "token" or (c.router == "expert" and p.topk)):
            terms["z"] = (c.z_coef, s.z)
        return sum(w * t for w, t in terms.values()), {name: t.detach() for name, (_, t) in terms.items()}

    def routing_knobs(self, routing: str, threshold: float, max_depth: int | None) -> dict[str, float]:
        """Checks the test-time knobs; the threshold becomes a logit, max_depth a number of recursions."""
        c = self.config
        if routing == "causal" and c.router == "expert" and c.causality == "none":
            raise ValueError(
                "causal routing is undefined for expert choice trained with causality='none': its router never learned"
                " to decide without the future; use routing='topk', or train with causality='aux_loss'"
            )
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} must lie strictly between 0 and 1")
        if threshold != 0.5 and c.router != "expert":
            raise ValueError(f"threshold={threshold} needs router='expert', not {c.router!r}: no other compares it")
        if max_depth is not None and not 1 <= max_depth <= c.n_recursion:
            raise ValueError(f"max_depth={max_depth} must lie in 1..n_recursion={c.n_recursion}")
        if max_depth not in (None, c.n_recursion) and "sequence" in c.sharing:
            raise ValueError(f"max_depth={max_depth} needs sharing='cycle' or 'middle_cycle', not {c.sharing!r}")
        return {"threshold": math.log(threshold / (1 - threshold)), "max_depth": max_depth or c.n_recursion}

    @torch.no_grad()
    def update_balance_bias(self, counts: Tensor, rate: float = 1e-3) -> None:
        """Loss-free balancing, after an optimizer step: counts [N], tokens that chose each depth, summed over ranks."""
        self.balance_bias += rate * (counts.float().mean() - counts.float()).sign()

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
        """Static cache for `batch_size` rows of up to max_len tokens, in the dtype and on the device of the weights.

        Recursion r has ceil(slack * capacity_r * max_len) slots a row; slack None: config.capacity_slack. A token
        whose row has no slot left at some recursion stops there and is counted in cache.overflow [B].
        Raises ValueError."""
        slack = self.config.capacity_slack if slack is None else slack
        knobs = self.routing_knobs("causal", threshold, max_depth)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be positive")
        if not 1 <= max_len <= self.config.block_size:
            raise ValueError(f"max_len={max_len} must lie in 1..block_size={self.config.block_size}")
        if not 0 < slack < math.inf:
            raise ValueError(f"slack={slack} must be a finite number > 0")
        return KVCache(self, batch_size, max_len, slack, knobs)

    @torch.no_grad()
    def prefill(self, idx: Tensor, lengths: Tensor, cache: KVCache, tight: bool = False) -> Tensor:
        """Starts every row afresh with a right-padded prompt: idx int64 [B, P], lengths int64 [B] in 1..P -> logits
        fp32 [B, V] at each row's last token. Recursion r computes min(P, C_r) tokens per row.

        tight=True computes only ceil(slack * capacity_r * P), what routing should admit in a prompt of this length.
        If a row wanted more, cache.short is set, the result is void, and the caller runs prefill again without it."""
        B, P = idx.shape
        if B != cache.batch or P > cache.max_len:
            raise ValueError(f"prompts [{B}, {P}] do not fit {cache.batch} rows of {cache.max_len} tokens")
        position = torch.arange(P, device=idx.device)[None]
        p = Pass(position, position < lengths[:, None], cache=cache, tight=tight, **cache.knobs)
        cache.overflow.zero_()
        cache.short.zero_()
        h, s = self.backbone(idx, p)
        cache.depth[:, :P] = s.depth
        cache.position.copy_(lengths)
        return self.head(h[torch.arange(B, device=idx.device), lengths - 1])

    @torch.no_grad()
    def decode(self, token: Tensor, cache: KVCache) -> Tensor:
        """Appends one token per row: int64 [B] -> logits fp32 [B, V]. A row given -1, or full, is idle: it writes
        nothing and its logits mean nothing. One graph, no host sync; every recursion is computed, and masked."""
        p = self.decode_pass(token, cache)
        s = self.decode_enter(token, p)
        for r in range(p.max_depth):  # an early-exit loop, with compiled stages, ends when not s.active.any()
            s = self.recurse(r, s, p)
        return self.decode_leave(s, p)

    def decode_pass(self, token: Tensor, cache: KVCache) -> Pass:
        if token.shape != (cache.batch,):
            raise ValueError(f"token {tuple(token.shape)} must be one per row of the cache: ({cache.batch},)")
        live = (token >= 0) & (cache.position < cache.max_len)
        return Pass(cache.position[:, None].clone(), live[:, None], cache=cache, decoding=True, **cache.knobs)

    def decode_enter(self, token: Tensor, p: Pass) -> State:
        return self.enter(token[:, None].clamp(min=0), p)

    def decode_leave(self, s: State, p: Pass) -> Tensor:
        logits = self.head(self.leave(s, p)[:, 0])
        p.cache.position[p.row] += p.valid[:, 0]
        return logits

    # ---- cost accounting

    def num_params(self, embedding: bool = False) -> int:
        """Parameters; without embedding and head unless asked, as the paper counts them (Table 6)."""
        total = sum(p.numel() for p in self.parameters())
        return total if embedding else total - sum(w.numel() for w in {self.wte.weight, self.head_weight})

    def flops_per_token(self, T: int, head: bool = False, fractions: Sequence[float] | None = None) -> float:
        """Forward FLOPs per token of a sequence of T, by the paper's convention: 2 per weight, the causal half of
        attention, no embedding, head on request. Exact for the k of T tokens that capacity admits: weights cost k/T,
        attention (k/T)^2, or k/T with kv="share", whose later recursions have no K/V projections. `fractions`: k/T per
        recursion as routing took them, instead of what capacity admits."""
        c = self.config
        kv = 2 * 2 * c.d_model * c.n_kv_head * c.head_dim  # both projections
        weights = 2 * (2 * c.d_model**2 + 3 * c.d_model * c.d_ff) + kv
        attention = 2 * T * c.d_model  # 2 matmuls x 2 FLOPs x T/2 keys x D
        total = c.n_unshared * (weights + attention)
        for r, capacity in enumerate(c.capacities):
            f = max(1, _floor(capacity * T)) / T if c.router == "expert" else capacity
            f = f if fractions is None else fractions[r]
            reuse = c.kv == "share" and r > 0
            total += c.n_block * f * (weights - kv + attention if reuse else weights + f * attention)
        return total + (2 * c.d_model * c.vocab_size if head else 0)

    def kv_bytes(self, batch: int, T: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values for `batch` rows of T tokens, as make_cache(batch, T, slack=1) has them."""
        c = self.config
        slots = c.n_unshared * T + c.n_block * sum(c.cache_slots(T, 1.0))
        return 2 * batch * slots * c.n_kv_head * c.head_dim * dtype.itemsize

    # ---- weights of others (checkpoint.py reads them)

    def load_reference_state_dict(self, sd: Mapping[str, Tensor]) -> None:
        """Loads weights in the authors' layout: checkpoint.load_reference_state_dict."""
        from checkpoint import load_reference_state_dict

        load_reference_state_dict(self, sd)

    @classmethod
    def from_pretrained(cls, path, init: str = "stepwise", **overrides) -> "MoR":
        """Returns the model in a directory: checkpoint.from_pretrained."""
        from checkpoint import from_pretrained

        return from_pretrained(path, init, **overrides)
