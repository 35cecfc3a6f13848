"""Every kernel of ops.py against the line of plain PyTorch in its docstring, values and gradients."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import bench
import ops


def draw_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same(ours, plain, *inputs: Tensor, tolerance: float = 1e-10) -> None:
    """Two functions of the inputs agree, and so do their gradients."""
    results = []
    for function in (ours, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        weight = draw_normal(y.numel(), seed=9, dtype=y.dtype).view(y.shape)
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 1, 8), (2, 5, 8)])
@pytest.mark.parametrize("compiled", [False, True])
def test_linear_and_linears(shape, compiled, compiler):
    layers = [nn.Linear(8, n, bias=False, dtype=torch.float64) for n in (4, 6, 2)]
    x = draw_normal(*shape)
    one, several = ops.linear, ops.linears
    if compiled:
        one, several = (torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager") for f in (one, several))
    with torch.no_grad():
        torch.testing.assert_close(one(x, layers[0].weight), F.linear(x, layers[0].weight), atol=1e-6, rtol=1e-6)
        expected = torch.cat([layer(x) for layer in layers], -1)
        torch.testing.assert_close(several(x, *layers), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_attend(masked):
    q, k, v = draw_normal(2, 70, 4, 6), draw_normal(2, 70, 2, 6, seed=1), draw_normal(2, 70, 2, 6, seed=2)
    mask = None
    if masked:  # causal, and within documents of 30 tokens
        document = torch.arange(70) // 30
        mask = (document[:, None] == document).tril()[None, None].expand(2, 1, 70, 70)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return y.transpose(1, 2)

    assert_same(lambda q, k, v: ops.attend(q, k, v, mask), plain, q, k, v, tolerance=1e-9)


@pytest.mark.parametrize("compiled", [False, True])
def test_attend_cache(compiled, compiler):
    q, k, v = (draw_normal(3, *shape, dtype=torch.float32) for shape in ((1, 4, 6), (11, 2, 6), (11, 2, 6)))
    length = torch.tensor([1, 7, 11])
    mask = (torch.arange(11) < length[:, None])[:, None, None]
    expected = ops.attend(q, k, v, mask)
    function = ops.attend_cache
    if compiled:
        function = torch.compile(function, fullgraph=True, dynamic=False)
    torch.testing.assert_close(function(q, k, v, None, length), expected, atol=1e-5, rtol=1e-5)


def test_attend_cache_reads_windows_by_index():
    q, buffer = draw_normal(2, 1, 4, 6, dtype=torch.float32), draw_normal(3, 11, 2, 6, seed=1, dtype=torch.float32)
    windows = buffer.as_strided((3 * 11 - 7 + 1, 7, 2, 6), (12, 12, 6, 1))
    index, length = torch.tensor([26, 8]), torch.tensor([7, 4])  # the last window there is; one in two rows
    taken = buffer.flatten(0, 1)
    taken = torch.stack([taken[26:33], taken[8:15]])
    ours = ops.attend_cache(q, windows, windows, index, length)
    torch.testing.assert_close(ours, ops.attend_cache(q, taken, taken, None, length))


# ---- the kernel of GPUs, by Triton's interpreter: in a process of its own, as Triton reads the variable once

KERNEL_CASES = [  # rows, query and key heads, their width, slots, parts
    (3, 4, 2, 6, 11, 1),
    (2, 15, 5, 64, 150, 1),
    (2, 6, 2, 64, 300, 3),
    (1, 4, 4, 24, 70, 5),
]


def run_decode_kernel() -> dict[str, float]:
    """Returns the largest difference from `attend` by case: rows of all lengths, windows of their own and by index."""
    differences = {}
    for dtype in (torch.float32, torch.float16):
        for B, H, G, E, C, splits in KERNEL_CASES:
            q = draw_normal(B, 1, H + G, E, dtype=dtype)[:, :, :H]  # as the model's: a part of something wider
            k, v = draw_normal(2, B, C + 5, G, E, seed=1, dtype=dtype)
            length = torch.tensor([C, 1, C // 2])[:B]
            mask = (torch.arange(C) < length[:, None])[:, None, None]
            rows = k[:, 2 : C + 2], v[:, 2 : C + 2]

            # by index, the rows in the other order
            index = torch.arange(B).flip(0) * (C + 5) + 2
            shape, stride = (B * (C + 5) - C + 1, C, G, E), (G * E, G * E, E, 1)
            windows = k.as_strided(shape, stride), v.as_strided(shape, stride)
            for name, keys, at in (("rows", rows, None), ("windows", windows, index)):
                out, lse = ops.decode_parts(q, *keys, at, length, splits)
                y = (out * lse.softmax(1)[..., None]).sum(1, keepdim=True).float()
                own = rows if at is None else (rows[0].flip(0), rows[1].flip(0))
                expected = ops.attend(q.float(), own[0].float(), own[1].float(), mask)
                case = f"{dtype}, {B, H, G, E, C, splits}, {name}"
                differences[case] = (y - expected).abs().max().item()
    return differences


def test_decode_kernel_is_attention_to_the_slots_of_a_row():
    pytest.importorskip("triton")
    differences = bench.run_in_fresh_process(run_decode_kernel, env={"TRITON_INTERPRET": "1"})
    assert len(differences) == 4 * len(KERNEL_CASES)
    for case, difference in differences.items():
        assert difference < (1e-5 if "float32" in case else 2e-3), case  # nan fails too


def assemble_decode_kernel() -> dict[str, str]:
    """Returns the code for an H100 by case."""
    from fake_cuda import mock_compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    mock_compiler()
    code = {}
    for dtype, E, splits, indexed in (("bf16", 64, 1, True), ("fp32", 128, 4, False)):
        types = dict(q=f"*{dtype}", k=f"*{dtype}", v=f"*{dtype}", index="*i64", length="*i64", out=f"*{dtype}")
        types |= dict(lse="*fp32", q_row="i32", q_head="i32", window="i32", slot_size="i32", head_size="i32")
        fixed = dict(SHARING=3, E=E, SPLITS=splits, BLOCK=64, HEADS=16, WIDTH=E)
        if splits > 1:
            types["out"] = "*fp32"
        if not indexed:
            types["index"] = "constexpr"
            fixed["index"] = None
        signature = types | dict(scale="fp32") | dict.fromkeys(fixed, "constexpr")
        source = ASTSource(ops.decode_kernel, signature, fixed)
        code[dtype] = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_stages=2)).asm["ptx"]
    return code


def test_decode_kernel_assembles_for_a_gpu():
    pytest.importorskip("triton")
    code = bench.run_in_fresh_process(assemble_decode_kernel, env={})
    for ptx in code.values():
        assert ".target sm_90" in ptx and ".local" not in ptx  # nothing spills to memory
    assert "mma.sync" in code["bf16"]  # by tensor cores


def test_compact_take_and_take_rows():
    active = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    index, slot = ops.compact(active, 3)
    assert index.tolist() == [[0, 2, 3], [2, 5, 5]] and slot.tolist() == [[0, 3, 1, 2, 3], [3, 3, 0, 3, 3]]
    assert ops.compact(active, 2)[0].tolist() == [[0, 2], [2, 5]]  # the first that fit
    x = torch.arange(10).view(2, 5)
    assert ops.take(x, index, -1).tolist() == [[0, 2, 3], [7, -1, -1]] and ops.take(None, index, 0) is None

    rows = draw_normal(2, 5, 4)
    order = torch.tensor([[4, 0, 2, 1, 3], [1, 3, 0, 4, 2]])
    assert_same(
        lambda x: ops.take_rows(x, order, order.argsort(1)),
        lambda x: torch.take_along_dim(x, order[..., None], 1),
        rows,
    )
    assert_same(  # empty slots give zeros, and to nobody a gradient
        lambda x: ops.take_rows(x, index, slot),
        lambda x: torch.take_along_dim(F.pad(x, (0, 0, 0, 1)), index[..., None], 1),
        rows,
    )
    assert ops.take_rows(None, index, slot) is None


@pytest.mark.parametrize("tokens", [1, 37])
def test_linear_cross_entropy(tokens, monkeypatch):
    x, weight = draw_normal(2, tokens, 6), draw_normal(50, 6, seed=1)
    target = torch.randint(50, (2, tokens), generator=torch.Generator().manual_seed(2))
    target[0, ::3] = -100

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.T).flatten(0, 1), target.flatten())

    # sums are kept in fp32
    assert_same(lambda x, w: ops.linear_cross_entropy(x, w, target).double(), plain, x, weight, tolerance=1e-5)
    assert ops.linear_cross_entropy(x, weight, torch.full_like(target, -100)) == 0


def test_scramble_is_a_fixed_permutation_of_32_bits():
    x = torch.arange(1 << 16)
    y = ops.scramble(x)
    assert y.unique().numel() == y.numel() and 0 <= y.min() and y.max() < 1 << 32
    share = (y[:, None] >> torch.arange(32) & 1).double().mean(0)
    assert ((share - 0.5).abs() < 0.02).all()  # every bit is as often 1 as 0
