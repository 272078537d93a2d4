"""The residual blocks of an attention stage on CPU, in float32.

They compute x + f(x) a part at a time, so that all intermediate values stay in the cache. On a CPU,
writing to memory for the first time costs more than the products that fill it.

Backward recomputes a part's intermediate values from x. What scales or shifts channels around a
linear layer (LayerNorm's weight and bias, LayerScale) is multiplied into the layer's weights
outside of the blocks, where autograd differentiates it.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from evspan.pipeline.model.autograd import run_function
from torch import Tensor, nn

# Size of a part's widest rows: the MLP's hidden layer, or queries, keys and values.
CACHE_BYTES = 2**21
# Channels. Storing the output of a linear layer costs memory in proportion to its width,
# recomputing it costs work in proportion to the square. From this width on the MLP stores its
# hidden layer, and attention is left to torch's fused kernel, which is then as fast.
WIDE = 64

_aten = torch.ops.aten


def is_supported(x: Tensor) -> bool:
    """Whether the blocks can run on `x`: float32 on CPU, and not inside a compiled graph."""
    return x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def mlp_block(
    x: Tensor, norm: nn.LayerNorm, first: nn.Linear, second: tuple[Tensor, Tensor]
) -> Tensor:
    """x + linear(GELU(linear(norm(x)))).

    Args:
        x: (..., C) float32.
        norm: over C channels.
        first: C -> hidden channels.
        second: weight (C, hidden) and bias (C,) of the outer linear layer.

    Returns:
        (..., C).
    """
    keep = torch.is_grad_enabled() and x.shape[-1] >= WIDE
    rows = x.flatten(0, -2)
    weight, bias = _after(norm, first)
    out: Tensor = run_function(_MLPBlock, rows, weight, bias, *second, norm.eps, keep)
    return out.view(x.shape)


def attention_block(
    x: Tensor,
    split: tuple[int, ...],
    order: tuple[int, ...],
    norm: nn.Module,
    qkv: nn.Linear,
    proj: tuple[Tensor, Tensor],
    heads: int,
) -> Tensor:
    """x + proj(attention(qkv(norm(x)))), attention inside groups of cells.

    Args:
        x: (N, h, w, C) float32.
        split, order: x.view(split).permute(order) is (N, down, across, rows, columns, C); a group
            is rows x columns cells.
        norm: LayerNorm or Identity.
        qkv: C -> 3 * C channels; its rows are ordered by head, then query, key, value.
        proj: weight (C, C) and bias (C,).

    Returns:
        (N, h, w, C).
    """
    eps = None
    weight: Tensor = qkv.weight
    bias: Tensor = qkv.bias
    if isinstance(norm, nn.LayerNorm):
        eps = norm.eps
        weight, bias = _after(norm, qkv)
    weight_by_head = weight.view(heads, -1, x.shape[-1])
    bias_by_head = bias.view(heads, 1, -1)
    proj_weight, proj_bias = proj
    proj_by_head = torch.unflatten(proj_weight, 1, (heads, -1)).permute(1, 2, 0)  # (heads, c, C)
    out: Tensor = run_function(
        _AttentionBlock, x, weight_by_head, bias_by_head, proj_by_head, proj_bias, split, order, eps
    )
    return out


def _after(norm: nn.LayerNorm, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of `layer` applied after the scale and shift of `norm`."""
    return layer.weight * norm.weight, torch.addmv(layer.bias, layer.weight, norm.bias)


class _Scratch:
    """Buffers by name, reused for every part; the first part is the largest."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(size)
        return self.buffers[name][:size].view(shape)


class _Normalised(NamedTuple):
    """LayerNorm of rows without scale and shift.

    values: (n, C). mean, rstd (1 / standard deviation): (n, 1).
    """

    values: Tensor
    mean: Tensor
    rstd: Tensor


def _normalise(x: Tensor, eps: float, scratch: _Scratch) -> _Normalised:
    """Normalises the rows of x (n, C); torch's kernel takes twice as long at 32 channels."""
    mean = x.mean(-1, keepdim=True)
    out = torch.sub(x, mean, out=scratch("normalised", *x.shape))
    squares = torch.mul(out, out, out=scratch("squares", *x.shape))
    rstd = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
    return _Normalised(out.mul_(rstd), mean, rstd)


