"""Mixture-of-Recursions, slowly: the oracle of the tests.

An independent reading of the paper (Bae et al., arXiv 2507.10524) that shares no code with model.py. Everything is a
plain loop over rows, positions and recursions on one vector at a time; nothing is batched, gathered, padded, masked or
cached, so what model.py does with those tricks can be compared with what they are meant to compute. Differentiable by
autograd through the loops, in the dtype of the weights.

    out = forward(model.state_dict(), config, idx, targets, routing="topk", training=True)

A token is a position t of a row; its hidden state is one vector [D]; `x` is a dict {position: vector} of tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# the parts of a layer, and what model.py calls them: the one place that knows its state-dict names
LAYER_NAMES = {
    "attn_norm": "attn_norm.weight",
    "q": "wq.weight",
    "k": "wk.weight",
    "v": "wv.weight",
    "o": "wo.weight",
    "mlp_norm": "mlp_norm.weight",
    "gate": "w_gate.weight",
    "up": "w_up.weight",
    "down": "w_down.weight",
}


@dataclass
class Weights:
    """All weights of a model under names of our own; a layer is a dict with the keys of LAYER_NAMES."""

    embedding: Tensor  # [V, D]
    head: Tensor  # [V, D]
    norm: Tensor  # [D]
    first: dict[str, Tensor] | None
    block: list[dict[str, Tensor]]
    last: dict[str, Tensor] | None
    routers: list[list[Tensor]]  # expert: per recursion the matrices of its router (1 linear, 2 MLP); token: one router
    aux_routers: list[list[Tensor]]
    balance_bias: Tensor | None  # [N]


def read_weights(sd: dict[str, Tensor]) -> Weights:
    """Maps the state dict of model.MoR to Weights; KeyError for a key it does not understand."""
    left = dict(sd)

    def layer(prefix: str) -> dict[str, Tensor] | None:
        if f"{prefix}.wq.weight" not in left:
            return None
        return {part: left.pop(f"{prefix}.{name}") for part, name in LAYER_NAMES.items()}

    def layers(prefix: str) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        while (next_one := layer(f"{prefix}.{len(found)}")) is not None:
            found.append(next_one)
        return found

    def router(prefix: str) -> list[Tensor] | None:
        if f"{prefix}.net.weight" in left:
            return [left.pop(f"{prefix}.net.weight")]
        if f"{prefix}.net.0.weight" in left:
            return [left.pop(f"{prefix}.net.0.weight"), left.pop(f"{prefix}.net.2.weight")]
        return None

    def routers(prefix: str) -> list[list[Tensor]]:
        found: list[list[Tensor]] = []
        while (next_one := router(f"{prefix}.{len(found)}")) is not None:
            found.append(next_one)
        return found

    token_router = router("router")
    embedding = left.pop("wte.weight")
    weights = Weights(
        embedding=embedding,
        head=left.pop("lm_head.weight", embedding),
        norm=left.pop("norm.weight"),
        first=layer("first"),
        block=layers("block"),
        last=layer("last"),
        routers=routers("routers") if token_router is None else [token_router],
        aux_routers=routers("aux_routers"),
        balance_bias=left.pop("balance_bias", None),
    )
    if left:
        raise KeyError(f"keys of the state dict that the reference does not know: {sorted(left)}")
    return weights


@dataclass
class Result:
    logits: Tensor  # [B, T, V]
    depth: Tensor  # [B, T] int64
    losses: dict[str, Tensor]  # differentiable: "lm" (with targets), "aux", "balance", "z" where they apply
    loss: Tensor | None
    router: list[
        list[dict[int, Tensor]]
    ]  # [b][r] {position: decision logit} of the candidates; token choice: [b][0] {t: [N]}
    margin: (
        float  # the smallest distance of a routing decision from its opposite; below 1e-4 a comparison means nothing
    )
    overflow: Tensor  # [B] int64: tokens that found no slot


# ----------------------------------------------------------------------------------------------------------------------
# one token at a time: norm, rotation, attention, layer


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x / torch.sqrt((x * x).mean() + eps))


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """RoPE of one head vector [head_dim]: the pair (i, i + half) turns by position * theta^(-i/half)."""
    half = x.numel() // 2
    out_low, out_high = [], []
    for i in range(half):
        angle = position * theta ** (-i / half)
        low, high = x[i], x[i + half]
        out_low.append(low * math.cos(angle) - high * math.sin(angle))
        out_high.append(high * math.cos(angle) + low * math.sin(angle))
    return torch.stack(out_low + out_high)


def attend(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query head [head_dim] over the keys it may see."""
    scores = torch.stack([q @ k for k in keys]) / math.sqrt(q.numel())
    weights = torch.exp(scores - scores.max())
    weights = weights / weights.sum()
    return sum(w * v for w, v in zip(weights, values, strict=True))


