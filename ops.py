"""The fast kernels of model.py. Nothing here knows what a Mixture-of-Recursions is.

A function that stands for one line of PyTorch has it in its docstring, and a test compares the two.

Shapes: B batch, T or S time, K tokens of a compaction, D width, H query heads, G key/value heads, E width of a head, C
slots of a cache, V vocabulary.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # defines an operator
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CUDA brings it, torch for CPUs does not need it
    triton = None

# Of this file's custom operators. A copy that an exported model brings along is another module, in a process that may
# have this one too, and operators are global.
OPERATORS = "nanomor" if __name__ == "ops" else "nanomor_" + re.sub(r"\W", "_", __name__)

# ----------------------------------------------------------------------------------------------------------------------
# matrix products


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that matrix products with x run in: autocast's, where it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class Matrix(nn.Linear):
    """A linear layer without bias, whose weight [n, D] can be prepared for decoding: joined with others, or int8."""

    def __init__(self, D: int, n: int):
        super().__init__(D, n, bias=False)
        self.register_buffer("scale", None)  # [n] of an int8 weight: what a step of each output's is worth
        self.joined: Joined | None = None  # of the group of matrices that this one begins

    def _apply(self, fn, recurse=True):
        self.joined = None  # what is moved or cast gets memory of its own
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("assign_to_params_buffers"):  # so does what is replaced, which a compiler could not see
            self.joined = None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def quantize(self) -> None:
        """Makes the weight int8, symmetric, with a scale for each output."""
        weight = self.weight.detach().float()
        # a scale is rounded to what is kept of it before the weights are divided by it, so that it adds no error
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        self.scale = scale.to(self.weight.dtype)
        steps = (weight / self.scale.float()[:, None]).round().clamp(-127, 127)
        self.weight = nn.Parameter(steps.to(torch.int8), requires_grad=False)


class Joined(NamedTuple):
    """Several weights in one piece of memory, of which they are views."""

    weight: Tensor
    scale: Tensor | None

    def __reduce__(self):
        return type(None), ()  # in a copy of a model every weight has memory of its own


@torch.no_grad()
def join(*layers: Matrix) -> None:
    """Lets `linears` read the weights of these layers as one matrix. They keep their names and may go on training: it
    has no other memory than theirs."""
    if find_joined(layers) is not None:  # somebody's graphs may hold it
        return
    weight = torch.cat([layer.weight for layer in layers])
    scale = None
    if layers[0].scale is not None:
        scale = torch.cat([layer.scale for layer in layers])
    for layer, part in zip(layers, weight.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data = part
    layers[0].joined = Joined(weight, scale)


def find_joined(layers: Sequence[nn.Linear]) -> Joined | None:
    """Returns what `join` made of these layers, if their weights still lie in it."""
    joined = getattr(layers[0], "joined", None)
    if joined is None or torch.compiler.is_compiling():  # of a model that has graphs no weight may be replaced
        return joined
    start = 0
    for layer in layers:
        same = layer.weight.untyped_storage() is joined.weight.untyped_storage()
        if not same or layer.weight.storage_offset() != start:
            return None
        start += layer.weight.numel()
    return joined


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Returns x [..., D] times weight [n, D], as [..., n]: F.linear(x, weight); of an int8 weight with its scale [n]
    F.linear(x, weight * scale[:, None])."""
    few = x.numel() <= x.size(-1) * (1 if scale is None else 8)
    if few and x.device.type == "cpu" and torch.compiler.is_compiling():
        return multiply_few(x, weight, scale)
    if scale is not None:
        weight = (weight * scale[:, None].float()).to(scale.dtype)
    return F.linear(x, weight)


