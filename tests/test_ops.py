"""Every kernel of ops.py against the line of plain PyTorch in its docstring, values and gradients."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

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
    torch.testing.assert_close(function(q, k, v, length), expected, atol=1e-5, rtol=1e-5)


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
