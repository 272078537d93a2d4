"""What the tasks of a job say together: the worst of each check, and what only a comparison shows."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from evspan.launch.doctor.finding import FAIL, GRADES, PASS, WARN, Finding, worst
from evspan.launch.doctor.folder import SET_CLOCKS, SHARED, SKEW_S

LAST = "all-reduce"  # the check that a task ends with
SHOWN = 3  # groups of nodes whose answers differ
SLOW_GB_PER_S = 0.1  # about what Ethernet of 1 Gbit/s gives


class Told(NamedTuple):
    """What a task said of a check."""

    rank: int
    node: str
    finding: Finding


def judge(
    told: Sequence[Told], size: int, here: Finding, complaints: str, unseen: int
) -> list[Finding]:
    """
    Args:
        size: tasks that there were to be. here: the versions where they were started. complaints: what srun said.
        unseen: tasks whose notes in the shared folder have not come to where they were started.
    """
    by_check: dict[str, list[Told]] = {}
    for one in told:
        by_check.setdefault(one.finding.check, []).append(one)
    merged = {check: merge(ones) for check, ones in by_check.items()}
    if unseen and merged and merged["shared folder"].grade == PASS:
        merged["shared folder"] = Finding(
            "shared folder", FAIL, f"what {unseen} of {size} tasks left is not seen here", SHARED
        )
    if "versions" in merged:
        merged["versions"] = versions(by_check["versions"], here)
    if "network" in merged:
        merged["network"] = network(by_check["network"], merged["network"])
    if LAST in merged and merged[LAST].grade == PASS:
        merged[LAST] = all_reduce(by_check[LAST], by_check.get("network", []))
        merged["clocks"] = clocks(by_check[LAST])
    elif LAST in merged and (address := merged.get("MASTER_ADDR")) and address.grade == WARN:
        merged["MASTER_ADDR"] = address._replace(grade=FAIL)  # what was used instead has not helped
    return [tasks(told, size, complaints), *merged.values()]


def tasks(told: Sequence[Told], size: int, complaints: str) -> Finding:
    """Whether all of them have told all."""
    newest = {t.rank: t for t in told}  # the last that each told
    halted = [
        f"task {rank} on {t.node} ended after {t.finding.check!r}"
        for rank, t in newest.items()
        if t.finding.check != LAST
    ]
    silent = [f"{size - len(newest)} of {size} told nothing"] if len(newest) < size else []
    if not halted and not silent:
        return Finding("tasks", PASS, f"{size} on {nodes_of(told)}")
    return Finding(
        "tasks",
        FAIL,
        "; ".join([*silent, *halted[:SHOWN]]) + (f". srun: {complaints}" if complaints else ""),
        f"mind what srun says; nodes must see {sys.executable} and this code, and the job last long enough (--time)",
    )


def nodes_of(told: Sequence[Told]) -> str:
    names = sorted({t.node for t in told}, key=lambda name: (len(name), name))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def merge(told: Sequence[Told]) -> Finding:
    """One finding of one check: the worst grade, with what was found where if that differs."""
    grade = worst([t.finding for t in told])
    groups = _grouped([t for t in told if t.finding.grade == grade], lambda t: t.finding.found)
    if len(groups) == 1 and all(t.finding.grade == grade for t in told):
        return told[0].finding
    found = "; ".join(f"{nodes_of(group)}: {what}" for what, group in list(groups.items())[:SHOWN])
    more = f"; {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
    remedies = dict.fromkeys(group[0].finding.remedy for group in groups.values())
    return Finding(told[0].finding.check, grade, found + more, "; ".join(r for r in remedies if r))


def _grouped(told: Sequence[Told], by: Callable[[Told], str]) -> dict[str, list[Told]]:
    groups: dict[str, list[Told]] = {}
    for one in told:
        groups.setdefault(by(one), []).append(one)
    return groups


def versions(told: Sequence[Told], here: Finding) -> Finding:
    """Nodes must have the same; this machine, which trains nothing, should."""
    differing, grade = [], PASS
    for name, value in here.values.items():
        there = _grouped(told, lambda t, name=name: t.finding.values.get(name, "?"))  # type: ignore[misc]
        if list(there) != [value]:
            differing.append(
                f"{name} {', '.join(f'{v} on {nodes_of(group)}' for v, group in there.items())}, {value} here"
            )
            grade = max(grade, FAIL if len(there) > 1 else WARN, key=GRADES.index)
    return Finding(
        "versions",
        grade,
        "; ".join(differing) or "the same on all nodes and here",
        "use one installation that all nodes see, or install the same lock file everywhere",
    )


def network(told: Sequence[Told], merged: Finding) -> Finding:
    """Between machines, ranks that listen at loopback do not hear each other."""
    loopback = [t for t in told if t.finding.values.get("address", "").startswith(("127.", "::1"))]
    if (
        _machines(told) == 1
        or merged.grade != PASS
        or not loopback
        or os.environ.get("GLOO_SOCKET_IFNAME")
    ):
        return merged
    common = sorted(set.intersection(*(set(t.finding.values["interfaces"]) for t in told)))
    return Finding(
        "network",
        WARN,
        f"{merged.found}; own names lead to loopback on {nodes_of(loopback)}, and gloo there",
        f"name {f'{common[0]}, which all nodes have,' if common else 'an interface'} in GLOO_SOCKET_IFNAME "
        "(cluster.environment)",
    )


def _machines(told: Sequence[Told]) -> int:
    return len({t.finding.values.get("machine") for t in told})


def all_reduce(told: Sequence[Told], networks: Sequence[Told]) -> Finding:
    values = [t.finding.values for t in told]
    speed, latency = min(v["gb_per_s"] for v in values), max(v["latency_us"] for v in values)
    return Finding(
        LAST,
        WARN if speed < SLOW_GB_PER_S and _machines(networks) > 1 else PASS,
        f"{values[0]['backend']} over {values[0]['ranks']} ranks: {speed:.2f} GB/s, {latency:.0f} us",
        "name the fast interface in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (cluster.environment)",
        values[0],
    )


def clocks(told: Sequence[Told]) -> Finding:
    """Against the first task's."""
    furthest = max(told, key=lambda t: abs(t.finding.values["clock_s"]))
    ahead = furthest.finding.values["clock_s"]
    if abs(ahead) <= SKEW_S:
        return Finding("clocks", PASS, f"within {1000 * abs(ahead):.1f} ms of the first task's")
    way = "ahead of" if ahead > 0 else "behind"
    return Finding(
        "clocks",
        WARN,
        f"that of {furthest.node} is {abs(ahead):.1f} s {way} the first task's",
        SET_CLOCKS,
    )
