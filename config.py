"""The settings of a model: presets, fields, and what is wrong with those that a user gave.

config = MoRConfig.preset("360M", n_recursion=3, router="expert")
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

PRESETS = {  # paper Table 6; "nano" is ours, for a laptop
    "nano": dict(vocab_size=8192, block_size=256, n_layer=8, n_head=4, n_kv_head=2, d_model=256, d_ff=768),
    "135M": dict(vocab_size=49152, block_size=2048, n_layer=30, n_head=9, n_kv_head=3, d_model=576, d_ff=1536),
    "360M": dict(vocab_size=49152, block_size=2048, n_layer=32, n_head=15, n_kv_head=5, d_model=960, d_ff=2560),
    "730M": dict(vocab_size=49152, block_size=2048, n_layer=26, n_head=24, n_kv_head=8, d_model=1536, d_ff=4096),
    "1.7B": dict(vocab_size=49152, block_size=2048, n_layer=24, n_head=32, n_kv_head=32, d_model=2048, d_ff=8192),
}
CHOICES = {
    "sharing": ("middle_cycle", "cycle", "sequence", "middle_sequence"),
    "router": ("none", "expert", "token", "random", "position"),
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
    sharing: str = "middle_cycle"  # which unrolled layers are the same weights (paper Table 5)
    router: str = "none"  # expert: recursions choose tokens; token: tokens choose depths; random, position: controls
    kv: str = "recursion"  # recursion: a depth caches the tokens that run it; share: all read recursion 0's K/V
    capacity: tuple[float, ...] | None = None  # fraction of the full sequence that runs recursion r; None: (N-r)/N
    router_arch: str = "linear"
    router_func: str | None = None  # None: softmax for token choice, sigmoid for the others
    router_alpha: float | None = None  # gate scale; None: 0.1 for sigmoid and tanh, 1.0 for softmax
    causality: str = "aux_loss"  # what makes expert choice decidable without the future
    aux_coef: float = 1e-3
    balance: str = "loss"  # token choice: balancing loss, loss-free bias, or nothing
    balance_coef: float = 0.1
    z_coef: float = 0.0  # router z-loss
    capacity_slack: float = 1.25  # training slots of depths that tokens choose, and cache slots, relative to capacity
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False  # queries and keys of unit RMS (a Llama has none)

    def __post_init__(self):
        if isinstance(self.capacity, list):  # JSON has no tuples
            self.capacity = tuple(self.capacity)
        elif isinstance(self.capacity, (int, float)):
            self.capacity = (self.capacity,)
        problems = value_problems(self) or rule_problems(self)  # the rules compute with the values
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def preset(cls, name: str, **overrides) -> "MoRConfig":
        """Returns one of the paper's sizes (Table 6). Unless n_layer is given, it grows to the next depth that
        n_recursion divides, as the paper's does: 360M has 32 layers, and 1 + 8x4 + 1 = 34 with four recursions."""
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} must be one of {', '.join(PRESETS)}")
        return cls.resized(PRESETS[name], overrides)

    @classmethod
    def resized(cls, settings: dict, overrides: dict) -> "MoRConfig":
        """Returns `settings` with `overrides`; n_layer, unless it is among them, grows as `preset` says."""
        unknown = set(overrides) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown configuration fields: {', '.join(sorted(unknown))}")
        settings = settings | overrides
        n = settings.get("n_recursion", 1)
        if "n_layer" not in overrides and isinstance(n, int) and n > 1:
            unshared = 2 if str(settings.get("sharing", "middle_cycle")).startswith("middle") else 0
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
    def gated(self) -> bool:
        """Whether every recursion has a router of its own, whose gate scales what the recursion adds."""
        return self.router in ("expert", "random", "position")

    @property
    def own_kv(self) -> bool:
        """Whether every recursion keeps keys and values of its own; else all read those of recursion 0."""
        return self.kv == "recursion"

    @property
    def prefills_once(self) -> bool:
        """Whether a prompt's tokens but the last need recursion 0 alone: no later recursion and no last layer keeps
        anything of them."""
        return self.n_recursion > 1 and not (self.own_kv or self.n_unshared)

    @property
    def capacities(self) -> tuple[float, ...]:
        n = self.n_recursion
        if self.router == "none":
            return (1.0,) * n
        return self.capacity or tuple((n - r) / n for r in range(n))

    @property
    def takes_all(self) -> list[bool]:
        """Per recursion, whether every candidate runs it whatever its router says."""
        return [f == 1.0 and (r == 0 or self.router != "token") for r, f in enumerate(self.capacities)]

    @property
    def gate(self) -> tuple[str, float]:
        """The router's function and scale, defaults resolved (paper Tables 13 and 14)."""
        func = self.router_func or ("softmax" if self.router == "token" else "sigmoid")
        return func, self.router_alpha or (1.0 if func == "softmax" else 0.1)

    def slots(self, r: int, length: int, slack: float) -> int:
        """Returns the slots that `length` tokens have at recursion r: ceil(slack * capacity * length), or length."""
        wanted = slack * self.capacities[r] * length
        return length if wanted >= length else round_up(wanted)

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def round_up(x: float) -> int:
    return math.ceil(x - 1e-9)  # 1.25 * (2/3) * 48 is 40, not 40.000000000000004


