"""SLURM's settings, against what runs need that are stopped, saved and run again."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from evspan.conf.schema.cluster import ClusterConfig
from evspan.launch.doctor.finding import FAIL, PASS, WARN, Finding, complaint

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
ANSWER_S = 60  # a controller at its limit may take so long
RECORDS_S = 60  # for less, what waits for a job may miss its end
DOWN = ("down", "drain", "fail", "unknown", "maint", "not_responding", "inval", "power")

Values = dict[str, str]


def there() -> bool:
    return any(shutil.which(command) for command in COMMANDS)


def check(partition: str, nodes: int) -> Iterator[Finding]:
    """partition: empty for the default one. nodes: of a run; 0 for any."""
    conf = os.environ.get("SLURM_CONF")
    if missing := [command for command in COMMANDS if shutil.which(command) is None]:
        yield Finding(
            "SLURM",
            FAIL,
            f"{', '.join(missing)} not on the PATH",
            "run this where jobs are submitted, such as a login node",
        )
    elif conf and not Path(conf).is_file():  # which the commands would wait a minute for
        yield Finding(
            "SLURM",
            FAIL,
            f"SLURM_CONF is {conf}, which is not there",
            "unset it, or name the cluster's configuration",
        )
    else:
        try:
            _ask("scontrol", "ping")  # fails at once where others would try again and again
            yield from _settings(partition, nodes)
        except subprocess.SubprocessError as error:
            told = getattr(error, "stderr", "") or getattr(error, "stdout", "") or str(error)
            yield Finding(
                "SLURM",
                FAIL,
                f"the controller does not answer: {complaint(str(told).splitlines())}",
                "ask whether slurmctld runs, and whether this machine has the cluster's configuration",
            )


def _settings(partition: str, nodes: int) -> Iterator[Finding]:
    config = settings(_ask("scontrol", "show", "config"))
    partitions = [
        fields(line)
        for line in _ask("scontrol", "--oneliner", "show", "partition").splitlines()
        if line
    ]
    yield Finding(
        "SLURM",
        PASS,
        f"{config.get('SLURM_VERSION', '')} of {config.get('ClusterName', '?')} answers",
    )
    chosen = [
        p
        for p in partitions
        if (p["PartitionName"] == partition if partition else p.get("Default") == "YES")
    ]
    if chosen:
        usable = _usable(
            _ask(
                "sinfo", "--noheader", f"--partition={chosen[0]['PartitionName']}", "--format=%D %T"
            )
        )
        yield partition_of(chosen[0], nodes, usable)
        yield time_limit(chosen[0], ClusterConfig())
        yield preemption(config, chosen[0], partitions)
    else:
        yield Finding(
            "partition",
            FAIL,
            f"there is no partition {partition!r}"
            if partition
            else "there is no default partition",
            f"--partition (cluster.partition) is to be one of {', '.join(p['PartitionName'] for p in partitions)}",
        )
    yield from (requeue(config), records(config), accounting(config))


def settings(told: str) -> Values:
    """Of `scontrol show config`."""
    return {
        m[1]: m[2].strip()
        for line in told.splitlines()
        if (m := re.match(r"(\w+)\s*= ?(.*)", line))
    }


def fields(told: str) -> Values:
    """Of a line of `scontrol --oneliner show`."""
    return dict(word.split("=", 1) for word in told.split() if "=" in word)


def seconds(time: str) -> float:
    """DAYS-HOURS:MINUTES:SECONDS, as SLURM writes times, 'N sec', or a number of seconds."""
    if re.fullmatch(r"(\d+-)?\d+:\d+(:\d+)?", time):
        days, _, rest = time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        return 86400 * int(days or 0) + sum(part * 60**i for i, part in enumerate(reversed(parts)))
    return (
        float(m[0]) if (m := re.match(r"\d+", time)) else float("inf")
    )  # UNLIMITED, INFINITE, NONE


def _usable(told: str) -> int:
    """Nodes that run jobs or could, of `sinfo`."""
    lines = (line.split() for line in told.splitlines() if line.strip())
    return sum(
        int(number)
        for number, state in lines
        if not state.lower().startswith(DOWN) and "*" not in state
    )


def partition_of(partition: Values, nodes: int, usable: int) -> Finding:
    name, total, most = (
        partition["PartitionName"],
        int(partition.get("TotalNodes", 0)),
        partition.get("MaxNodes", "UNLIMITED"),
    )
    found, state = f"{name}: {usable} of {total} nodes run", partition.get("State", "UP")
    if state != "UP":
        return Finding(
            "partition",
            FAIL,
            f"{name} is {state}",
            "name another (--partition, cluster.partition), or wait for it",
        )
    if most.isdigit() and nodes > int(most):
        return Finding(
            "partition",
            FAIL,
            f"{name}: a job may have {most} nodes, not {nodes}",
            "ask for fewer, or name another partition",
        )
    if usable < max(nodes, 1):
        return Finding(
            "partition",
            FAIL,
            found + (f", fewer than the {nodes} asked for" if nodes else ""),
            "ask for fewer nodes"
            if total < nodes
            else "a job would wait for the others; why they are down: sinfo --list-reasons",
        )
    return Finding("partition", PASS, found)


def time_limit(partition: Values, config: ClusterConfig) -> Finding:
    most, name = seconds(partition.get("MaxTime", "UNLIMITED")), partition["PartitionName"]
    if most == float("inf"):
        return Finding(
            "time limit",
            PASS,
            f"none in {name}; cluster.timeout_min is {config.timeout_min} unless you set it",
        )
    found = f"{most / 60:g} min in {name}"
    if most <= config.signal_delay_s:
        return Finding(
            "time limit",
            FAIL,
            f"{found}, but a run is told to save {config.signal_delay_s} s before its end "
            "(cluster.signal_delay_s)",
            "name a partition with a longer limit, or lower cluster.signal_delay_s",
        )
    if most < 60 * config.timeout_min:
        return Finding(
            "time limit",
            WARN,
            f"{found}, less than the {config.timeout_min} of cluster.timeout_min",
            f"set cluster.timeout_min={most // 60:.0f} or less: SLURM refuses longer jobs, or never starts them; at its "
            "limit a run is saved and requeued",
        )
    return Finding(
        "time limit",
        PASS,
        f"{found}; a run is told to save {config.signal_delay_s} s before its end",
    )


def preemption(config: Values, partition: Values, partitions: list[Values]) -> Finding:
    kind, mode, name = (
        config.get("PreemptType", "none"),
        partition.get("PreemptMode", "OFF"),
        partition["PartitionName"],
    )
    tier = int(partition.get("PriorityTier", 1))
    above = [p["PartitionName"] for p in partitions if int(p.get("PriorityTier", 1)) > tier]
    by_partition = kind.endswith("partition_prio")
    if kind.endswith("none") or mode == "OFF" or (by_partition and not above):
        return Finding("preemption", PASS, f"jobs of {name} are not preempted")
    grace, by = (
        seconds(partition.get("GraceTime", "0")),
        ", ".join(above) if by_partition else kind.rpartition("/")[2],
    )
    found = f"by {by}: mode {mode}, GraceTime {grace:g} s"
    if "REQUEUE" not in mode:
        still = "SUSPEND" in mode or "GANG" in mode
        return Finding(
            "preemption",
            WARN,
            found,
            "preempted runs are suspended, and their ranks with them"
            if still
            else "preempted runs are cancelled: submit them again, they go on from their last checkpoint",
        )
    if not grace:
        return Finding(
            "preemption",
            WARN,
            found,
            "unless its QOS has a GraceTime, a preempted run is killed before it has "
            "saved: have one set, or lose fewer steps by a lower checkpoint.every",
        )
    signal = (
        "its own signal"
        if "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
        else "SIGTERM"
    )
    return Finding("preemption", PASS, f"{found}; {signal} tells a run to save, and it is requeued")


def requeue(config: Values) -> Finding:
    overruled = "" if config.get("JobRequeue", "1") == "1" else ", which evspan's jobs overrule"
    return Finding(
        "requeue",
        PASS,
        f"JobRequeue {config.get('JobRequeue', '?')}{overruled}; KillWait "
        f"{seconds(config.get('KillWait', '30')):g} s from the time limit to the kill",
    )


def records(config: Values) -> Finding:
    age = seconds(config.get("MinJobAge", "300"))
    return Finding(
        "job records",
        WARN if 0 < age < RECORDS_S else PASS,
        f"those of ended jobs are kept {f'for {age:g} s' if age else 'for ever'} (MinJobAge)",
        f"commands that wait for jobs may miss their end; have MinJobAge raised to {RECORDS_S} s or more",
    )


def accounting(config: Values) -> Finding:
    kind = config.get("AccountingStorageType", "none")
    return Finding(
        "accounting", PASS, f"{kind.rpartition('/')[2].strip('()')}; evspan does without sacct"
    )


def _ask(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=ANSWER_S
    ).stdout
