"""The wheel and the source distribution: what they contain, and that an installed wheel works on its own."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("conf", "data_prep", "launch", "pipeline")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the checkout without its tests."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in LAYERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheel')"
    subprocess.run(
        [sys.executable, "-c", build], cwd=folder, check=True, capture_output=True, timeout=120
    )
    (path,) = (folder / "wheel").glob("*.whl")
    return path


def test_the_wheel_contains_every_module_and_config(wheel):
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    expected = {f"evspan/{layer}/py.typed" for layer in LAYERS}
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                expected.add(f"evspan/{path.relative_to(ROOT)}")
    assert packed == expected
    assert [name for name in names if name.endswith("licenses/LICENSE")]
