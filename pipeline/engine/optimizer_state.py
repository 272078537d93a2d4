"""Adam's moments and the schedule, by parameter name, for any ZeRO stage."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from evspan.pipeline.engine import deepspeed_adapter as adapter
from evspan.pipeline.engine.adam import AVERAGE, MOMENTS, LearningRateSchedule, SkippableAdamW
from evspan.pipeline.engine.host_copies import CopyToHost, copy_as_float32, copy_now
from evspan.pipeline.parallel.reductions import sum_over_ranks
from evspan.pipeline.parallel.world import World
from torch import Tensor, nn


class OptimizerState:
    """The state of the optimizer between steps, independent of ranks and ZeRO stages.

    Args:
        engine: DeepSpeed's.
        trained: the parameters that `adam` was made for, in its order. DeepSpeed replaces them.
        has_average: whether Adam's state contains an average of the weights, too.
    """

    def __init__(
        self,
        engine: Any,
        adam: SkippableAdamW,
        schedule: LearningRateSchedule,
        trained: list[nn.Parameter],
        stage: int,
        world: World,
        *,
        has_average: bool,
    ) -> None:
        self.engine = engine
        self.adam = adam
        self.schedule = schedule
        self.stage = stage
        self.world = world
        module: nn.Module = engine.module
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        updated = adapter.adam_parameters(engine, adam, stage=stage)
        # In stage 0, the float32 tensor that Adam updates for each parameter of the module.
        self.masters = dict(zip(trained, updated, strict=True)) if stage == 0 else {}
        self.updated = updated
        self.states = [adam.state[p] for p in updated]
        self.has_average = has_average
        self._allocate(updated)
        adapter.link_adam_state(engine, stage=stage)

    def _allocate(self, updated: list[Tensor]) -> None:
        """Allocates Adam's state, which Adam itself would allocate in its first step.

        So it can be loaded before that step, and too little memory ends the run at its start.
        """
        for parameter, state in zip(updated, self.states, strict=True):
            if not state:
                # The fused kernel counts on the device.
                device = parameter.device if self.adam.is_fused else "cpu"
                state["step"] = torch.zeros((), device=device)
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)
            if self.has_average:
                state[AVERAGE] = torch.zeros_like(parameter.data)

    def weights(self, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """The float32 weights by parameter name, copied by `copy` on every rank. A collective."""
        return self._gather(None, copy)

    def moments(self, *, keep: bool, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """exp_avg/NAME and exp_avg_sq/NAME, float32 in the parameter's shape. A collective.

        Args:
            keep: whether this rank needs them; {} otherwise. copy: of the whole tensors.
        """
        moments: dict[str, Tensor] = {}
        for key in MOMENTS:
            tensors = self._gather(key, copy)
            if keep:
                moments |= {f"{key}/{name}": tensor for name, tensor in tensors.items()}
        return moments

    def counters(self) -> dict[str, Any]:
        """Numbers of updates, as JSON values."""
        return {
            "updates": self.schedule.updates,
            "adam_steps": int(max(state["step"] for state in self.states)),
            "loss_scale": {},  # part of the format; float16 had one
        }

    def averaged(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's float32 tensors that Adam updates, and for each its average; [] without."""
        if not self.has_average:
            return []
        return [(p, state[AVERAGE]) for p, state in zip(self.updated, self.states, strict=True)]

    def averages(self, copy: CopyToHost = copy_now) -> dict[str, Tensor]:
        """Averages by parameter name, float32, copied by `copy` on every rank. A collective."""
        return self._gather(AVERAGE, copy)

    def restore_averages(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `averages`, of any ranks and ZeRO stage."""
        for name, parameter in self.parameters.items():
            self._set(parameter, AVERAGE, tensors[name])

    def restore(
        self, weights: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, Any]
    ) -> None:
        """The inverse of `weights`, `moments` and `counters`, of any ranks and ZeRO stage."""
        for name, parameter in self.parameters.items():
            self._set(parameter, None, weights[name])
            for key in MOMENTS:
                self._set(parameter, key, moments[f"{key}/{name}"])
        for state in self.states:
            state["step"].fill_(counters["adam_steps"])
        self.schedule.set(counters["updates"])

    @torch.no_grad()
    def _gather(self, key: str | None, copy: CopyToHost) -> dict[str, Tensor]:
        """Adam's state `key` of all parameters, or the float32 parameters, copied by `copy`.

        One collective for all of them: one per parameter took a second over gloo.
        """
        if self.stage == 0:
            whole = {name: self._stage_0_tensor(p, key) for name, p in self.parameters.items()}
            return copy_as_float32(whole, copy)
        sizes = [
            adapter.padded_numel(p, stage=self.stage, ranks=self.world.size)
            for p in self.parameters.values()
        ]
        # Each rank fills in its own parts, so that the sum over ranks is the whole.
        flat = torch.zeros(sum(sizes), device=self.world.device)
        for parameter, target in zip(self.parameters.values(), _split(flat, sizes), strict=True):
            part = adapter.read_part(parameter, key, stage=self.stage, rank=self.world.rank)
            target[part.start : part.start + part.values.numel()] = part.values.to(target)
        flat = copy(sum_over_ranks(flat, name="weights and moments to save"), is_temporary=True)
        gathered = {}
        for (name, parameter), padded in zip(
            self.parameters.items(), _split(flat, sizes), strict=True
        ):
            shape = adapter.whole_shape(parameter, stage=self.stage)
            gathered[name] = padded[: math.prod(shape)].view(tuple(shape))
        return gathered

    def _stage_0_tensor(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        master = self.masters[parameter]
        return master if key is None else cast(Tensor, self.adam.state[master][key])

    def _set(self, parameter: nn.Parameter, key: str | None, whole: Tensor) -> None:
        if self.stage == 0:
            self._stage_0_tensor(parameter, key).data.copy_(whole)
        else:
            adapter.write_whole(parameter, key, whole, stage=self.stage, rank=self.world.rank)


def _split(flat: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """(n,) -> one part per size. Tensor.split has no type annotations."""
    return torch.split(flat, sizes)