def run_layer(
    layer: dict[str, Tensor],
    config,
    x: dict[int, Tensor],
    segment: list[int],
    memory: dict[int, tuple[list[Tensor], list[Tensor]]] | None = None,
) -> tuple[dict[int, Tensor], dict[int, tuple[list[Tensor], list[Tensor]]]]:
    """One Llama layer over the tokens of x, residual additions included.

    memory: {position: (keys per KV head, values per KV head)} of another recursion, instead of x's own (sharing).
    Returns the new x and the keys and values that were attended to.
    """
    head_dim = config.d_model // config.n_head
    group = config.n_head // config.n_kv_head
    normed = {t: rms_norm(v, layer["attn_norm"], config.norm_eps) for t, v in x.items()}
    if memory is None:
        memory = {}
        for t in x:
            keys = (layer["k"] @ normed[t]).split(head_dim)
            values = (layer["v"] @ normed[t]).split(head_dim)
            memory[t] = [rotate(k, t, config.rope_theta) for k in keys], list(values)
    out = {}
    for t in x:
        seen = [s for s in sorted(memory) if s <= t and segment[s] == segment[t]]
        heads = []
        for h, q in enumerate((layer["q"] @ normed[t]).split(head_dim)):
            q = rotate(q, t, config.rope_theta)
            heads.append(attend(q, [memory[s][0][h // group] for s in seen], [memory[s][1][h // group] for s in seen]))
        middle = x[t] + layer["o"] @ torch.cat(heads)
        n = rms_norm(middle, layer["mlp_norm"], config.norm_eps)
        out[t] = middle + layer["down"] @ (F.silu(layer["gate"] @ n) * (layer["up"] @ n))
    return out, memory


def run_block(
    layers: list[dict[str, Tensor]], config, x: dict[int, Tensor], segment: list[int], shared: list | None
) -> tuple[dict[int, Tensor], list]:
    """f of the paper: all layers of a recursion block. shared: per layer the memory of the first recursion, or None."""
    kept = []
    for j, layer in enumerate(layers):
        x, memory = run_layer(layer, config, x, segment, None if shared is None else shared[j])
        kept.append(memory)
    return x, kept


def router_logits(router: list[Tensor], x: Tensor) -> Tensor:
    """[D] -> [1] (expert) or [N] (token): a linear map, or linear - GELU - linear."""
    return router[0] @ x if len(router) == 1 else router[1] @ F.gelu(router[0] @ x)


# ----------------------------------------------------------------------------------------------------------------------
# what the configuration means


def resolved_capacity(config) -> list[float]:
    """Capacity per recursion: the configured one, else (N-r)/N."""
    N = config.n_recursion
    return list(config.capacity) if config.capacity else [(N - r) / N for r in range(N)]


def layer_ids(config) -> list[int]:
    """Ids of the block's layers in unrolled order, without first and last (paper, figure on parameter sharing)."""
    N = config.n_recursion
    inner = config.n_layer - (2 if N > 1 and config.sharing.startswith("middle") else 0)
    distinct = inner // N
    if config.sharing.endswith("sequence"):
        return [j for j in range(distinct) for _ in range(N)]
    return [j for _ in range(N) for j in range(distinct)]


def gate_function(config, default: str):
    name = config.router_func or default
    alpha = config.router_alpha if config.router_alpha is not None else {"softmax": 1.0}.get(name, 0.1)
    functions = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "softmax": lambda z: torch.exp(z - z.max()) / torch.exp(z - z.max()).sum(),
    }
    return lambda logits: alpha * functions[name](logits)


# ----------------------------------------------------------------------------------------------------------------------
# the routings; each maps the hidden states of all rows and collects losses, depths and decision logits


class Run:
    """What a forward pass collects on its way."""

    def __init__(self, B: int, T: int, N: int):
        self.depth = [[0] * T for _ in range(B)]
        self.router: list[list[dict[int, Tensor]]] = [[{} for _ in range(N)] for _ in range(B)]
        self.losses: dict[str, Tensor] = {}
        self.margin = math.inf
        self.overflow = [0] * B


def recursive_rows(w: Weights, config, rows, segments, run: Run, max_depth: int | None):
    """Vanilla and recursive baselines: every token runs every layer."""
    ids = layer_ids(config)
    per_recursion = len(ids) // config.n_recursion
    limit = config.n_recursion if max_depth is None else min(max_depth, config.n_recursion)
    ids = ids[: limit * per_recursion]
    for b, x in enumerate(rows):
        memories: list = []
        for i, j in enumerate(ids):
            reuse = config.kv == "share" and i >= per_recursion
            x, memory = run_layer(w.block[j], config, x, segments[b], memories[i % per_recursion] if reuse else None)
            memories.append(memory)
        rows[b] = x
        run.depth[b] = [limit] * len(x)
    return rows


def expert_rows(w: Weights, config, rows, segments, run: Run, *, routing, capacity, threshold, max_depth, slots):
    """Expert choice: x <- x + g * f(x_selected), the tokens of recursion r chosen among those of recursion r-1."""
    T = len(rows[0])
    gate = gate_function(config, "sigmoid")
    candidates = [list(range(T)) for _ in rows]
    memories = [None] * len(rows)
    aux, z = [], []
    for r in range(config.n_recursion):
        bce_terms, z_terms = [], []
        for b, x in enumerate(rows):
            logits = {t: router_logits(w.routers[r], x[t])[0] for t in candidates[b]}
            if config.causality == "aux_router":
                decision = {t: router_logits(w.aux_routers[r], x[t].detach())[0] for t in candidates[b]}
            else:
                decision = logits
            run.router[b][r] = decision

            if routing == "topk":
                k = min(max(1, math.floor(capacity[r] * T)), len(candidates[b]))
                best_first = sorted(candidates[b], key=lambda t: -float(gate(logits[t].detach().double())))
                chosen = sorted(best_first[:k])
                if 0 < k < len(best_first):
                    gap = logits[best_first[k - 1]] - logits[best_first[k]]
                    run.margin = min(run.margin, float(gap.detach()))
            else:
                chosen = []
                for t in candidates[b]:
                    if max_depth is not None and r >= max_depth:
                        continue
                    if capacity[r] < 1.0:
                        edge = math.log(threshold) - math.log1p(-threshold)
                        run.margin = min(run.margin, abs(float(decision[t].detach()) - edge))
                        if torch.sigmoid(decision[t].detach().double()) < threshold:
                            continue
                    if slots is not None and len(chosen) == slots[r]:
                        run.overflow[b] += 1
                        continue
                    chosen.append(t)

            for t in candidates[b]:
                bce_terms.append(-F.logsigmoid(decision[t] if t in chosen else -decision[t]))
                z_terms.append(logits[t] ** 2)
            if chosen:
                y, kept = run_block(w.block, config, {t: x[t] for t in chosen}, segments[b], memories[b])
                if config.kv == "share" and r == 0:
                    memories[b] = kept
                rows[b] = {t: x[t] + gate(logits[t]) * y[t] if t in y else x[t] for t in x}
            for t in chosen:
                run.depth[b][t] = r + 1
            candidates[b] = chosen
        if bce_terms:
            aux.append(sum(bce_terms) / len(bce_terms))
            z.append(sum(z_terms) / len(z_terms))
    if config.causality != "none":
        run.losses["aux"] = sum(aux)
    if config.z_coef:
        run.losses["z"] = sum(z)
    return rows


def token_rows(w: Weights, config, rows, segments, run: Run, *, slots, max_depth):
    """Token choice: out = H1 + p_d * f(f(...f(H1))), d applications, d the argmax of the router on H1."""
    N = config.n_recursion
    T = len(rows[0])
    probability = gate_function(config, "softmax")
    p_sum = [0.0] * N
    share = [0.0] * N
    z_terms = []
    for b, H1 in enumerate(rows):
        p, wanted = {}, {}
        for t in range(T):
            logits = router_logits(w.routers[0], H1[t])
            run.router[b][0][t] = logits
            p[t] = probability(logits)
            scores = (p[t] if w.balance_bias is None else p[t] + w.balance_bias.to(p[t].dtype)).detach()
            order = sorted(range(N), key=lambda i: -float(scores[i]))
            wanted[t] = order[0] + 1
            run.margin = min(run.margin, float(scores[order[0]] - scores[order[1]]))
            share[order[0]] += 1 / (len(rows) * T)
            for i in range(N):
                p_sum[i] = p_sum[i] + p[t][i] / (len(rows) * T)
            z_terms.append(torch.log(torch.exp(logits - logits.max()).sum()) + logits.max())

        H, memory = dict(H1), None
        active = list(range(T))
        for r in range(N):
            go_on = []
            for t in active:
                if wanted[t] <= r or (max_depth is not None and r >= max_depth):
                    continue
                if slots is not None and len(go_on) == slots[r]:
                    run.overflow[b] += 1
                    continue
                go_on.append(t)
            active = go_on
            if active:
                y, kept = run_block(w.block, config, {t: H[t] for t in active}, segments[b], memory)
                if config.kv == "share" and r == 0:
                    memory = kept
                H.update(y)
            for t in active:
                run.depth[b][t] = r + 1
        for t in range(T):
            depth = run.depth[b][t]  # 0: a cache without a slot even for the first recursion
            rows[b][t] = H1[t] + p[t][depth - 1] * H[t] if depth else H1[t]
    if config.balance == "loss":
        run.losses["balance"] = N * sum(p_sum[i] * share[i] for i in range(N))
    if config.z_coef:
        run.losses["z"] = sum(lse**2 for lse in z_terms) / len(z_terms)
    return rows


# ----------------------------------------------------------------------------------------------------------------------


def forward(
    sd: dict[str, Tensor],
    config,
    idx: Tensor,
    targets: Tensor | None = None,
    *,
    routing: str = "topk",
    training: bool = True,
    capacity: Tensor | None = None,
    segments: Tensor | None = None,
    threshold: float = 0.5,
    max_depth: int | None = None,
    slots: tuple[int, ...] | None = None,
) -> Result:
    """The whole model.

    idx, targets: [B, T] integers; -100 in targets is ignored.
    routing: "topk" or "causal" (expert choice only); training: token choice has a limited number of slots.
    capacity: [N] capacities instead of the configured ones (warm-up). segments: [B, T] document numbers.
    slots: causal routing or token choice with so many tokens per row and recursion, first come first served.
    """
    w = read_weights(sd)
    B, T = idx.shape
    N = config.n_recursion
    capacities = resolved_capacity(config) if capacity is None else [float(c) for c in capacity]
    segment_rows = [[0] * T for _ in range(B)] if segments is None else segments.tolist()
    run = Run(B, T, N)

    rows = [{t: w.embedding[idx[b, t]] for t in range(T)} for b in range(B)]
    if w.first is not None:
        rows = [run_layer(w.first, config, x, segment_rows[b])[0] for b, x in enumerate(rows)]
    if config.router == "none":
        rows = recursive_rows(w, config, rows, segment_rows, run, max_depth)
    elif config.router == "expert":
        options = dict(routing=routing, capacity=capacities, threshold=threshold, max_depth=max_depth, slots=slots)
        rows = expert_rows(w, config, rows, segment_rows, run, **options)
    else:
        if training and slots is None:
            # rounded first: 1.25 * 2/3 * 24 is 20, not the 20.000000000000004 that floats may make of it
            slots = tuple(min(T, math.ceil(round(config.capacity_slack * c * T, 9))) for c in capacities)
        rows = token_rows(w, config, rows, segment_rows, run, slots=slots, max_depth=max_depth)
    if w.last is not None:
        rows = [run_layer(w.last, config, x, segment_rows[b])[0] for b, x in enumerate(rows)]

    logits = torch.stack(
        [torch.stack([w.head @ rms_norm(x[t], w.norm, config.norm_eps) for t in range(T)]) for x in rows]
    )
    loss = None
    if targets is not None:
        terms = []
        for b in range(B):
            for t in range(T):
                if targets[b, t] != -100:
                    terms.append(torch.logsumexp(logits[b, t], 0) - logits[b, t, targets[b, t]])
        run.losses["lm"] = sum(terms) / len(terms)
        loss = run.losses["lm"]
        for name, coef in {"aux": config.aux_coef, "balance": config.balance_coef, "z": config.z_coef}.items():
            if name in run.losses:
                loss = loss + coef * run.losses[name]
    return Result(
        logits=logits,
        depth=torch.tensor(run.depth),
        losses=run.losses,
        loss=loss,
        router=run.router,
        margin=run.margin,
        overflow=torch.tensor(run.overflow),
    )
