"""The residual blocks of an attention stage on CPU, in float32: from x to x + f(x) a part at a time, so that all between stays
in the cache. Memory that is touched for the first time costs a CPU more than the products that fill it.

Backward makes a part's inner values anew from x. What scales or shifts channels around a linear layer (LayerNorm's weight and
bias, LayerScale) is multiplied into the layer's weights, outside of the blocks, where autograd follows it.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

CACHE_BYTES = 2**21  # of a part's widest rows: the MLP's middle, or queries, keys and values
# Channels. To keep what a linear layer gives costs memory by its width, to make it anew costs work by its square: from here
# on the MLP keeps its middle, and attention, where torch's fused kernel does as well, is not for this block.
WIDE = 64

_aten = torch.ops.aten


def serves(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def mlp_block(
    x: Tensor, norm: nn.LayerNorm, first: nn.Linear, second: tuple[Tensor, Tensor]
) -> Tensor:
    """x + linear(GELU(linear(norm(x)))) of (..., C); `second`: weight and bias of the outer linear layer."""
    keep = torch.is_grad_enabled() and x.shape[-1] >= WIDE
    return cast(
        Tensor, _MLPBlock.apply(x.flatten(0, -2), *_after(norm, first), *second, norm.eps, keep)
    ).view(x.shape)


def attention_block(
    x: Tensor,
    split: tuple[int, ...],
    order: tuple[int, ...],
    norm: nn.Module,
    qkv: nn.Linear,
    proj: tuple[Tensor, Tensor],
    heads: int,
) -> Tensor:
    """x + proj(attention(qkv(norm(x)))) of (N, h, w, C), inside groups of cells.

    x.view(split).permute(order) is (N, down, across, rows, columns, C), a group being rows x columns cells. `norm`: LayerNorm or
    Identity. qkv is head-major; `proj`: weight and bias.
    """
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else None
    weight, bias = _after(norm, qkv) if isinstance(norm, nn.LayerNorm) else (qkv.weight, qkv.bias)
    weight, bias = weight.view(heads, -1, x.shape[-1]), bias.view(heads, 1, -1)
    out_weight = proj[0].unflatten(1, (heads, -1)).permute(1, 2, 0)  # (heads, c, C)
    return cast(
        Tensor, _AttentionBlock.apply(x, weight, bias, out_weight, proj[1], split, order, eps)
    )


def _after(norm: nn.LayerNorm, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of `layer` after the scale and shift of `norm`."""
    return layer.weight * norm.weight, torch.addmv(layer.bias, layer.weight, norm.bias)


class _Scratch:
    """Memory by name, for every part the same; the first part is the largest."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.kept = like, dict[str, Tensor]()

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.kept:
            self.kept[name] = self.like.new_empty(size)
        return self.kept[name][:size].view(shape)


def _normalise(x: Tensor, eps: float, scratch: _Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of rows (without scale and shift), mean, 1 / deviation; torch's kernel takes twice as long at 32 channels."""
    mean = x.mean(-1, keepdim=True)
    out = torch.sub(x, mean, out=scratch("normalised", *x.shape))
    squares = torch.mul(out, out, out=scratch("squares", *x.shape))
    rstd = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
    return out.mul_(rstd), mean, rstd


def _normalise_backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    only_x = [True, False, False]
    return cast(
        Tensor,
        _aten.native_layer_norm_backward(gradient, x, x.shape[1:], mean, rstd, None, None, only_x)[
            0
        ],
    )