def multiply_few(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Returns what linear does, for few rows, as products and sums.

    Inductor turns them into plain loops over the weights, one kernel with all that happens between them: faster than a
    call per product, which waits for memory each time. The times below are of the four products of a layer of D = 576
    on one core of Zen 4, weights in bf16 and int8."""
    y = x.float().flatten(0, -2)
    # Stored, not computed again with its norm for each output (int8: 260 us, not 325), and in fp32, as loops with bf16
    # in them load 32 weights at a time, which is slow for int8.
    y = y.as_strided(y.shape, y.stride())
    if scale is not None:  # a cast that freezing leaves in the graph: others become weights four times as large
        weight = torch.ops.quantized_decomposed.dequantize_per_tensor(weight, 1.0, 0, -128, 127, torch.int8)
    # Several outputs at a time: memory is read in as many places at once (385 and 260 us, not 500 and 305).
    parts = weight.chunk(4 if len(y) == 1 else 2)
    rows = []
    for row in y:  # each weight is loaded once for all rows
        # (the sum is in fp32, not the operands: freezing would keep a cast of the weights, twice as large)
        sums = [(row * part).sum(-1, dtype=torch.float32) for part in parts]
        rows.append(torch.cat(sums))
    z = torch.stack(rows)
    if scale is not None:
        z = z * scale
    return z.to(x.dtype).view(*x.shape[:-1], -1)


def linears(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Returns the outputs of several layers on x [B, T, D], side by side: torch.cat([f(x) for f in layers], -1)."""
    joined = None
    if len(layers) == 1:
        joined = layers[0]
    elif not torch.is_grad_enabled():  # no gradient passes from the joined weight to its parts
        joined = find_joined(layers)
    if joined is not None:
        return linear(x, joined.weight, getattr(joined, "scale", None))
    quantized = getattr(layers[0], "scale", None) is not None
    if x.size(1) == 1 or quantized:  # joining weights first would read them twice, which is what one token waits for
        outputs = [linears(x, layer) for layer in layers]
        return torch.cat(outputs, -1)
    dtype = matmul_dtype(x)  # cast first: autocast would join them in fp32, and then cast
    weights = [layer.weight.to(dtype) for layer in layers]
    return F.linear(x, torch.cat(weights))


# ----------------------------------------------------------------------------------------------------------------------
# attention among tokens


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns attention of q [B, K, H, E] over k, v [B, S, G, E], as [B, K, H, E].

    mask is bool [B, 1, K, S]; None is causal, and then S = K. On transposed arguments it is
    F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)."""
    if q.device.type == "cpu":
        return attend_on_cpu(q, k, v, mask)
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    gqa = q.size(1) != k.size(1)
    if gqa and mask is not None:  # flash takes no mask, and the kernel that does takes no groups: SDPA would use math
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
        gqa = False
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa)
    return y.transpose(1, 2)


# On CPUs SDPA takes three times as long as these batched matrix products over a few queries at a time, whose scores
# stay in the processor's caches. Custom operators, since inlined into the graph they would double its compile time.
QUERIES_AT_A_TIME = 64


def group_heads(x: Tensor, G: int) -> Tensor:
    """Returns x [B, T, heads, E] as [B*G, heads/G * T, E], by shared key head: query t of head i is row i*T + t."""
    B, T, heads, E = x.shape
    x = x.view(B, T, G, heads // G, E)
    return x.permute(0, 2, 3, 1, 4).reshape(B * G, -1, E)


def ungroup_heads(x: Tensor, B: int, T: int) -> Tensor:
    """Returns [B, T, heads, E] from what group_heads made."""
    BG, rows, E = x.shape
    x = x.view(B, BG // B, rows // T, T, E)
    return x.permute(0, 3, 1, 2, 4).reshape(B, T, -1, E).contiguous()


def weight_blocks(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Yields attention weights for a few queries at a time, with the keys that these may see.

    q [B, K, H, E] is scaled, k [B*G, S, E] grouped. Yields which queries, the number of keys, these queries
    [B*G, H/G * rows, E], and their weights [B*G, H/G * rows, keys]."""
    B, K = q.shape[:2]
    BG, S, _ = k.shape
    end = torch.arange(1, S + 1, device=q.device)  # where the keys end that query i may see, in any row of the batch
    if mask is not None:
        seen = mask[:, 0].byte().amax(0)  # [K, S]
        end = (seen * end).amax(-1).clamp(min=1)

    for start in range(0, K, QUERIES_AT_A_TIME):
        at = slice(start, min(start + QUERIES_AT_A_TIME, K))
        n = at.stop - start
        keys = int(end[at].max())
        queries = group_heads(q[:, at], BG // B)
        score = torch.bmm(queries, k[:, :keys].mT)
        by_head = score.view(B, BG // B, -1, n, keys)  # the same memory

        # not -inf: a surplus slot may see nothing, and 0 * nan is not 0
        least = torch.finfo(q.dtype).min
        if mask is None:
            later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            by_head[..., start:].masked_fill_(later, least)
        else:
            hidden = ~mask[:, :, None, at, :keys]
            by_head.masked_fill_(hidden, least)
        yield at, keys, queries, score.softmax(-1)


@torch.library.custom_op(f"{OPERATORS}::attend_on_cpu", mutates_args=())
def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns what attend does."""
    B, _, _, E = q.shape
    G = k.size(2)
    k, v = group_heads(k, G), group_heads(v, G)
    out = torch.empty_like(q)
    for at, keys, _, weight in weight_blocks(q * E**-0.5, k, mask):
        y = torch.bmm(weight, v[:, :keys])
        out[:, at] = ungroup_heads(y, B, at.stop - at.start)
    return out


@torch.library.custom_op(f"{OPERATORS}::attend_on_cpu_backward", mutates_args=())
def attend_on_cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v.

    The weights are computed again: keeping them would take K * S / 2 numbers a head and layer."""
    B, S, G, E = k.shape
    k, v = group_heads(k, G), group_heads(v, G)
    exact = torch.promote_types(k.dtype, torch.float32)  # what sums over blocks
    dq = torch.empty_like(q)
    dk = torch.zeros(k.shape, dtype=exact, device=k.device)
    dv = torch.zeros(k.shape, dtype=exact, device=k.device)

    for at, keys, queries, weight in weight_blocks(q * E**-0.5, k, mask):
        dout = group_heads(grad[:, at], G)
        dv[:, :keys] += torch.bmm(weight.mT, dout)
        dweight = torch.bmm(dout, v[:, :keys].mT)
        dscore = torch._softmax_backward_data(dweight, weight, -1, q.dtype)
        dk[:, :keys] += torch.bmm(dscore.mT, queries)
        dqueries = torch.bmm(dscore, k[:, :keys]) * E**-0.5
        dq[:, at] = ungroup_heads(dqueries, B, at.stop - at.start)
    dk = ungroup_heads(dk, B, S).to(k.dtype)
    dv = ungroup_heads(dv, B, S).to(v.dtype)
    return dq, dk, dv


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

# ----------------------------------------------------------------------------------------------------------------------
# attention of one token to a cache


def attend_cache(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, length: Tensor) -> Tensor:
    """Returns attention of one query per row over the first length [B] of its slots.

    q [B, 1, H, E], k and v [B, C, G, E] -> [B, 1, H, E]: attend(q, k, v, mask) with mask = slot < length. With an index
    int64 [B], k and v hold other windows too, which may overlap, and row b reads k[index[b]]."""
    if use_decode_kernel(q):
        return decode(q, k, v, index, length)
    if index is not None:
        k, v = k[index], v[index]
    B, _, H, E = q.shape
    C, G = k.shape[1:3]
    slot = torch.arange(C, device=q.device)
    empty = slot >= length[:, None]  # [B, C]
    if not torch.compiler.is_compiling():
        return attend(q, k, v, ~empty[:, None, None, :])

    # Products and sums, so that Inductor fuses reading the cache with the dot product; SDPA works in blocks made for
    # many queries. In eager mode nothing would fuse, and the products are E times the size of the scores.
    q = q.view(B, G, H // G, 1, E).float()
    q = q * E**-0.5
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    keys = k[:, :, None].float()  # [B, G, 1, C, E]
    values = v[:, :, None].float()
    score = (q * keys).sum(-1)  # [B, G, H/G, C]
    score = score.masked_fill(empty[:, None, None], -math.inf)
    weight = score.softmax(-1)
    y = (weight[..., None] * values).sum(3)
    return y.to(v.dtype).view(B, 1, H, E)


def use_decode_kernel(q: Tensor) -> bool:
    """Returns whether decode_kernel attends."""
    return q.is_cuda and decode_kernel is not None


# On GPUs one kernel of our own, since none of torch's fits. Without one, Inductor takes three that read every slot
# there is, full or empty; flash-attn is hours of nvcc; varlen_attn wants pages of 256 slots, has no fp32, and launches
# four kernels. This one reads a row's own slots where they lie, and no others.
decode_kernel = None
if triton is not None:

    @triton.jit
    def decode_kernel(
        q,
        k,
        v,
        index,
        length,
        out,
        lse,
        q_row,
        q_head,
        window,
        slot_size,
        head_size,
        scale,
        SHARING: tl.constexpr,
        E: tl.constexpr,
        SPLITS: tl.constexpr,
        BLOCK: tl.constexpr,
        HEADS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        """Attends from the query heads of one row that share a key head to one part of its window: flash-decoding.

        A program is (row, key head, part). SHARING of its HEADS lanes are query heads, E of its WIDTH are components:
        tensor cores take no fewer than 16. Strides are in elements, a row's of q, a head's of q, of a window, of a slot
        and of a head in it. Writes out [B, SPLITS, H, E] and lse [B, SPLITS, H], the logarithm of the weights' sum."""
        row = tl.program_id(0).to(tl.int64)
        group = tl.program_id(1)
        part = tl.program_id(2)
        n = tl.load(length + row).to(tl.int32)
        each = tl.cdiv(n, SPLITS)
        end = tl.minimum(n, (part + 1) * each)
        at_window = row
        if index is not None:
            at_window = tl.load(index + row)
        k += at_window * window + group * head_size
        v += at_window * window + group * head_size

        lane = tl.arange(0, HEADS)
        e = tl.arange(0, WIDTH)
        head = group * SHARING + lane
        real = (lane < SHARING)[:, None] & (e < E)
        query = tl.load(q + row * q_row + head[:, None] * q_head + e, real, 0.0)
        best = tl.full([HEADS], -float("inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        y = tl.zeros([HEADS, WIDTH], tl.float32)
        for start in range(part * each, end, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            there = (slot < end)[:, None] & (e < E)
            place = slot[:, None].to(tl.int64) * slot_size + e
            keys = tl.load(k + place, there, 0.0)
            score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
            score = tl.where(slot < end, score, -float("inf"))

            # softmax so far: what came before shrinks where a better score turns up
            better = tl.maximum(best, tl.max(score, 1))
            weight = tl.exp(score - better[:, None])
            shrink = tl.exp(best - better)
            best = better
            total = total * shrink + tl.sum(weight, 1)
            values = tl.load(v + place, there, 0.0)
            y = y * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")

        # a part may be empty, and then weighs nothing
        H = tl.num_programs(1) * SHARING
        heads = (row * SPLITS + part) * H + head
        y = y / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + heads[:, None] * E + e, y.to(out.dtype.element_ty), real)
        tl.store(lse + heads, best + tl.log(total), lane < SHARING)


def decode(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, length: Tensor) -> Tensor:
    """Returns what attend_cache does, by decode_kernel."""
    B, _, _, E = q.shape
    C, G = k.shape[1:3]
    # few rows would leave most of a GPU idle, so they split their windows, but not below 256 slots
    splits = min(math.ceil(C / 256), max(1, 128 // (B * G)))
    out, lse = decode_parts(q.to(k.dtype), k, v, index, length, splits)  # under autocast they may differ
    if splits > 1:
        weight = lse.softmax(1)[..., None]
        out = (out * weight).sum(1, keepdim=True)
    return out.to(q.dtype)


@torch.library.custom_op(f"{OPERATORS}::decode_parts", mutates_args=())  # opaque to torch.compile, so fullgraph holds
def decode_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    length: Tensor,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Returns attention to each of `splits` parts of the windows, [B, splits, H, E], fp32 where there are several, and
    the logarithms of the sums of their weights, fp32 [B, splits, H]."""
    out, lse = empty_parts(q, splits)
    B, _, H, E = q.shape
    G = k.size(2)
    strides = q.stride(0), q.stride(2), *k.stride()[:3]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        decode_kernel[B, G, splits](
            *(q, k, v, index, length, out, lse),
            *strides,
            scale=E**-0.5,
            SHARING=H // G,
            E=E,
            SPLITS=splits,
            BLOCK=64 if E <= 128 else 32,  # slots at a time: keys and values of two times fit the shared memory
            HEADS=max(16, next_power_of_2(H // G)),
            WIDTH=max(16, next_power_of_2(E)),
            num_stages=2,
        )
    return out, lse


@decode_parts.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, length: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    return empty_parts(q, splits)


def empty_parts(q: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Returns memory for the results of decode_parts."""
    B, _, H, E = q.shape
    dtype = torch.float32 if splits > 1 else q.dtype
    return q.new_empty(B, splits, H, E, dtype=dtype), q.new_empty(B, splits, H, dtype=torch.float32)


def next_power_of_2(n: int) -> int:
    """Returns the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


# ----------------------------------------------------------------------------------------------------------------------
# gather with its inverse, and the loss


def compact(active: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Returns (index, slot). index [B, K]: the position of the token in each slot, ascending, T where a slot is empty.
    slot [B, T]: the slot of each token, K where it has none. K is `slots`; active is bool [B, T]."""
    B, T = active.shape
    order = active.cumsum(1) - 1
    slot = torch.where(active, order, slots).clamp(max=slots)
    index = torch.full((B, slots + 1), T, device=active.device)  # one more slot, where all other tokens go
    position = torch.arange(T, device=active.device).expand(B, T)
    index = index.scatter(1, slot, position)[:, :slots]
    return index, slot


def take(x: Tensor | None, index: Tensor, fill: int | None = None) -> Tensor | None:
    """Returns x [B, T] at index [B, K], torch.take_along_dim(x, index, 1); where it is T, `fill` or else what the last
    has. None for None."""
    if x is None:
        return None
    T = x.size(1)
    taken = x.gather(1, index.clamp(max=T - 1))
    return taken if fill is None else taken.masked_fill(index == T, fill)


def take_rows(x: Tensor | None, index: Tensor, inverse: Tensor) -> Tensor | None:
    """Returns the rows of x [B, S, D] at index [B, K], zeros where it is S, as [B, K, D]; None for None.

    `inverse` [B, S] undoes the index (K for rows not taken). Else torch.take_along_dim(x, index[..., None], 1)."""
    return None if x is None else TakeRows.apply(x, index, inverse)


class TakeRows(torch.autograd.Function):
    """take_rows, whose gradient is another one by the inverse: no atomic additions, which are slow on CPUs and add up
    in another order each time on GPUs."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return TakeRows.gather(x, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return TakeRows.gather(grad, inverse), None, None

    @staticmethod
    def gather(x: Tensor, index: Tensor) -> Tensor:
        B, S, D = x.shape
        row = index.clamp(max=S - 1)
        taken = x.gather(1, row[..., None].expand(-1, -1, D))
        real = (index < S)[..., None]
        return torch.where(real, taken, 0.0)


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Returns the mean cross entropy over the targets that are not -100, an fp32 scalar; 0 if all are.

    x [B, T, D], weight [V, D], target int64 [B, T]: F.cross_entropy((x @ weight.T).flatten(0, 1), target.flatten())."""
    x, target = x.flatten(0, 1), target.flatten()
    rows = max(2**23 // weight.size(0), 1)  # 8M logits at a time
    rows = max(rows, math.ceil(x.size(0) / 16))  # at most 16 chunks are unrolled
    wants_grad = torch.is_grad_enabled()
    total = LinearCrossEntropy.apply(x, weight, target, rows, matmul_dtype(x), wants_grad)
    count = (target != -100).sum()
    return total / count.clamp(min=1)


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of cross entropies, a chunk of rows at a time, so that logits [B*T, V] never exist.

    The gradients are formed in the forward pass, where the chunk's logits are at hand: nothing is computed twice. (As
    F.linear_cross_entropy does with chunking options, which torch.compile refuses.)"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, rows: int, dtype: torch.dtype, wants_grad: bool):
        x, w = x.to(dtype), weight.to(dtype)
        token = torch.arange(w.size(0), device=x.device)
        total = torch.zeros((), device=x.device)
        dw = torch.zeros(weight.shape, device=x.device)
        dx = []
        for xc, tc in zip(x.split(rows), target.split(rows), strict=True):
            logits = xc @ w.T
            lse = logits.float().logsumexp(-1)
            keep = tc != -100
            tc = tc.clamp(min=0)[:, None]
            right = logits.gather(1, tc)[:, 0].float()
            nll = (lse - right) * keep
            total = total + nll.sum()
            if wants_grad:
                probability = (logits.float() - lse[:, None]).exp()
                onehot = (token == tc).float()
                d = (probability - onehot) * keep[:, None]
                d = d.to(dtype)
                dx.append(d @ w)
                dw = dw + (d.T @ xc).float()
        if wants_grad:
            ctx.save_for_backward(torch.cat(dx), dw)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None, None


def scramble(x: Tensor) -> Tensor:
    """Returns 32 random-looking bits for 32 bits, both in int64, where the products cannot overflow."""
    x = (x >> 16) ^ x
    x = x * 0x45D9F3B & 0xFFFFFFFF
    x = (x >> 15) ^ x
    x = x * 0x2C1B3C6D & 0xFFFFFFFF
    return (x >> 16) ^ x
