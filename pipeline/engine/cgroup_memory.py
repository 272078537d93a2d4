"""The memory limit that control groups set for this process, as SLURM and containers do."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
TABLE = Path("/proc/self/cgroup")
UNIFIED = ("", "unified")  # where version 2 is mounted, alone and next to version 1
MEMORY = "memory"  # the controller of version 1, and its folder
LIMITS = {2: "memory.max", 1: "memory.limit_in_bytes"}


def cgroup_memory_limit(root: Path = ROOT, table: Path = TABLE) -> int | None:
    """The lowest limit of the process's control groups and all above them, in bytes.

    A job's limit is often set on a group above that of the process. Versions 1 and 2 are read.
    Groups that a container does not see are left out.

    Returns:
        None without a limit. Version 1 has a very large number in its place.
    """
    limits = []
    for path in _limit_files(root, table):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits, default=None)


def _limit_files(root: Path, table: Path) -> Iterator[Path]:
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, group = [*line.split(":", 2), "", ""][:3]
        if not controllers and number:
            for folder in UNIFIED:
                yield from _upwards(root / folder, group, LIMITS[2])
        elif MEMORY in controllers.split(","):
            yield from _upwards(root / MEMORY, group, LIMITS[1])


def _upwards(mount: Path, group: str, name: str) -> Iterator[Path]:
    """The file of a group and of each one above it, up to the mount."""
    parts = [part for part in PurePosixPath(group).parts if part not in ("/", "..")]
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth], name)
