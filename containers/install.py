"""The step that both images share: Dockerfile and evspan.def run it with the Python of a fresh virtual environment.

install.py dependencies cpu|cuda    torch and what else Evspan needs, in the versions of constraints.txt
install.py wheel                    Evspan itself, into dist/

It runs in a folder that holds pyproject.toml and constraints.txt. WHEELS=FOLDER of `make container` lies at /mnt meanwhile and
is not part of the image: its pip.conf is pip's configuration; where it has wheels but no pip.conf, pip asks no index.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

GIVEN = Path("/mnt")
WHERE = "WHEELS=FOLDER sets where pip looks: a folder with a pip.conf, or with all the wheels (containers/README.md)"
PINNED = ("-c", "constraints.txt", "--build-constraint", "constraints.txt")


def pip(*args: str) -> str:
    """Runs pip and returns its standard output; its standard error goes to the builder's log."""
    ran = subprocess.run(
        [sys.executable, "-m", "pip", *args],
        env=environment(GIVEN),
        stdout=subprocess.PIPE,
        text=True,
    )
    if ran.returncode:
        sys.exit(f"{ran.stdout}error: pip failed; its message is above. {WHERE}")
    return ran.stdout


def environment(given: Path) -> dict[str, str]:
    env = {
        **os.environ,
        "PIP_NO_CACHE_DIR": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    if (given / "pip.conf").is_file():
        return env | {"PIP_CONFIG_FILE": str(given / "pip.conf")}
    if any(given.glob("*.whl")):
        return env | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(given)}
    return env


def dependencies(device: str) -> None:
    import tomllib  # the images' Python is 3.11 or newer, that of a checkout need not be

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    # The base's pip may lack an option of PINNED.
    print(pip("install", "--upgrade", *PINNED[:2], "pip", "setuptools"))
    report = pip(
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
        *PINNED,
        "torch",
    )
    if wrong := wrong_build(json.loads(report)["install"][0]["metadata"], device):
        sys.exit(f"error: {wrong}")  # before gigabytes are fetched
    print(
        pip(
            "install",
            *PINNED,
            "torch",
            *project["dependencies"],
            *project["optional-dependencies"]["export"],
            *project["optional-dependencies"]["search"],
        )
    )
    print(pip("check"))
    libraries = Path(sys.prefix, "lib")
    # Tests that packages install are a tenth of the image.
    for path in [
        *libraries.rglob("site-packages/**/test"),
        *libraries.rglob("site-packages/**/tests"),
    ]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def wrong_build(torch: dict[str, Any], device: str) -> str:
    """Why this torch is not for `device`, by its metadata; else empty."""
    from pip._vendor.packaging.requirements import Requirement

    needs = [
        r
        for r in map(Requirement, torch.get("requires_dist", []))
        if not r.marker or r.marker.evaluate({"extra": ""})
    ]
    cuda = any(r.name.startswith(("nvidia-", "cuda-")) for r in needs)
    if device not in ("cpu", "cuda"):
        return f"DEVICE is {device!r}; there are: cpu, cuda"
    if cuda == (device == "cuda"):
        return ""
    found, wanted, other = ("CUDA", "CPU", "cuda") if cuda else ("CPU", "CUDA", "cpu")
    return (
        f"torch {torch['version']}, where pip looks, is a {found} build, and DEVICE={device} needs a {wanted} build. Build "
        f"with DEVICE={other}, or name the index of {wanted} builds, which PyTorch's installation page tells. {WHERE}"
    )


def main(argv: list[str]) -> None:
    if len(argv) == 2 and argv[0] == "dependencies":
        dependencies(argv[1])
    elif argv == ["wheel"]:
        print(
            pip(
                "wheel",
                "--no-deps",
                "--no-index",
                "--no-build-isolation",
                "--wheel-dir",
                "dist",
                ".",
            )
        )
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