class _MLPBlock(torch.autograd.Function):
    """Rows of x (rows, C). keep: what the GELU is taken of stays for backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, keep: bool
    ) -> Tensor:
        ctx.rows, ctx.eps = max(1, CACHE_BYTES // (len(w1) * x.element_size())), eps
        kept = x.new_empty(len(x), len(w1)) if keep else None
        ctx.save_for_backward(x, w1, b1, w2, kept)
        out, scratch = torch.empty_like(x), _Scratch(x)
        for i in range(0, len(x), ctx.rows):
            part = x[i : i + ctx.rows]
            wide = (len(part), len(w1))
            before = scratch("before", *wide) if kept is None else kept[i : i + ctx.rows]
            torch.addmm(b1, _normalise(part, eps, scratch)[0], w1.t(), out=before)
            after = _aten.gelu.out(before, out=scratch("after", *wide))
            torch.add(part, b2, out=out[i : i + ctx.rows]).addmm_(after, w2.t())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, kept = ctx.saved_tensors
        gradient, dx, scratch = gradients[0].contiguous(), torch.empty_like(x), _Scratch(x)
        dw1, db1, dw2, db2 = (
            torch.zeros_like(w1),
            torch.zeros_like(b1),
            torch.zeros_like(w2),
            x.new_zeros(len(w2)),
        )
        for i in range(0, len(x), ctx.rows):
            part, dy = x[i : i + ctx.rows], gradient[i : i + ctx.rows]
            wide = (len(part), len(w1))
            normalised, mean, rstd = _normalise(part, ctx.eps, scratch)
            if kept is None:
                before = torch.addmm(b1, normalised, w1.t(), out=scratch("before", *wide))
            else:
                before = kept[i : i + ctx.rows]
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
    """Whole bands of groups (one place `down`), of one frame or several. Heads come first: heads and groups are one batch."""

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
        ctx.split, ctx.order, ctx.eps = split, order, eps
        out, scratch = torch.empty_like(x), _Scratch(x)
        for part, result in _bands(
            wqkv.shape[0] * wqkv.shape[1],
            x.view(split).permute(order),
            out.view(split).permute(order),
        ):
            cells = scratch("cells", *part.shape).copy_(part).flatten(0, -2)
            inputs = cells if eps is None else _normalise(cells, eps, scratch)[0]
            attended = _attend(inputs, part.shape[3] * part.shape[4], wqkv, bqkv, scratch)[2]
            cells.add_(bproj).addbmm_(attended.view(len(wqkv), len(cells), -1), wproj)
            result.copy_(cells.view(part.shape))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, wqkv, bqkv, wproj = ctx.saved_tensors
        dx, scratch = torch.empty_like(x), _Scratch(x)
        dwqkv, dbqkv, dwproj, dbproj = (
            torch.zeros_like(t) for t in (wqkv, bqkv, wproj, wproj[0, 0])
        )
        views = (t.view(ctx.split).permute(ctx.order) for t in (x, gradients[0].contiguous(), dx))
        for part, dpart, result in _bands(wqkv.shape[0] * wqkv.shape[1], *views):
            cells = scratch("cells", *part.shape).copy_(part).flatten(0, -2)
            dy = scratch("dy", *part.shape).copy_(dpart).flatten(0, -2)
            normalised = None if ctx.eps is None else _normalise(cells, ctx.eps, scratch)
            inputs = cells if normalised is None else normalised[0]
            qkv, weights, attended = _attend(
                inputs, part.shape[3] * part.shape[4], wqkv, bqkv, scratch
            )
            by_head = (len(wqkv), len(cells), attended.shape[-1])
            dwproj.baddbmm_(attended.view(by_head).transpose(1, 2), dy.expand(len(wqkv), *dy.shape))
            dbproj += dy.sum(0)
            dattended = torch.bmm(
                dy.expand(len(wqkv), *dy.shape),
                wproj.transpose(1, 2),
                out=scratch("dattended", *by_head),
            )
            dqkv = scratch("dqkv", *qkv.shape)
            _attend_backward(dattended.view(attended.shape), qkv, weights, dqkv, scratch)
            dqkv = dqkv.view(len(wqkv), len(cells), -1)
            dwqkv.baddbmm_(dqkv.transpose(1, 2), inputs.expand(len(wqkv), *inputs.shape))
            dbqkv += dqkv.sum(1, keepdim=True)
            inner = scratch("inner", *cells.shape)
            torch.addbmm(inner, dqkv, wqkv, beta=0, out=inner)
            if normalised is not None:
                inner = _normalise_backward(inner, cells, *normalised[1:])
            result.copy_(dy.add_(inner).view(part.shape))
        return dx, dwqkv, dbqkv, dwproj, dbproj, None, None, None


def _bands(width: int, *views: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of (N, down, across, rows, columns, C) whose cells, `width` values each, fill CACHE_BYTES."""
    n, down, *band, _ = views[0].shape
    fit = CACHE_BYTES // (math.prod(band) * width * views[0].element_size())  # bands
    frames, bands = max(1, fit // down), min(down, max(1, fit))
    for i in range(0, n, frames):
        for j in range(0, down, bands):
            yield tuple(t[i : i + frames, j : j + bands] for t in views)


def _attend(
    x: Tensor, positions: int, wqkv: Tensor, bqkv: Tensor, scratch: _Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """(cells, C) -> queries, keys and values (heads * groups, positions, 3, c), weights of the values, attended values."""
    heads, width, _ = wqkv.shape
    qkv = scratch("qkv", heads, len(x), width)
    torch.baddbmm(bqkv, x.expand(heads, *x.shape), wqkv.transpose(1, 2), out=qkv)
    qkv = qkv.view(-1, positions, 3, width // 3)
    q, k, v = qkv.unbind(2)
    weights = scratch("weights", len(qkv), positions, positions)
    torch.baddbmm(weights, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5, out=weights)
    _aten._softmax.out(weights, -1, False, out=weights)
    return qkv, weights, torch.bmm(weights, v, out=scratch("attended", *v.shape))


def _attend_backward(
    gradient: Tensor, qkv: Tensor, weights: Tensor, dqkv: Tensor, scratch: _Scratch
) -> None:
    """Fills dqkv from the gradient of the attended values."""
    (q, k, v), (dq, dk, dv) = qkv.unbind(2), dqkv.unbind(2)
    scale = q.shape[-1] ** -0.5
    product = scratch(
        "product", *v.shape
    )  # and a copy: into strided memory torch multiplies matrix by matrix
    dv.copy_(torch.bmm(weights.transpose(1, 2), gradient, out=product))
    change = torch.bmm(gradient, v.transpose(1, 2), out=scratch("change", *weights.shape))
    _aten._softmax_backward_data.out(change, weights, -1, change.dtype, grad_input=change)
    torch.mul(torch.bmm(change, k, out=product), scale, out=dq)
    torch.mul(torch.bmm(change.transpose(1, 2), q, out=product), scale, out=dk)