def round_down(x: float) -> int:
    return math.floor(x + 1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# checks of what a user gave


def check_forward(config: MoRConfig, T: int, routing: str, targets: Any, labels: Any) -> None:
    if not 1 <= T <= config.block_size:
        raise ValueError(f"{T} tokens: a sequence must have 1 to block_size={config.block_size}")
    if routing not in ("topk", "causal"):
        raise ValueError(f"routing={routing!r} must be 'topk', 'causal' or None")
    if targets is not None and labels is not None:
        raise ValueError("give targets (already shifted) or labels (shifted here), not both")


def check_cache(config: MoRConfig, batch_size: int, max_len: int, slack: float) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive")
    if not 1 <= max_len <= config.block_size:
        raise ValueError(f"max_len={max_len} must lie in 1..block_size={config.block_size}")
    if not 0 < slack < math.inf:
        raise ValueError(f"slack={slack} must be a finite number > 0")


def check_prompts(rows: int, length: int, batch: int, max_len: int) -> None:
    if rows != batch or length > max_len:
        raise ValueError(f"prompts [{rows}, {length}] do not fit {batch} rows of {max_len} tokens")


def check_routing(config: MoRConfig, routing: str, threshold: float, max_depth: int | None) -> tuple[float, int]:
    """Returns the threshold as a logit, and max_depth as a number of recursions."""
    c = config
    if routing == "causal" and c.router == "expert" and c.causality == "none":
        raise ValueError(
            "causal routing is undefined for expert choice trained with causality='none': its router never learned to"
            " decide without the future; use routing='topk', or train with causality='aux_loss'"
        )
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} must lie strictly between 0 and 1")
    if threshold != 0.5 and c.router != "expert":
        raise ValueError(f"threshold={threshold} needs router='expert', not {c.router!r}: no other compares it")
    if max_depth is not None and not 1 <= max_depth <= c.n_recursion:
        raise ValueError(f"max_depth={max_depth} must lie in 1..n_recursion={c.n_recursion}")
    if max_depth not in (None, c.n_recursion) and "sequence" in c.sharing:
        raise ValueError(f"max_depth={max_depth} needs sharing='cycle' or 'middle_cycle', not {c.sharing!r}")
    return math.log(threshold / (1 - threshold)), max_depth or c.n_recursion


