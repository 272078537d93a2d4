"""Combines the findings of a job's tasks: the worst per check, and what only a comparison shows."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from evspan.launch.doctor.finding import FAIL, GRADES, PASS, WARN, Finding, worst
from evspan.launch.doctor.folder import SET_CLOCKS, SHARED_FOLDER, SKEW_S
from evspan.launch.doctor.links import judge_links

LAST_CHECK = "all-reduce"  # the check that every task ends with
GROUPS_SHOWN = 3  # groups of nodes with different results that a message lists
NODES_SHOWN = 4
SLOW_GB_PER_S = 0.1  # about the speed of Ethernet at 1 Gbit/s


class TaskFinding(NamedTuple):
    """A finding of one task of the job."""

    rank: int
    node: str
    finding: Finding


def judge(
    task_findings: Sequence[TaskFinding],
    size: int,
    versions_here: Finding,
    srun_errors: str,
    unreadable: int,
) -> list[Finding]:
    """One finding per check of a job.

    Args:
        size: number of tasks that were started.
        versions_here: the versions on the machine that started them.
        srun_errors: error messages of srun; may be empty.
        unreadable: number of tasks whose files in the shared folder this machine cannot read.
    """
    by_check = _grouped(task_findings, lambda item: item.finding.check)
    combined = {check: combine(items) for check, items in by_check.items()}
    shared_folder = combined.get("shared folder")
    if unreadable and shared_folder is not None and shared_folder.grade == PASS:
        message = f"the files of {unreadable} of {size} tasks cannot be read here"
        combined["shared folder"] = Finding("shared folder", FAIL, message, SHARED_FOLDER)
    if "versions" in combined:
        combined["versions"] = compare_versions(by_check["versions"], versions_here)
    if "network" in combined:
        combined["network"] = compare_networks(by_check["network"], combined["network"])
    if LAST_CHECK in combined:
        _judge_all_reduce(by_check, combined)
    return [all_tasks_reported(task_findings, size, srun_errors), *combined.values()]


def _judge_all_reduce(by_check: dict[str, list[TaskFinding]], combined: dict[str, Finding]) -> None:
    """Adds the speed of the all-reduce, of links and the clocks to `combined`."""
    if combined[LAST_CHECK].grade == PASS:
        combined[LAST_CHECK] = compare_all_reduce(by_check[LAST_CHECK], by_check.get("network", []))
        combined["clocks"] = compare_clocks(by_check[LAST_CHECK])
        for link in compare_links(by_check[LAST_CHECK], by_check.get("network", [])):
            combined[link.check] = link
        return
    address = combined.get("MASTER_ADDR")
    if address is not None and address.grade == WARN:
        # The address that was used instead of the name has not worked either.
        combined["MASTER_ADDR"] = replace(address, grade=FAIL)


def all_tasks_reported(
    task_findings: Sequence[TaskFinding], size: int, srun_errors: str
) -> Finding:
    """Checks that all tasks reported all checks."""
    last_of_rank = {item.rank: item for item in task_findings}
    problems = []
    if len(last_of_rank) < size:
        problems.append(f"{size - len(last_of_rank)} of {size} reported nothing")
    incomplete = [item for item in last_of_rank.values() if item.finding.check != LAST_CHECK]
    for item in incomplete[:GROUPS_SHOWN]:
        problems.append(f"task {item.rank} on {item.node} ended after {item.finding.check!r}")
    if not problems:
        return Finding("tasks", PASS, f"{size} on {node_names(task_findings)}")
    message = "; ".join(problems)
    if srun_errors:
        message += f". srun: {srun_errors}"
    remedy = (
        f"read srun's messages; the nodes must see {sys.executable} and this code, and the job's "
        "time limit must be long enough (--time)"
    )
    return Finding("tasks", FAIL, message, remedy)


def node_names(task_findings: Sequence[TaskFinding]) -> str:
    """'n1, n2, n3, n4 and 8 more'."""
    nodes = {item.node for item in task_findings}
    names = sorted(nodes, key=lambda name: (len(name), name))
    text = ", ".join(names[:NODES_SHOWN])
    if len(names) > NODES_SHOWN:
        text += f" and {len(names) - NODES_SHOWN} more"
    return text


def combine(task_findings: Sequence[TaskFinding]) -> Finding:
    """The findings of one check as one: the worst grade, and the messages of each node."""
    first = task_findings[0].finding
    grade = worst([item.finding for item in task_findings])
    worst_items = [item for item in task_findings if item.finding.grade == grade]
    groups = _grouped(worst_items, lambda item: item.finding.message)
    if len(groups) == 1 and len(worst_items) == len(task_findings):
        return first
    messages = [f"{node_names(items)}: {message}" for message, items in groups.items()]
    message = "; ".join(messages[:GROUPS_SHOWN])
    if len(groups) > GROUPS_SHOWN:
        message += f"; {len(groups) - GROUPS_SHOWN} more"
    remedies = dict.fromkeys(items[0].finding.remedy for items in groups.values())
    remedy = "; ".join(filter(None, remedies))
    threshold = worst_items[0].finding.threshold
    return Finding(first.check, grade, message, remedy, threshold=threshold)


def _grouped(
    task_findings: Sequence[TaskFinding], key: Callable[[TaskFinding], str]
) -> dict[str, list[TaskFinding]]:
    groups: dict[str, list[TaskFinding]] = {}
    for item in task_findings:
        groups.setdefault(key(item), []).append(item)
    return groups


def compare_versions(task_findings: Sequence[TaskFinding], here: Finding) -> Finding:
    """Nodes must have the same versions; this machine, which trains nothing, should."""
    differences = []
    grade = PASS
    for name, version_here in here.values.items():
        nodes_by_version = _nodes_by_version(task_findings, name)
        if list(nodes_by_version) == [version_here]:
            continue
        versions = [f"{version} on {nodes}" for version, nodes in nodes_by_version.items()]
        differences.append(f"{name} {', '.join(versions)}, {version_here} here")
        difference = FAIL if len(nodes_by_version) > 1 else WARN
        grade = max(grade, difference, key=GRADES.index)
    message = "; ".join(differences) or "the same on all nodes and here"
    remedy = "use one installation that all nodes see, or install the same lock file everywhere"
    return Finding("versions", grade, message, remedy)


def _nodes_by_version(task_findings: Sequence[TaskFinding], name: str) -> dict[str, str]:
    """Version of the software `name` -> names of the nodes that have it."""
    groups = _grouped(task_findings, lambda item: item.finding.values.get(name, "?"))
    return {version: node_names(items) for version, items in groups.items()}


def compare_networks(task_findings: Sequence[TaskFinding], combined: Finding) -> Finding:
    """Ranks on different machines cannot reach each other if they listen on loopback."""
    on_loopback = []
    for item in task_findings:
        if item.finding.values.get("address", "").startswith(("127.", "::1")):
            on_loopback.append(item)
    one_machine = _count_machines(task_findings) == 1
    configured = os.environ.get("GLOO_SOCKET_IFNAME")
    if one_machine or combined.grade != PASS or not on_loopback or configured:
        return combined
    interfaces = [set(item.finding.values["interfaces"]) for item in task_findings]
    common = sorted(set.intersection(*interfaces))
    interface = f"{common[0]}, which all nodes have," if common else "an interface"
    nodes = node_names(on_loopback)
    return Finding(
        "network",
        WARN,
        f"{combined.message}; gloo uses the machine's own name, which is loopback on {nodes}",
        f"name {interface} in GLOO_SOCKET_IFNAME (cluster.environment)",
    )


def _count_machines(task_findings: Sequence[TaskFinding]) -> int:
    return len({item.finding.values.get("machine") for item in task_findings})


def compare_all_reduce(
    task_findings: Sequence[TaskFinding], networks: Sequence[TaskFinding]
) -> Finding:
    """The speed of the slowest rank."""
    values = [item.finding.values for item in task_findings]
    speed = min(value["gb_per_s"] for value in values)
    latency_us = max(value["latency_us"] for value in values)
    is_slow = speed < SLOW_GB_PER_S and _count_machines(networks) > 1
    backend = f"{values[0]['backend']} over {values[0]['ranks']} ranks"
    return Finding(
        LAST_CHECK,
        WARN if is_slow else PASS,
        f"{backend}: {speed:.2f} GB/s, {latency_us:.0f} us",
        "name the fast interface in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME "
        "(cluster.environment)",
        values[0],
        f"{SLOW_GB_PER_S:g} GB/s or more between machines",
    )


def compare_links(
    task_findings: Sequence[TaskFinding], networks: Sequence[TaskFinding]
) -> list[Finding]:
    """The ranks of a node, and the nodes, against the slowest node's interface."""
    speeds = [item.finding.values.get("interface_gb_per_s") for item in networks]
    known = [speed for speed in speeds if speed]
    # Nodes of one machine, as in tests, are joined by no interface.
    interface = min(known) if known and _count_machines(networks) > 1 else None
    return judge_links([item.finding.values for item in task_findings], interface)


def compare_clocks(task_findings: Sequence[TaskFinding]) -> Finding:
    """Compares the tasks' clocks with that of the first task."""
    furthest = max(task_findings, key=lambda item: abs(item.finding.values["clock_s"]))
    ahead_s = furthest.finding.values["clock_s"]
    threshold = f"{SKEW_S:g} s or less"
    if abs(ahead_s) <= SKEW_S:
        message = f"within {1000 * abs(ahead_s):.1f} ms of the first task's"
        return Finding("clocks", PASS, message, threshold=threshold)
    direction = "ahead of" if ahead_s > 0 else "behind"
    return Finding(
        "clocks",
        WARN,
        f"that of {furthest.node} is {abs(ahead_s):.1f} s {direction} the first task's",
        SET_CLOCKS,
        threshold=threshold,
    )
