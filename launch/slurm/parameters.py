"""Parameters of Submitit's executor from the config of a cluster, the same for every command."""

import shlex
from typing import Any

from evspan.conf.schema.cluster import SlurmConfig

NAMED_OPTIONS = ("partition", "account", "qos", "constraint", "exclude")
MORE_OPTIONS = ("gres", "exclusive", "nice", "mail_type", "mail_user")  # without Submitit's checks
SRUN_OPTIONS = ("cpu_bind", "mem_bind", "gpu_bind")


def sbatch_parameters(cluster: SlurmConfig) -> dict[str, Any]:
    """Keyword arguments of `SlurmExecutor.update_parameters`.

    Nodes, tasks, GPUs and the job's name follow from what is run, and are the caller's.
    """
    parameters: dict[str, Any] = {
        "time": cluster.timeout_min,
        "cpus_per_task": cluster.cpus_per_task,
        "array_parallelism": cluster.array_parallelism,
        "signal_delay_s": cluster.signal_delay_s,
        "wckey": None,
        # From SLURM 22.05 on, srun does not take over the job's --cpus-per-task.
        "srun_args": [f"--cpus-per-task={cluster.cpus_per_task}"],
        "additional_parameters": {"requeue": True},
    }
    for name in NAMED_OPTIONS:
        if value := getattr(cluster, name):
            parameters[name] = value
    for name in MORE_OPTIONS:
        if value := getattr(cluster, name):
            parameters["additional_parameters"][name.replace("_", "-")] = value
    for name in SRUN_OPTIONS:
        if value := getattr(cluster, name):
            parameters["srun_args"].append(f"--{name.replace('_', '-')}={value}")
    if cluster.mem_gb:
        parameters["mem"] = f"{int(1024 * cluster.mem_gb)}MB"
    for option in cluster.sbatch_args:
        name, has_value, value = option.partition("=")
        parameters["additional_parameters"][name] = value if has_value else True
    return parameters


def setup_lines(cluster: SlurmConfig) -> list[str]:
    """Shell lines for the start of the batch script: `setup`, then `environment`.

    The tasks get the environment of the script. With SBATCH_EXPORT=NONE, the policy of some sites,
    srun would pass only SLURM's variables: no PATH, and nothing that the script has set.
    """
    lines = ["export SLURM_EXPORT_ENV=ALL", *cluster.setup]
    for setting in cluster.environment:
        name, _, value = setting.partition("=")
        lines.append(f"export {name}={shlex.quote(value)}")
    return lines
