"""The NVIDIA GPUs that a process may use, from the driver's files and the environment. No torch.

torch reports a GPU that it cannot use, for example because the driver is older than its CUDA build,
as no GPU at all. The files of the driver show the difference.
"""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
DEVICE_FOLDER = Path("/dev")
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def gpus_hidden(env: Mapping[str, str]) -> bool:
    """Whether CUDA_VISIBLE_DEVICES is set and selects no GPU: empty, -1, or SLURM's NoDevFiles."""
    value = env.get(VISIBLE_DEVICES)
    return value is not None and not _selected(value)


def gpu_count(env: Mapping[str, str]) -> int:
    """The number of NVIDIA GPUs that a process with this environment sees, if torch can use them.

    0 where CUDA_VISIBLE_DEVICES hides all.
    """
    if gpus_hidden(env):
        return 0
    return visible_count(len(gpu_files()), env)


def visible_count(gpus: int, env: Mapping[str, str]) -> int:
    """How many of a machine's GPUs CUDA_VISIBLE_DEVICES leaves."""
    value = env.get(VISIBLE_DEVICES)
    return gpus if value is None else min(gpus, len(_selected(value)))


def gpu_files(folder: Path = DEVICE_FOLDER) -> list[Path]:
    """The device files of the GPUs: nvidia0, nvidia1, ...

    Those that the process's control group excludes, as SLURM does with the GPUs of other jobs, are
    left out; those whose permissions exclude the user are not.
    """
    files = []
    for path in sorted(folder.glob("nvidia*")):
        if re.fullmatch(r"nvidia\d+", path.name) and not _excluded(path):
            files.append(path)
    return files


def driver_version(file: Path = DRIVER_FILE) -> str:
    """The version of the loaded NVIDIA driver, such as '535.104.05'; empty if it is unknown."""
    try:
        text = file.read_text()
    except OSError:
        return ""
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else ""


def _excluded(path: Path) -> bool:
    """Whether the control group of devices forbids the file: EPERM. The file's mode: EACCES."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EPERM
    return False


def _selected(value: str) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES up to the first one that is invalid, as CUDA reads it."""
    selected: list[str] = []
    for entry in value.split(","):
        name = entry.strip()
        if not re.match(r"\d|GPU-|MIG-", name):
            break
        selected.append(name)
    return selected
