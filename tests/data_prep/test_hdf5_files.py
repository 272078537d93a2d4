"""Opening HDF5 files for reading: locks, errors of the file system, datasets in other files."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from evspan.data_prep import hdf5_files
from evspan.data_prep.hdf5_files import (
    UnsafeDatasetError,
    error_number,
    is_damage,
    open_hdf5_for_reading,
    plain_member,
    require_bounded_expansion,
    require_plain_dataset,
    unavailable,
)

ROOT = Path(__file__).parents[2]
NO_LOCKS = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""
READ = """
import os, sys
import h5py
from evspan.data_prep.hdf5_files import open_hdf5_for_reading
for number in (11, 37, 95, 524):
    os.environ["FLOCK_ERRNO"] = str(number)
    try:
        h5py.File(sys.argv[1], "r")
    except OSError as error:
        assert error.errno == number, error
    else:
        sys.exit("the replaced flock() was not called")
    with open_hdf5_for_reading(sys.argv[1]) as file:
        print(file["a"][:].sum())
"""


def small_file(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.arange(1000), chunks=(100,), compression="gzip")
    return path


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler (cc) for a replaced flock()")
def test_files_are_read_where_flock_fails(tmp_path):
    path = small_file(tmp_path / "a.h5")
    (tmp_path / "flock.c").write_text(NO_LOCKS)
    library = tmp_path / "flock.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, tmp_path / "flock.c"], check=True, timeout=120
    )
    result = subprocess.run(
        [sys.executable, "-c", READ, path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "LD_PRELOAD": str(library)},
    )
    assert result.stdout.split() == ["499500"] * 4, result.stderr


def test_a_file_that_the_process_has_open_with_a_lock_is_read(tmp_path):
    path = small_file(tmp_path / "a.h5")
    with h5py.File(path, "r") as first, open_hdf5_for_reading(path) as second:
        assert first["a"][5] == second["a"][5] == 5


def test_damaged_content_is_damage(tmp_path):
    whole = small_file(tmp_path / "a.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.h5").touch()
    (tmp_path / "text.h5").write_text("text " * 1000)
    for name in ("cut.h5", "empty.h5", "text.h5"):
        with pytest.raises(OSError, match="open") as caught:
            open_hdf5_for_reading(tmp_path / name)
        assert is_damage(caught.value), caught.value
    with h5py.File(tmp_path / "a.h5", "r") as file:
        at = file["a"].id.get_chunk_info(0).byte_offset
    (tmp_path / "b.h5").write_bytes(whole[:at] + b"\xff" * 50 + whole[at + 50 :])
    with (
        open_hdf5_for_reading(tmp_path / "b.h5") as file,
        pytest.raises(OSError, match="read data") as caught,
    ):
        file["a"][:]
    assert is_damage(caught.value)


def test_missing_files_and_too_many_open_files_are_no_damage(tmp_path):
    path = small_file(tmp_path / "a.h5")
    for name in ("none.h5", "."):
        with pytest.raises(OSError, match="errno") as caught:
            open_hdf5_for_reading(tmp_path / name)
        assert not is_damage(caught.value)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(highest + 2)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held), hard))
    try:
        with pytest.raises(OSError, match="errno") as caught:
            open_hdf5_for_reading(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
    assert error_number(caught.value) == errno.EMFILE
    assert not is_damage(caught.value)
    assert "ulimit -n" in str(unavailable(path, caught.value))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
def test_a_file_of_another_user_is_no_damage(tmp_path):
    path = small_file(tmp_path / "a.h5")
    path.chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError) as caught:
            open_hdf5_for_reading(path)
    finally:
        os.seteuid(0)
    assert not is_damage(caught.value)
    assert "Permission denied. Ask its owner" in str(unavailable(path, caught.value))


def test_a_failing_read_is_no_damage_whatever_type_h5py_raises(tmp_path):
    """A folder's descriptor in the place of the file's: read() fails with EISDIR."""
    with h5py.File(small_file(tmp_path / "a.h5"), "a") as file:
        file["b"] = 1
    with open_hdf5_for_reading(tmp_path / "a.h5") as file:
        folder = os.open(tmp_path, os.O_RDONLY)
        os.dup2(folder, file.id.get_vfd_handle())
        os.close(folder)
        with pytest.raises(KeyError) as caught:
            file["b"]
    assert error_number(caught.value) == errno.EISDIR
    assert not is_damage(caught.value)
    assert str(unavailable("a.h5", caught.value)).startswith("a.h5 cannot be read now: Is a dir")


@pytest.mark.parametrize(
    ("error", "damage"),
    [
        *((OSError(number, "failed"), False) for number in (4, 5, 11, 13, 23, 24, 37, 95, 110)),
        *((OSError(number, "failed"), False) for number in (errno.ESTALE, 524, errno.ENOMEM)),
        (MemoryError(), False),
        (KeyboardInterrupt(), False),
        (OSError("Unable to open file (file signature not found)"), True),
        (RuntimeError("(read failed, errno = 5, error message = 'I/O error')"), False),
        (OSError("(seek failed, errno = 22, error message = 'Invalid argument')"), True),
        (KeyError("(name = 'errno = 5, error message = ', errno = 0, error message = '')"), True),
        (RuntimeError("(memory allocation failed)"), True),
        (ValueError("wrong dtype"), True),
        (UnsafeDatasetError("virtual"), True),
    ],
)
def test_the_table_of_errors(error, damage):
    assert is_damage(error) is damage


def test_an_allocation_that_fails_under_a_limit_is_no_damage(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 30, 1 << 30))
    assert not is_damage(RuntimeError("(memory allocation failed)"))


@pytest.fixture(scope="module")
def unsafe_file(tmp_path_factory) -> Path:
    """Datasets that HDF5 would read from other files, or that were never written."""
    path: Path = tmp_path_factory.mktemp("unsafe") / "a.h5"
    small_file(path.with_name("other.h5"))
    layout = h5py.VirtualLayout((5,), "i8")
    layout[:] = h5py.VirtualSource("missing.h5", "a", shape=(5,))
    with h5py.File(path, "w") as file:
        file["plain"] = np.arange(5)
        file["group/plain"] = np.arange(5)
        file["linked"] = h5py.SoftLink("/group/plain")
        file["group/linked"] = h5py.SoftLink("../plain")
        file["group/near"] = h5py.SoftLink("plain")
        file["dangling"] = h5py.SoftLink("/nothing")
        file["circle"] = h5py.SoftLink("/circle")
        file["away"] = h5py.ExternalLink("other.h5", "/a")
        file["through"] = h5py.SoftLink("/away")
        file.create_dataset("external", (10,), "u1", external=[("/etc/passwd", 0, 10)])
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("unwritten", (10,), "u1")
        file.create_dataset("chunks", (10,), "u1", chunks=(2,))
        file["chunks"][:3] = 1
        file.create_dataset("huge", (1 << 62,), "u1", chunks=(2,))
        file.create_dataset("zero", (0,), "u1", chunks=(4,), maxshape=(None,))
        file.create_dataset("text", data=["a"], dtype=h5py.string_dtype())
        file["none"] = h5py.Empty("u1")
    return path


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("away", ["/away is a link to another file, 'other.h5'"]),
        ("through", ["/away is a link to another file"]),
        ("circle", ["/circle is a link that leads to no dataset"]),
        ("external", ["/external keeps its values in another file ('/etc/passwd')"]),
        ("virtual", ["/virtual is a virtual dataset", "'missing.h5'", "into one file"]),
        ("unwritten", ["/unwritten should hold 10 bytes, but only 0 were written"]),
        ("chunks", ["/chunks lacks 3 of its 5 chunks", "copy it again"]),
        ("huge", ["/huge lacks 2305843009213693952 of its"]),
        ("text", ["/text holds no numbers but object"]),
        ("none", ["/none holds no numbers"]),
    ],
)
def test_datasets_that_are_refused(unsafe_file, name, parts):
    with open_hdf5_for_reading(unsafe_file) as file, pytest.raises(UnsafeDatasetError) as caught:
        require_plain_dataset(plain_member(file, name))
    assert is_damage(caught.value)
    assert "\n" not in str(caught.value)
    for part in (str(unsafe_file), *parts):
        assert part in str(caught.value)


def test_few_bytes_that_expand_to_many_are_refused(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, values in (("a", np.zeros(1 << 23, "u1")), ("b", np.arange(1 << 15))):
            file.create_dataset(name, data=values, chunks=values.shape, compression="gzip")
    with open_hdf5_for_reading(tmp_path / "a.h5") as file:
        constant = file["a"]
        varied = file["b"]
        require_bounded_expansion([constant])  # small
        monkeypatch.setattr(hdf5_files, "SMALL_BYTES", 1 << 20)
        require_bounded_expansion([constant, varied])
        with pytest.raises(UnsafeDatasetError, match=r"to 8388608, over 1000 times"):
            require_bounded_expansion([constant])


def test_plain_datasets_and_links_inside_the_file(unsafe_file):
    with open_hdf5_for_reading(unsafe_file) as file:
        for name in ("plain", "group/plain", "/group/plain", "linked", "group/near"):
            dataset = plain_member(file, name)
            require_plain_dataset(dataset)
            assert dataset[:].tolist() == [0, 1, 2, 3, 4]
        require_plain_dataset(plain_member(file, "zero"))
        assert plain_member(file["group"], "plain") == file["group/plain"]
        for name in ("nothing", "dangling", "plain/below", "group/linked"):
            assert plain_member(file, name) is None