def _normalise_backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    only_x = [True, False, False]
    gradients: tuple[Tensor, ...] = _aten.native_layer_norm_backward(
        gradient, x, x.shape[1:], mean, rstd, None, None, only_x
    )
    return gradients[0]


class _MLPBlock(torch.autograd.Function):
    """`mlp_block` on rows (n, C). keep: the input of the GELU is stored for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, keep: bool
    ) -> Tensor:
        ctx.rows = max(1, CACHE_BYTES // (len(w1) * x.element_size()))
        ctx.eps = eps
        stored = x.new_empty(len(x), len(w1)) if keep else None
        ctx.save_for_backward(x, w1, b1, w2, stored)
        out = torch.empty_like(x)
        scratch = _Scratch(x)
        for i in range(0, len(x), ctx.rows):
            part = x[i : i + ctx.rows]
            wide = (len(part), len(w1))
            before = scratch("before", *wide) if stored is None else stored[i : i + ctx.rows]
            torch.addmm(b1, _normalise(part, eps, scratch).values, w1.t(), out=before)
            after = _aten.gelu.out(before, out=scratch("after", *wide))
            torch.add(part, b2, out=out[i : i + ctx.rows]).addmm_(after, w2.t())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, stored = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        dx = torch.empty_like(x)
        dw1 = torch.zeros_like(w1)
        db1 = torch.zeros_like(b1)
        dw2 = torch.zeros_like(w2)
        db2 = x.new_zeros(len(w2))
        scratch = _Scratch(x)
        for i in range(0, len(x), ctx.rows):
            part = x[i : i + ctx.rows]
            dy = gradient[i : i + ctx.rows]
            wide = (len(part), len(w1))
            normalised, mean, rstd = _normalise(part, ctx.eps, scratch)
            if stored is None:
                before = torch.addmm(b1, normalised, w1.t(), out=scratch("before", *wide))
            else:
                before = stored[i : i + ctx.rows]
            dw2.addmm_(dy.t(), _aten.gelu.out(before, out=scratch("after", *wide)))
            db2 += dy.sum(0)
            dafter = torch.mm(dy, w2, out=scratch("after", *wide))
            dbefore = _aten.gelu_backward.grad_input(
                dafter, before, grad_input=scratch("dbefore", *wide)
            )
            dw1.addmm_(dbefore.t(), normalised)
            db1 += dbefore.sum(0)
            inner = torch.mm(dbefore, w1, out=scratch("inner", *part.shape))
            torch.add(dy, _normalise_backward(inner, part, mean, rstd), out=dx[i : i + ctx.rows])
        return dx, dw1, db1, dw2, db2, None, None


class _AttentionBlock(torch.autograd.Function):
    """`attention_block` on bands of groups (one index along `down`), of one frame or several.

    The head is the first dim of all intermediate values: heads and groups form one batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wqkv: Tensor,
        bqkv: Tensor,
        wproj: Tensor,
        bproj: Tensor,
        split: tuple[int, ...],
        order: tuple[int, ...],
        eps: float | None,
    ) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, wqkv, bqkv, wproj)
        ctx.split = split
        ctx.order = order
        ctx.eps = eps
        out = torch.empty_like(x)
        scratch = _Scratch(x)
        views = [t.view(split).permute(order) for t in (x, out)]
        for part, result in _bands(wqkv.shape[0] * wqkv.shape[1], *views):
            cells = scratch("cells", *part.shape).copy_(part).flatten(0, -2)
            inputs = cells if eps is None else _normalise(cells, eps, scratch).values
            attention = _attend(inputs, part.shape[3] * part.shape[4], wqkv, bqkv, scratch)
            attended = attention.attended.view(len(wqkv), len(cells), -1)
            cells.add_(bproj).addbmm_(attended, wproj)
            result.copy_(cells.view(part.shape))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, wqkv, bqkv, wproj = ctx.saved_tensors
        heads = len(wqkv)
        gradient = gradients[0].contiguous()
        dx = torch.empty_like(x)
        dwqkv = torch.zeros_like(wqkv)
        dbqkv = torch.zeros_like(bqkv)
        dwproj = torch.zeros_like(wproj)
        dbproj = torch.zeros_like(wproj[0, 0])
        scratch = _Scratch(x)
        views = [t.view(ctx.split).permute(ctx.order) for t in (x, gradient, dx)]
        for part, dpart, result in _bands(wqkv.shape[0] * wqkv.shape[1], *views):
            cells = scratch("cells", *part.shape).copy_(part).flatten(0, -2)
            dy = scratch("dy", *part.shape).copy_(dpart).flatten(0, -2)
            normalised = None if ctx.eps is None else _normalise(cells, ctx.eps, scratch)
            inputs = cells if normalised is None else normalised.values
            positions = part.shape[3] * part.shape[4]
            qkv, weights, attended = _attend(inputs, positions, wqkv, bqkv, scratch)
            by_head = (heads, len(cells), attended.shape[-1])
            dy_by_head = dy.expand(heads, *dy.shape)
            dwproj.baddbmm_(attended.view(by_head).transpose(1, 2), dy_by_head)
            dbproj += dy.sum(0)
            dattended = torch.bmm(
                dy_by_head, wproj.transpose(1, 2), out=scratch("dattended", *by_head)
            )
            dqkv = scratch("dqkv", *qkv.shape)
            _attend_backward(dattended.view(attended.shape), qkv, weights, dqkv, scratch)
            dqkv = dqkv.view(heads, len(cells), -1)
            dwqkv.baddbmm_(dqkv.transpose(1, 2), inputs.expand(heads, *inputs.shape))
            dbqkv += dqkv.sum(1, keepdim=True)
            inner = scratch("inner", *cells.shape)
            torch.addbmm(inner, dqkv, wqkv, beta=0, out=inner)
            if normalised is not None:
                inner = _normalise_backward(inner, cells, normalised.mean, normalised.rstd)
            result.copy_(dy.add_(inner).view(part.shape))
        return dx, dwqkv, dbqkv, dwproj, dbproj, None, None, None


