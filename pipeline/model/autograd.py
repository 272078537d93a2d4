"""A typed call of a custom autograd function."""

from typing import Any

import torch


def run_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`: its forward now, its backward when gradients flow."""
    return function.apply(*args)  # type: ignore[no-untyped-call]  # torch does not annotate it
