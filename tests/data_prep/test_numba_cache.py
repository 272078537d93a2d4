"""numba's cache where neither the installation nor a home can be written."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from evspan.data_prep import numba_cache

ROOT = Path(__file__).parents[2]
NOBODY = 65534
PROGRAM = """
import os, numpy as np
import evspan.data_prep, evspan.data_prep.recordings.time_order as time_order
import evspan.data_prep.recordings.evt3, evspan.data_prep.frames.codec
assert evspan.data_prep.__file__.startswith(os.environ["PYTHONPATH"])
assert time_order._first_ahead(np.arange(4) * 20_000, 1, 0) == 1
print(os.environ.get("NUMBA_CACHE_DIR", ""))
"""


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A read-only copy of the package, in a folder that all users can enter."""
    folder = Path(tempfile.mkdtemp(prefix="evspan-read-only-"))
    try:
        for package in ("conf", "data_prep"):
            shutil.copytree(
                ROOT / package,
                folder / "evspan" / package,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        (folder / "tmp").mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (folder / "tmp").chmod(0o1777)
        yield folder
    finally:
        for path in (folder, *folder.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(folder)


def use(folder: Path) -> Path:
    """Runs a compiled function as a user without a home. Returns NUMBA_CACHE_DIR."""
    drop = []
    if os.geteuid() == 0:  # root may write everywhere; without these capabilities it may not
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, or another user than root")
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/proc/none",
        "TMPDIR": str(folder / "tmp"),
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [*drop, sys.executable, "-c", PROGRAM],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.mark.slow
def test_without_a_writable_place_it_is_a_private_temporary_folder(read_only):
    user = os.geteuid()
    cache = use(read_only)
    assert cache == read_only / "tmp" / f"evspan-numba-{user}"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert cache.stat().st_uid == user
    compiled = {path: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")}
    assert compiled
    assert use(read_only) == cache  # again: nothing is compiled
    assert compiled == {path: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")}


@pytest.mark.parametrize("kind", ["open", "foreign", "link", "file"])
def test_a_folder_that_others_can_write_is_not_used(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    taken = tmp_path / f"evspan-numba-{os.geteuid()}"
    if kind == "file":
        taken.touch(mode=0o600)
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        taken.symlink_to(tmp_path / "elsewhere")
    else:
        taken.mkdir(mode=0o700)
    if kind == "open":
        taken.chmod(0o770)
    if kind == "foreign":
        if os.geteuid() != 0:
            pytest.skip("needs root")
        os.chown(taken, NOBODY, NOBODY)
    folder = Path(numba_cache._private_folder())
    assert folder.parent == tmp_path
    assert folder != taken
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_where_numba_can_write_nothing_is_changed(tmp_path, monkeypatch):
    monkeypatch.delenv(numba_cache.VARIABLE, raising=False)
    monkeypatch.setattr(numba_cache, "_can_write", lambda folder: folder == tmp_path / "numba")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    numba_cache.provide_numba_cache()
    assert numba_cache.VARIABLE not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    monkeypatch.setenv(numba_cache.VARIABLE, "mine")
    numba_cache.provide_numba_cache()
    assert os.environ[numba_cache.VARIABLE] == "mine"


def test_a_folder_that_permissions_allow_but_the_file_system_does_not_is_not_used():
    assert not numba_cache._can_write(Path("/proc/none/numba"))