def _bands(width: int, *views: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of each view (N, down, across, rows, columns, C) whose cells fill CACHE_BYTES.

    Args:
        width: number of values per cell.
    """
    n, down, *band, _ = views[0].shape
    num_bands = CACHE_BYTES // (math.prod(band) * width * views[0].element_size())
    frames_at_once = max(1, num_bands // down)
    bands_at_once = min(down, max(1, num_bands))
    for i in range(0, n, frames_at_once):
        for j in range(0, down, bands_at_once):
            yield tuple(t[i : i + frames_at_once, j : j + bands_at_once] for t in views)


class _Attention(NamedTuple):
    """Intermediate values of attention; heads and groups are one dim, c channels per head.

    qkv: (heads * groups, positions, 3, c). weights: (heads * groups, positions, positions).
    attended: (heads * groups, positions, c).
    """

    qkv: Tensor
    weights: Tensor
    attended: Tensor


def _attend(x: Tensor, positions: int, wqkv: Tensor, bqkv: Tensor, scratch: _Scratch) -> _Attention:
    """Attention of cells (n, C), which form groups of `positions` cells."""
    heads, width, _ = wqkv.shape
    flat = scratch("qkv", heads, len(x), width)
    torch.baddbmm(bqkv, x.expand(heads, *x.shape), wqkv.transpose(1, 2), out=flat)
    qkv = flat.view(-1, positions, 3, width // 3)
    q, k, v = qkv.unbind(2)
    weights = scratch("weights", len(qkv), positions, positions)
    torch.baddbmm(weights, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5, out=weights)
    _aten._softmax.out(weights, -1, False, out=weights)
    attended = torch.bmm(weights, v, out=scratch("attended", *v.shape))
    return _Attention(qkv, weights, attended)


def _attend_backward(
    gradient: Tensor, qkv: Tensor, weights: Tensor, dqkv: Tensor, scratch: _Scratch
) -> None:
    """Fills dqkv, shaped as qkv, from the gradient of the attended values."""
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    scale = q.shape[-1] ** -0.5
    # A product, then a copy: torch writes products into strided memory matrix by matrix.
    product = scratch("product", *v.shape)
    dv.copy_(torch.bmm(weights.transpose(1, 2), gradient, out=product))
    change = torch.bmm(gradient, v.transpose(1, 2), out=scratch("change", *weights.shape))
    _aten._softmax_backward_data.out(change, weights, -1, change.dtype, grad_input=change)
    torch.mul(torch.bmm(change, k, out=product), scale, out=dq)
    torch.mul(torch.bmm(change.transpose(1, 2), q, out=product), scale, out=dk)
