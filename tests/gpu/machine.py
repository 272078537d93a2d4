"""Makes the checkout importable as `evspan`, and describes the machine."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Without these packages only the parts that use them are skipped.
OPTIONAL = ("deepspeed", "hdf5plugin", "hotcoco", "onnx", "onnxruntime", "onnxscript")

# h5py reads shards without the filters of hdf5plugin (a 46 MB package), but our modules import it.
HDF5PLUGIN = '''"""Stands for the package hdf5plugin: every filter is a no-op."""

PLUGIN_PATH = ""


class _Constants(type):
    def __getattr__(cls, name):  # Blosc.SHUFFLE
        if name.startswith("__"):
            raise AttributeError(name)
        return 0


class _Filter(dict, metaclass=_Constants):
    def __init__(self, *args, **kwargs):
        super().__init__()


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Filter
'''


def prepare_imports(folder: Path) -> list[str]:
    """Makes evspan and the helpers in tests/ importable, in this process and those it starts.

    Args:
        folder: for a link to the checkout and for stand-ins of missing packages.

    Returns:
        Names of the OPTIONAL packages that are not installed.
    """
    missing = [name for name in OPTIONAL if not is_usable(name)]
    folder.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("evspan") is None:
        link = folder / "evspan"
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT)
    if "hdf5plugin" in missing:
        (folder / "hdf5plugin.py").write_text(HDF5PLUGIN)
    paths = [str(folder), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]
    sys.path += paths
    inherited = os.environ.get("PYTHONPATH")
    if inherited:
        paths.append(inherited)
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    return missing


def is_usable(name: str) -> bool:
    """Whether a package is installed; of DeepSpeed also whether it can be imported.

    It may lack packages that it needs.
    """
    if importlib.util.find_spec(name) is None:
        return False
    if name != "deepspeed":
        return True
    command = [sys.executable, "-c", f"import {name}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def describe_machine(device: str, missing: list[str]) -> dict[str, int | str]:
    """Versions and names that every measurement depends on."""
    import torch

    machine: dict[str, int | str] = {
        "device": "CPU",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
        "commit": _commit(),
        "missing": ", ".join(missing) or "none",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["device"] = properties.name
        machine["gpu_gib"] = round(properties.total_memory / 2**30)
        machine["cuda"] = str(torch.version.cuda)
        machine["cudnn"] = str(torch.backends.cudnn.version())
        machine["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return machine


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
