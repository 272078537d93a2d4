"""Hydra's way to SLURM: `evspan train --multirun hydra/launcher=slurm key=a,b` does what `evspan sweep key=a,b` does."""

import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

SAME = {
    "timeout_min": "timeout_min",
    "cpus_per_task": "cpus_per_task",
    "array_parallelism": "array_parallelism",
    "additional_parameters": "sbatch_args",
}  # hydra-submitit-launcher's words for keys of `cluster`
ALIKE = ("partition", "account", "qos", "constraint", "exclude", "signal_delay_s", "setup")


class Launcher(SlurmLauncher):
    """hydra-submitit-launcher with what it lacks: ranks that find each other, requeues that continue in the same folder, runs
    that fail alone, containers, no waiting where cluster.detach asks for none."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from evspan.conf.compose import config_dir
        from evspan.launch.sweep.submit import place_sweep

        assert self.config is not None
        if further := self.params.get("additional_parameters"):
            self.params["additional_parameters"] = [
                f"{key}={value}" for key, value in further.items()
            ]
        given = [
            f"cluster.{ours}={_as_override(self.params[theirs])}"
            for theirs, ours in {**SAME, **{key: key for key in ALIKE}}.items()
            if self.params.get(theirs)
        ]
        several = [
            key
            for key in _keys(job_overrides[0])
            if len({_value(o, key) for o in job_overrides}) > 1
        ]
        options = config_dir(self.config.hydra)
        GlobalHydra.instance().clear()  # each run is composed anew, by itself
        code = place_sweep(options, [[*overrides, *given] for overrides in job_overrides], several)
        sys.exit(code)  # what became of each run is in its folder, not in this process


def register() -> None:
    """Hydra makes launchers of the package hydra_plugins alone, which this room is not part of."""
    name = Launcher.__module__ = "hydra_plugins.evspan"
    sys.modules[name] = sys.modules[__name__]
    Plugins.instance().register(Launcher)


def _keys(overrides: Sequence[str]) -> list[str]:
    return [override.partition("=")[0] for override in overrides]


def _value(overrides: Sequence[str], key: str) -> str:
    return next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == key), "")


def _as_override(value: Any) -> str:
    """In Hydra's grammar."""
    if isinstance(value, list):
        return "[" + ",".join(map(_as_override, value)) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return str(value)