def value_problems(c: MoRConfig) -> list[str]:
    """Returns what is wrong with single values."""

    def positive(value: Any, *kinds: type) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf

    bad = []
    for name in "vocab_size block_size n_layer n_head n_kv_head d_model d_ff n_recursion".split():
        if not positive(getattr(c, name), int):
            bad.append(f"{said(c, name)} must be a positive integer")
    for name in "rope_theta norm_eps capacity_slack router_alpha".split():
        unset = name == "router_alpha" and c.router_alpha is None
        if not unset and not positive(getattr(c, name), int, float):
            bad.append(f"{said(c, name)} must be a finite number > 0")
    for name in "aux_coef balance_coef z_coef".split():
        if getattr(c, name) != 0 and not positive(getattr(c, name), int, float):
            bad.append(f"{said(c, name)} must be a finite number >= 0")
    for name, choices in CHOICES.items():
        if getattr(c, name) not in choices:
            bad.append(f"{said(c, name)} must be one of {', '.join(map(str, choices))}")
    return bad


def rule_problems(c: MoRConfig) -> list[str]:
    """Returns which values do not go together."""
    n, inner, routed = c.n_recursion, c.n_layer - c.n_unshared, c.router != "none"
    fitting = c.n_unshared + n * max(1, math.ceil(inner / n))
    cyclic = "sequence" not in c.sharing
    bad = []

    def require(holds: bool, complaint: str) -> None:
        if not holds:
            bad.append(complaint)

    require(c.capacity_slack >= 1, f"{said(c, 'capacity_slack')} must be >= 1: fewer slots than capacity drop tokens")
    require(
        c.d_model % (2 * c.n_head) == 0,
        f"{said(c, 'd_model')} must be {said(c, 'n_head')} times an even head width: RoPE rotates pairs",
    )
    require(c.n_head % c.n_kv_head == 0, f"{said(c, 'n_head')} must be a multiple of {said(c, 'n_kv_head')}")
    require(
        inner >= n and inner % n == 0,
        f"{said(c, 'n_layer')} minus {c.n_unshared} unshared layers must be a positive multiple of n_recursion={n}"
        f" for {said(c, 'sharing')}: use n_layer={fitting}",
    )
    if n == 1:
        require(not routed, f"{said(c, 'router')} has nothing to route: use n_recursion>=2 or router='none'")
        require(c.own_kv, "kv='share' needs n_recursion>=2: no later recursion would reuse the K/V")
    if not cyclic:
        need = f"needs sharing='cycle' or 'middle_cycle', not {c.sharing!r}"
        require(not routed, f"{said(c, 'router')} {need}")
        require(c.own_kv, f"kv='share' {need}")
    if c.router == "token":
        require(c.router_func != "tanh", "router_func='tanh' is for experts: router='token' takes softmax, sigmoid")
    else:
        func = "router_func='softmax' is for depths: router='expert' takes sigmoid, tanh"
        require(not routed or c.router_func != "softmax", func)
    require(
        c.router == "expert" or c.causality != "aux_router",
        f"causality='aux_router' needs router='expert', not {c.router!r}: the others are causal already",
    )

    if c.capacity is not None:
        is_so = said(c, "capacity")
        numbers = all(isinstance(x, (int, float)) and 0 < x <= 1 for x in c.capacity)
        require(routed, f"{is_so} needs a router: without one every token runs every recursion")
        require(len(c.capacity) == n, f"{is_so} must have one entry per recursion: {said(c, 'n_recursion')}")
        require(numbers, f"{is_so} must lie in (0, 1]")
        require(
            not numbers or list(c.capacity) == sorted(c.capacity, reverse=True),
            f"{is_so} must not increase: a recursion chooses among the tokens of the one before",
        )
        require(
            (c.own_kv and c.router != "token") or c.capacity[:1] == (1.0,),
            f"{is_so} must begin with 1.0 for kv='share' and for router='token': every token runs recursion 0",
        )
    return bad


def said(config: MoRConfig, field: str) -> str:
    return f"{field}={getattr(config, field)!r}"
