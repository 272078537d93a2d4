"""Selects parameters by patterns over their names: which are frozen, and learning-rate multipliers.

A pattern is that of a file name (fnmatch): * is any text, dots included, ? one character, [ab] one
of several. "backbone.stages.0.*" is the first stage, "*.gate" every gate.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from evspan.conf.errors import UserError
from evspan.conf.schema.training import ModelConfig, TrainConfig
from evspan.conf.text import printable
from torch import nn

FREEZE = "training.freeze"
MULTIPLIERS = "optimizer.lr_multipliers"
SUGGESTIONS = 3  # names that a pattern without a match may mean
GATE = ".gate"  # end of the name of a gate of small-object attention


@dataclass(frozen=True)
class Frozen:
    """What is frozen of a model.

    names: of the parameters. tensors, elements: of all parameters of the model.
    """

    names: list[str]
    frozen_elements: int
    tensors: int
    elements: int
    norms: int
    patterns: Sequence[str]

    def summary(self) -> str:
        """'frozen: 12 of 437 tensors, 0.31 of 4.40 M parameters: backbone.stages.0.*'."""
        text = (
            f"frozen: {len(self.names)} of {self.tensors} tensors, "
            f"{self.frozen_elements / 1e6:.2f} of {self.elements / 1e6:.2f} M parameters: "
            f"{', '.join(map(printable, self.patterns))}"
        )
        if self.norms:
            text += f"; BatchNorms that keep their statistics: {self.norms}"
        return text


def freeze(model: nn.Module, patterns: Sequence[str]) -> Frozen | None:
    """Freezes the parameters that a pattern matches. The parameters are whole.

    They get no gradient. A BatchNorm whose weight and bias are both frozen stays in eval mode: it
    normalises with its running statistics and does not change them.

    Returns:
        None without patterns.

    Raises:
        UserError: a pattern matches nothing, or nothing is left to train.
    """
    # Imported where it is used: a check of patterns needs no model.
    from evspan.pipeline.model.norm import BatchNorm2d

    if not patterns:
        return None
    parameters = dict(model.named_parameters())
    names = frozen_names(parameters.keys(), patterns)
    for name in names:
        parameters[name].requires_grad_(False)
    norms = 0
    for module in model.modules():
        if isinstance(module, BatchNorm2d) and not (
            module.weight.requires_grad or module.bias.requires_grad
        ):
            module.freeze()
            norms += 1
    return Frozen(
        names,
        sum(parameters[name].numel() for name in names),
        len(parameters),
        sum(parameter.numel() for parameter in parameters.values()),
        norms,
        patterns,
    )


def frozen_names(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    """The names that a pattern of `training.freeze` matches.

    Raises:
        UserError: a pattern matches nothing, or nothing is left to train.
    """
    _check_matches(FREEZE, patterns, names)
    frozen = [name for name in names if _matches(name, patterns)]
    if patterns and len(frozen) == len(names):
        raise UserError(
            f"{FREEZE}={_listed(patterns)} freezes all {len(names)} parameter tensors; leave some "
            "of them to be trained"
        )
    return frozen


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class LearningRates:
    """The learning rate of each parameter as a multiple of `optimizer.lr`.

    Of several patterns that match a name, the last one counts, so that a general pattern is given
    before a special one. Gates are also multiplied by `gate_lr_multiplier`.

    Raises:
        UserError: a pattern matches nothing.
    """

    def __init__(
        self, names: Collection[str], multipliers: Mapping[str, float], *, of_gates: float = 1.0
    ) -> None:
        _check_matches(MULTIPLIERS, multipliers, names)
        self.multipliers = multipliers
        self.of_gates = of_gates

    def multiplier(self, name: str) -> float:
        """Of a parameter."""
        factor = 1.0
        for pattern, value in self.multipliers.items():
            if fnmatchcase(name, pattern):
                factor = value
        return factor * self.of_gates if name.endswith(GATE) else factor


def check_patterns(config: TrainConfig, channels: int) -> None:
    """Checks the patterns of a config before a rank starts.

    Args:
        channels: of the frames.

    Raises:
        UserError: one matches nothing, or nothing is left to train.
    """
    if not config.training.freeze and not config.optimizer.lr_multipliers:
        return
    names = parameter_names(config.model, channels)
    frozen = set(frozen_names(names, config.training.freeze))
    trained = [name for name in names if name not in frozen]
    LearningRates(trained, config.optimizer.lr_multipliers)


def parameter_names(model: ModelConfig, channels: int) -> list[str]:
    """The names of a detector's parameters."""
    import torch
    from evspan.pipeline.model.detector import Detector

    with torch.device("meta"):
        return [name for name, _ in Detector(model, channels).named_parameters()]


def _check_matches(key: str, patterns: Collection[str], names: Collection[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = ", ".join(_nearest(pattern, names))
            kind = "trained parameters" if key == MULTIPLIERS else "parameters"
            raise UserError(
                f"{key}: {printable(pattern)[:200]!r} matches none of the {len(names)} {kind}; "
                f"near it: {near}"
            )


def _nearest(pattern: str, names: Collection[str]) -> list[str]:
    """Patterns and names that exist."""
    modules: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts)):
            modules[".".join(parts[:length]) + ".*"] = None
    candidates = [*modules, *names]
    near = difflib.get_close_matches(pattern[:200], candidates, SUGGESTIONS, cutoff=0.5)
    return near or list(modules)[:SUGGESTIONS]


def _listed(patterns: Sequence[str]) -> str:
    return printable(f"[{','.join(patterns)}]")[:200]
