"""Checks SLURM's settings: partition, time limit, preemption, requeueing, job records."""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from evspan.conf.schema.cluster import ClusterConfig
from evspan.launch.doctor.finding import FAIL, PASS, WARN, Finding, error_summary

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
TIMEOUT_S = 60  # an overloaded controller may take this long to answer
LEAST_RECORD_S = 60  # a command that waits for a job may miss its end if records are kept shorter
UNUSABLE_STATES = (
    "down",
    "drain",
    "fail",
    "unknown",
    "maint",
    "not_responding",
    "inval",
    "power",
)

Settings = dict[str, str]


def is_installed() -> bool:
    """Whether any of SLURM's commands is on the PATH."""
    return any(shutil.which(command) for command in COMMANDS)


def check_settings(partition: str, nodes: int) -> Iterator[Finding]:
    """Checks the commands, the controller and its settings.

    Args:
        partition: empty for the default partition.
        nodes: number of nodes of a run; 0 for any.
    """
    conf = os.environ.get("SLURM_CONF")
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        message = f"{', '.join(missing)} not on the PATH"
        remedy = "run this where jobs are submitted, such as a login node"
        yield Finding("SLURM", FAIL, message, remedy)
        return
    if conf and not Path(conf).is_file():  # the commands would wait a minute for it
        message = f"SLURM_CONF is {conf}, which does not exist"
        remedy = "unset it, or set it to the cluster's configuration file"
        yield Finding("SLURM", FAIL, message, remedy)
        return
    try:
        _output("scontrol", "ping")  # fails at once where other commands retry
        yield from _check_controller(partition, nodes)
    except subprocess.SubprocessError as error:
        output = getattr(error, "stderr", "") or getattr(error, "stdout", "") or str(error)
        reason = error_summary(str(output).splitlines())
        message = f"the controller does not answer: {reason}"
        remedy = (
            "ask whether slurmctld runs, and whether this machine has the cluster's configuration"
        )
        yield Finding("SLURM", FAIL, message, remedy)


def _check_controller(partition: str, nodes: int) -> Iterator[Finding]:
    config = parse_config(_output("scontrol", "show", "config"))
    output = _output("scontrol", "--all", "--oneliner", "show", "partition")  # hidden ones too
    partitions = [parse_fields(line) for line in output.splitlines() if line]
    version = config.get("SLURM_VERSION", "")
    yield Finding("SLURM", PASS, f"{version} of {config.get('ClusterName', '?')} answers")
    # A job gets the first of several partitions that can run it. In an allocation it is a step.
    names = partition or os.environ.get("SLURM_JOB_PARTITION", "")
    for name in names.split(","):
        yield from _check_partition(config, partitions, name, nodes)
    yield check_requeue(config)
    yield check_job_records(config)
    yield check_accounting(config)


def _check_partition(
    config: Settings, partitions: Sequence[Settings], name: str, nodes: int
) -> Iterator[Finding]:
    """Findings on one partition. name: empty for the default one."""
    selected = _select_partition(partitions, name)
    if selected is None:
        message = f"there is no partition {name!r}" if name else "there is no default partition"
        names = ", ".join(settings["PartitionName"] for settings in partitions)
        remedy = f"--partition (cluster.partition) must be one of {names}"
        yield Finding("partition", FAIL, message, remedy)
        return
    name = selected["PartitionName"]
    sinfo = _output("sinfo", "--noheader", f"--partition={name}", "--format=%D %T")
    yield check_partition(selected, nodes, _count_usable_nodes(sinfo))
    yield check_time_limit(selected, ClusterConfig())
    with_nodes_in_common = [
        other for other in partitions if share_nodes(selected, other, _expand_nodes)
    ]
    yield check_preemption(config, selected, with_nodes_in_common)


def share_nodes(
    partition: Settings, other: Settings, expand: Callable[[str], frozenset[str]]
) -> bool:
    """Whether two partitions have a node in common. True where SLURM does not list their nodes.

    Args:
        expand: a list of nodes such as 'g[1-8],c1' -> their names.
    """
    lists = (partition.get("Nodes", ""), other.get("Nodes", ""))
    if "" in lists or "(null)" in lists or lists[0] == lists[1]:
        return True
    return bool(expand(lists[0]) & expand(lists[1]))


