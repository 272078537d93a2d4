"""Hydra's launcher `slurm`: `evspan train --multirun hydra/launcher=slurm key=a,b`.

It does what `evspan sweep key=a,b` does. Verified against hydra-submitit-launcher 1.2.0.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from evspan.conf.errors import ConfigError
from evspan.conf.text import quote_override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

VERIFIED_VERSION = "1.2.0"
PLUGIN_MODULE = "hydra_plugins.evspan"  # Hydra instantiates launchers of hydra_plugins only
CLUSTER_KEYS = {  # key of hydra-submitit-launcher -> key of our `cluster`
    "timeout_min": "timeout_min",
    "cpus_per_task": "cpus_per_task",
    "gpus_per_node": "gpus_per_node",
    "mem_gb": "mem_gb",
    "array_parallelism": "array_parallelism",
    "additional_parameters": "sbatch_args",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "gres": "gres",
    "signal_delay_s": "signal_delay_s",
    "setup": "setup",
}
KEYS_OF_YAML = ("submitit_folder", "name")  # conf/hydra/launcher/slurm.yaml sets them
NODES_REMEDY = "leave it out: the number of nodes follows from parallel.ranks"
# Keys of hydra-submitit-launcher without a counterpart -> what to do instead.
REMEDIES = {
    "nodes": NODES_REMEDY,
    "tasks_per_node": f"{NODES_REMEDY} and cluster.ranks_per_node",
    "gpus_per_task": "set cluster.gpus_per_node, of which each rank gets one",
    "cpus_per_gpu": "set cluster.cpus_per_task, which counts per rank",
    "mem_per_gpu": "set cluster.mem_gb, which counts per node",
    "mem_per_cpu": "set cluster.mem_gb, which counts per node",
    "max_num_timeout": "set cluster.max_retries: time limits requeue a run while it makes progress",
    "stderr_to_stdout": "leave it out: both are always in one file",
}


class Launcher(SlurmLauncher):  # type: ignore[misc, unused-ignore]  # it has no types
    """Submits the runs of a sweep as `evspan sweep` does.

    hydra-submitit-launcher lacks ranks that find each other, requeues that continue in the same
    folder, runs that fail alone, containers, and `cluster.detach`.
    """

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submit all jobs, and end this process with their exit code.

        Results are in the folders of the runs, not in this process.
        """
        from evspan.conf.compose import multirun_config_dir
        from evspan.conf.hydra_adapter import Expansion
        from evspan.launch.sweep.submit import submit_sweep

        assert self.config is not None
        cluster = cluster_overrides(self.params)
        combinations = [[*overrides, *cluster] for overrides in job_overrides]
        expansion = Expansion(combinations, _swept_keys(job_overrides))
        sys.exit(submit_sweep(expansion, multirun_config_dir(self.config.hydra)))


def register() -> None:
    """Make Hydra find the launcher under the name that conf/hydra/launcher/slurm.yaml has."""
    Launcher.__module__ = PLUGIN_MODULE
    sys.modules[PLUGIN_MODULE] = sys.modules[__name__]
    Plugins.instance().register(Launcher)


def cluster_overrides(parameters: dict[str, Any]) -> list[str]:
    """Overrides of `cluster` from the parameters of hydra-submitit-launcher.

    Raises:
        ConfigError: a key is set that no key of `cluster` corresponds to.
    """
    _refuse_other_keys(parameters)
    overrides = []
    for name, key in CLUSTER_KEYS.items():
        value = parameters.get(name)
        if name == "additional_parameters" and value:
            value = _sbatch_args(value)
        if value or value == 0:  # None, "" and empty lists leave the value of `cluster`
            overrides.append(f"cluster.{key}={_as_override(value)}")
    return overrides


def _refuse_other_keys(parameters: Mapping[str, Any]) -> None:
    """Raises ConfigError for a key whose value would be dropped."""
    defaults = vars(SlurmQueueConf())
    for name, value in parameters.items():
        if name in CLUSTER_KEYS or name in KEYS_OF_YAML or value == defaults.get(name):
            continue
        raise ConfigError(f"hydra.launcher.{name}={value} has no effect here; {_remedy(name)}")


def _remedy(name: str) -> str:
    """What to do instead of setting hydra.launcher.NAME."""
    option = name.replace("_", "-")
    as_argument = f"'+hydra.launcher.additional_parameters={{{option}: VALUE}}'"
    return REMEDIES.get(name, f"if it is an option of sbatch, use {as_argument}")


def _sbatch_args(parameters: Mapping[str, Any]) -> list[str]:
    """Arguments of sbatch as Submitit writes them: the bare name of a flag, else name=value."""
    args = []
    for name, value in parameters.items():
        option = name.replace("_", "-")
        if value is True:
            args.append(option)
        elif value is not None and value is not False:
            args.append(f"{option}={value}")
    return args


def _swept_keys(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """Keys whose values differ between the jobs."""
    values: dict[str, set[str]] = {}
    for overrides in job_overrides:
        for override in overrides:
            key, _, value = override.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, different in values.items() if len(different) > 1]


def _as_override(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(_as_override(item) for item in value)}]"
    if isinstance(value, str):
        return quote_override(value)
    return str(value)
