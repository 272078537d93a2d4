"""The wheel and the source distribution: what they contain, and that an installed wheel works on its own."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest
from evspan.conf.code_version import package_files

ROOT = Path(__file__).parents[2]
LAYERS = ("conf", "data_prep", "launch", "pipeline")
pytestmark = pytest.mark.timeout(300)


def build(kind: str, checkout: Path) -> Path:
    """Builds a "wheel" or an "sdist" with the environment's setuptools, without a network."""
    command = f"from setuptools.build_meta import build_{kind} as build; build('dist')"
    subprocess.run(
        [sys.executable, "-c", command], cwd=checkout, check=True, capture_output=True, timeout=120
    )
    (path,) = (checkout / "dist").iterdir()
    return path


def copied_checkout(folder: Path) -> Path:
    """The files of the checkout, without what was built there."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", ".*_cache", "*.egg-info", "demo"
    )
    return shutil.copytree(ROOT, folder, ignore=ignore)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", copied_checkout(tmp_path_factory.mktemp("wheel") / "checkout"))


def modules_and_data(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def read_metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.slow
def test_the_wheel_contains_every_module_and_config(wheel):
    expected = set()
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*"):
            documentation = path.suffix in (".md", ".png", ".svg")
            if path.is_file() and not documentation and "__pycache__" not in path.parts:
                expected.add(f"evspan/{path.relative_to(ROOT)}")
    assert modules_and_data(wheel) == expected
    assert {f"evspan/{layer}/py.typed" for layer in LAYERS} <= expected
    assert {f"evspan/{name}" for name in package_files(ROOT)} == expected, "jobs import these"
    with ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]


@pytest.mark.slow
def test_the_source_distribution_contains_no_tests_and_builds_the_same_wheel(wheel, tmp_path):
    sdist = build("sdist", copied_checkout(tmp_path / "checkout"))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert not (unpacked / "tests").exists()
    assert modules_and_data(build("wheel", unpacked)) == modules_and_data(wheel)


def test_the_page_on_a_package_index_has_no_relative_link(wheel):
    metadata = read_metadata(wheel)
    page = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "# Evspan" in page
    links = re.findall(r"\]\(([^)\s]+)", page) + re.findall(r"(?:src|href)=\"([^\"]+)", page)
    links += [url.partition(", ")[2] for url in metadata.get_all("Project-URL")]
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_declared_python_versions_agree(wheel):
    metadata = read_metadata(wheel)
    prefix = "Programming Language :: Python :: 3."
    classifiers = metadata.get_all("Classifier")
    minors = sorted(int(c.removeprefix(prefix)) for c in classifiers if c.startswith(prefix))
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert set(metadata["Requires-Python"].split(",")) == {
        f">=3.{minors[0]}",
        f"<3.{minors[-1] + 1}",
    }


@pytest.mark.parametrize("version", [(3, 9), (3, 14)])
def test_make_setup_reports_an_unsupported_python_in_one_line(tmp_path, version):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    python = tmp_path / "python"
    pretend = f"import sys; sys.version_info = {(*version, 0, 'final', 0)}"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}\n$2"\n')
    python.chmod(0o755)
    command = ["make", "--silent", "setup", f"PYTHON={python}"]
    # `make test` runs this test: its variables would change what the inner make prints.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert done.returncode != 0
    assert lines == [
        f"error: {python} is Python {version[0]}.{version[1]}; Evspan needs 3.10 to 3.13: "
        "make setup PYTHON=python3.11"
    ]


class Installed(NamedTuple):
    """A virtual environment with the wheel, and a working folder where other packages have our folders' names."""

    bin: Path
    folder: Path
    environment: dict[str, str]

    def run(self, *command: object, seconds: int = 120) -> str:
        """Standard output of a command of the environment."""
        done = subprocess.run(
            [self.bin / str(command[0]), *map(str, command[1:])],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    """Dependencies come from the running environment, whose editable install of evspan stays hidden.

    A `.pth` file adds folders to sys.path, but `.pth` files in those folders are not read: the editable install is one.
    """
    top = tmp_path_factory.mktemp("installed")
    venv = top / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=120)
    (site,) = venv.glob("lib/python*/site-packages")
    folders = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(folders))
    install = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install"]
    options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*install, *options, wheel], check=True, timeout=120)
    for place in ("work", "decoys"):
        for name in ("launch", "conf", "pipeline"):
            (top / place / name).mkdir(parents=True)
            (top / place / name / "__init__.py").write_text("raise ImportError('a decoy')\n")
    environment = {
        **os.environ,
        "PYTHONPATH": str(top / "decoys"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return Installed(venv / "bin", top / "work", environment)


@pytest.mark.slow
def test_only_the_installed_package_is_imported(installed):
    program = "import evspan.pipeline, evspan.launch; print(evspan.pipeline.__file__)"
    path = Path(installed.run("python", "-c", program).strip())
    assert path.is_relative_to(installed.bin.parent)
    decoy = subprocess.run(
        [installed.bin / "python", "-c", "import pipeline"],
        cwd=installed.folder,
        env=installed.environment,
        capture_output=True,
        text=True,
    )
    assert "a decoy" in decoy.stderr


def test_help(installed):
    assert "evspan COMMAND" in installed.run("evspan", "--help")


COMPOSE = """
import contextlib, io, pathlib, sys
import evspan.conf
from evspan.launch.cli.main import main
folder = pathlib.Path(evspan.conf.__file__).parent / "experiment"
for path in sorted(folder.rglob("*.yaml")):
    name = path.relative_to(folder).with_suffix("")
    sys.argv = ["evspan", "train", f"experiment={name}", "--cfg", "job"]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main()
    assert "max_steps" in shown.getvalue(), name
    print(name)
"""


@pytest.mark.slow
def test_every_experiment_composes(installed):
    names = installed.run("python", "-c", COMPOSE).split()
    files = sorted((ROOT / "conf" / "experiment").rglob("*.yaml"))
    assert names == [
        str(f.relative_to(ROOT / "conf" / "experiment").with_suffix("")) for f in files
    ]


@pytest.mark.slow
def test_from_simulated_recordings_to_detections(installed):
    installed.run(
        *("evspan", "simulate", "raw", "--recordings", "train=2,val=1", "--seconds", "1"),
        *("--width", "160", "--height", "160", "--processes", "1"),
    )
    installed.run("evspan", "prep", "source=raw", "output=shards", "processes=1")
    installed.run(
        *("evspan", "train", "dataset.root=shards", "run_dir=run", "size=micro"),
        *("model.head.num_classes=3", "training.max_steps=2", "training.batch_size=2"),
        *("training.num_workers=0", "training.log_images_every=0", "parallel.ranks=2"),
        seconds=200,
    )
    assert "AP" in installed.run("evspan", "evaluate", "run", "dataset.root=shards")
    installed.run(
        *("evspan", "infer", "run", "raw/val/val_000_td.raw"),
        *("--output", "detections"),
    )
    assert list(installed.folder.glob("detections/*.npy"))