def _expand_nodes(names: str) -> frozenset[str]:
    return frozenset(_output("scontrol", "show", "hostnames", names).split())


def _select_partition(partitions: Sequence[Settings], name: str) -> Settings | None:
    """The partition called `name`; the default one if it is empty."""
    for settings in partitions:
        if name and settings["PartitionName"] == name:
            return settings
        if not name and settings.get("Default") == "YES":
            return settings
    return None


# -- SLURM's output --------------------------------------------------------------------------------
def parse_config(output: str) -> Settings:
    """The settings in the output of `scontrol show config`."""
    settings = {}
    for line in output.splitlines():
        match = re.match(r"(\w+)\s*= ?(.*)", line)
        if match:
            settings[match[1]] = match[2].strip()
    return settings


def parse_fields(line: str) -> Settings:
    """The settings in a line of `scontrol --oneliner show`."""
    settings = {}
    for word in line.split():
        key, separator, value = word.partition("=")
        if separator:
            settings[key] = value
    return settings


def parse_seconds(duration: str) -> float:
    """Seconds of a duration that SLURM prints.

    Args:
        duration: DAYS-HOURS:MINUTES:SECONDS, 'N sec', a number of seconds, or a word such as
            UNLIMITED (infinite).
    """
    if re.fullmatch(r"(\d+-)?\d+:\d+(:\d+)?", duration):
        days, _, clock = duration.rpartition("-")
        total = 0
        for part in clock.split(":"):
            total = 60 * total + int(part)
        return 86_400 * int(days or 0) + total
    match = re.match(r"\d+", duration)
    return float(match[0]) if match else math.inf


def _count_usable_nodes(sinfo: str) -> int:
    """The number of nodes that run jobs or could."""
    count = 0
    for line in sinfo.splitlines():
        if not line.strip():
            continue
        nodes, state = line.split()
        if not state.lower().startswith(UNUSABLE_STATES) and "*" not in state:
            count += int(nodes)
    return count


def _output(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
    ).stdout


# -- checks ----------------------------------------------------------------------------------------
def check_partition(partition: Settings, nodes: int, usable: int) -> Finding:
    """Checks that the partition can run a job of this many nodes."""
    name = partition["PartitionName"]
    total = int(partition.get("TotalNodes", 0))
    max_nodes = partition.get("MaxNodes", "UNLIMITED")
    state = partition.get("State", "UP")
    if state != "UP":
        remedy = "name another partition (--partition, cluster.partition), or wait"
        return Finding("partition", FAIL, f"{name} is {state}", remedy)
    if max_nodes.isdigit() and nodes > int(max_nodes):
        message = f"{name}: a job may have {max_nodes} nodes, not {nodes}"
        return Finding("partition", FAIL, message, "ask for fewer, or name another partition")
    message = f"{name}: {usable} of {total} nodes run"
    if usable >= max(nodes, 1):
        return Finding("partition", PASS, message)
    if nodes:
        message += f", fewer than the {nodes} asked for"
    remedy = "ask for fewer nodes"
    if total >= nodes:
        remedy = "a job would wait for the others; why they are down: sinfo --list-reasons"
    return Finding("partition", FAIL, message, remedy)


def check_time_limit(partition: Settings, config: ClusterConfig) -> Finding:
    """Compares the partition's time limit with the defaults of the cluster config."""
    limit_s = parse_seconds(partition.get("MaxTime", "UNLIMITED"))
    name = partition["PartitionName"]
    signal = f"{config.signal_delay_s} s before its end"
    if limit_s == math.inf:
        message = f"none in {name}; cluster.timeout_min is {config.timeout_min} unless you set it"
        return Finding("time limit", PASS, message)
    message = f"{limit_s / 60:g} min in {name}"
    if limit_s <= config.signal_delay_s:
        message += f", but a run is signalled to save {signal} (cluster.signal_delay_s)"
        remedy = "name a partition with a longer limit, or lower cluster.signal_delay_s"
        return Finding("time limit", FAIL, message, remedy)
    if limit_s < 60 * config.timeout_min:
        message += f", less than the {config.timeout_min} of cluster.timeout_min"
        remedy = (
            f"set cluster.timeout_min={limit_s // 60:.0f} or less: SLURM refuses longer jobs, or "
            "never starts them; at its limit a run is saved and requeued"
        )
        return Finding("time limit", WARN, message, remedy)
    return Finding("time limit", PASS, f"{message}; a run is signalled to save {signal}")


