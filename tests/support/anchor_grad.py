"""Backward through tensors that a loss does not depend on, for ranks without labelled frames."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def anchor_grad(loss: Tensor, *others: Tensor) -> Tensor:
    """`loss`, whose backward also runs through `others`, with zero gradients.

    A rank must take part in backward even if its loss does not depend on what it sent or received.
    Nothing is multiplied: 0 * inf would be nan.
    """
    return _AnchorGrad.apply(loss, *(t for t in others if t.requires_grad))


class _AnchorGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, *others: Tensor) -> Tensor:
        ctx.like = [(t.shape, t.new_zeros(())) for t in others]
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(zero.expand(shape) for shape, zero in ctx.like)