def check_preemption(
    config: Settings, partition: Settings, partitions: Sequence[Settings]
) -> Finding:
    """Checks that a preempted run can save and is requeued."""
    name = partition["PartitionName"]
    mode = partition.get("PreemptMode", "OFF")
    plugin = config.get("PreemptType", "none").rpartition("/")[2]
    preemptors = plugin
    if plugin.endswith("partition_prio"):
        preemptors = ", ".join(_higher_partitions(partition, partitions))
    if plugin.endswith("none") or mode == "OFF" or not preemptors:
        return Finding("preemption", PASS, f"jobs of {name} are not preempted")
    grace_s = parse_seconds(partition.get("GraceTime", "0"))
    message = f"by {preemptors}: mode {mode}, GraceTime {grace_s:g} s"
    if "REQUEUE" not in mode:
        remedy = (
            "preempted runs are cancelled: with cluster.successor=true a dependent job continues "
            "each from its last checkpoint"
        )
        if "SUSPEND" in mode or "GANG" in mode:
            remedy = "preempted runs are suspended, with all their ranks"
        return Finding("preemption", WARN, message, remedy)
    if not grace_s:
        remedy = (
            "unless its QOS has a GraceTime, a preempted run is killed before it has saved: ask "
            "for one, or lose fewer steps with a lower checkpoint.every"
        )
        return Finding("preemption", WARN, message, remedy)
    signal = "SIGTERM"
    if "preempt_send_user_signal" in config.get("SlurmctldParameters", ""):
        signal = "its own signal"
    message += f"; {signal} makes a run save, and it is requeued"
    return Finding("preemption", PASS, message)


def _higher_partitions(partition: Settings, partitions: Sequence[Settings]) -> list[str]:
    """The partitions whose jobs may preempt those of `partition`."""
    own_tier = int(partition.get("PriorityTier", 1))
    names = []
    for other in partitions:
        if int(other.get("PriorityTier", 1)) > own_tier:
            names.append(other["PartitionName"])
    return names


def check_requeue(config: Settings) -> Finding:
    """Reports how SLURM requeues and kills jobs."""
    message = f"JobRequeue {config.get('JobRequeue', '?')}"
    if config.get("JobRequeue", "1") != "1":
        message += (
            ", which evspan's jobs override; where the site refuses that, cluster.successor=true "
            "continues runs in dependent jobs"
        )
    kill_wait_s = parse_seconds(config.get("KillWait", "30"))
    message += f"; KillWait {kill_wait_s:g} s from the time limit to the kill"
    return Finding("requeue", PASS, message)


def check_job_records(config: Settings) -> Finding:
    """Checks that SLURM keeps the records of ended jobs long enough to be read."""
    age_s = parse_seconds(config.get("MinJobAge", "300"))
    duration = f"for {age_s:g} s" if age_s else "for ever"
    remedy = (
        "commands that wait for jobs may miss their end; ask for a MinJobAge of "
        f"{LEAST_RECORD_S} s or more"
    )
    return Finding(
        "job records",
        WARN if 0 < age_s < LEAST_RECORD_S else PASS,
        f"those of ended jobs are kept {duration} (MinJobAge)",
        remedy,
    )


def check_accounting(config: Settings) -> Finding:
    """Reports the accounting plugin, which evspan does not need."""
    plugin = config.get("AccountingStorageType", "none").rpartition("/")[2].strip("()")
    return Finding("accounting", PASS, f"{plugin}; evspan does not need sacct")
