"""Campaigns of damaged files: each is read, or refused with a UserError that names it, and no more.

A test file describes its formats as `Kind`s by name and ends with

    if __name__ == "__main__":
        fuzz.main(KINDS)

`run_all` and `run_many` start that file as a process of its own, so that a crash, a hang or too
much memory is noticed: python tests/.../test_x_fuzz.py KIND FIRST N, with tests/ on PYTHONPATH. The
same seed gives the same bytes. `make test` runs a small share of the cases, `make soak` thousands.

A case fails if it raises another error than a UserError, takes over CASE_SECONDS or MOST_BYTES,
opens or changes a file outside its folder, imports or executes code that does not belong to the
installation, or starts a process. Files that libraries open in C are not seen by Python's audit
hooks; for these there is a canary, a file outside the folder whose access time is watched. Damage
that leads out of the folder (links, paths, external storage) should lead to it: `canary(folder)`.
"""

import faulthandler
import os
import re
import resource
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.errors import UserError

CASE_SECONDS = 20  # a case takes milliseconds
MOST_BYTES = 1 << 30  # above what the process takes before the first case
ROOT = Path(__file__).parents[2]
CANARY = "canary"

NUMBERS = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1]
BYTES = [0, 0xFF, 0x7F, 0x80, 0x25]
HEADER_LETTERS = list(b"0123456789-.eE;= x\n%")


@dataclass(frozen=True)
class Kind:
    """A format of files.

    Attributes:
        make: writes a whole example into an empty folder.
        check: reads the folder. Returns if it is sound, raises a UserError with the folder's path
            if it is not.
        files: glob of the files that are damaged.
        header: bytes at the beginning of a file that take half of the damage.
        damage: changes the folder in place of `damaged`, for formats with a structure of their own
            (JSON, HDF5 objects, links). It may call `damage_bytes` for a part of the seeds.
        least: in place of `run_all`'s, where nearly all damage is refused, or nearly none.
    """

    make: Callable[[Path], None]
    check: Callable[[Path], None]
    files: str = "*"
    header: int = 160
    damage: Callable[[Path, np.random.Generator], None] | None = None
    least: int | None = None


def canary(folder: Path) -> Path:
    """A file outside the folder of a case, which nothing may read or change."""
    return folder.parent / CANARY


# -- damage ----------------------------------------------------------------------------------------
def damage_bytes(folder: Path, kind: Kind, rng: np.random.Generator) -> None:
    """Damages one of the files of the kind."""
    paths = sorted(path for path in folder.glob(kind.files) if path.is_file())
    path = paths[int(rng.integers(len(paths)))] if len(paths) > 1 else paths[0]
    path.write_bytes(damaged(path.read_bytes(), kind.header, rng))


def damaged(data: bytes, header: int, rng: np.random.Generator) -> bytes:
    """The data after one to four changes: bits, bytes, numbers, slices, the end.

    Half of the changes are in the first `header` bytes.
    """
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        damage(out, header, rng)
    if rng.random() < 0.6:  # whole words, so that more of the damage is read
        del out[len(out) - (len(out) - len(data)) % 8 :]
    return bytes(out)


def damage(out: bytearray, header: int, rng: np.random.Generator) -> None:
    """Makes one change."""
    end = min(len(out), header) if rng.random() < 0.5 else len(out)
    at = int(rng.integers(end + 1))
    span = int(rng.integers(1, 1 + min(64, len(out) + 1)))
    change = int(rng.integers(9))
    if change == 0 and at < len(out):
        out[at] ^= 1 << int(rng.integers(8))
    elif change == 1:
        out[at : at + span] = rng.bytes(len(out[at : at + span]))
    elif change == 2:
        out[at : at + span] = bytes([int(rng.choice(BYTES))]) * len(out[at : at + span])
    elif change == 3:
        number = int(rng.choice(NUMBERS))
        out[at : at + 8] = number.to_bytes(8, "little")[: int(rng.choice([1, 2, 4, 8]))]
    elif change == 4:
        del out[at : at + span * int(rng.choice([1, 1, 100]))]
    elif change == 5:
        out[at:at] = rng.bytes(span)
    elif change == 6:
        out[at:at] = out[int(rng.integers(len(out) + 1)) :][: span * 8]
    elif change == 7:
        change_digits(out, header, rng)
    else:
        del out[at:]


def change_digits(out: bytearray, header: int, rng: np.random.Generator) -> None:
    """Replaces up to three digits of the header."""
    digits = [i for i, byte in enumerate(out[:header]) if 0x30 <= byte <= 0x39]
    for i in digits[: int(rng.integers(len(digits) + 1))][-3:]:
        out[i] = int(rng.choice(HEADER_LETTERS))


# -- audit -----------------------------------------------------------------------------------------
INSTALLATION = tuple(
    {
        os.path.realpath(path)
        for path in (
            *sysconfig.get_paths().values(),
            *site.getsitepackages(),
            *(path for path in sys.path if path.endswith("site-packages")),
            sys.prefix,
            sys.base_prefix + "/lib",
            ROOT,
        )
    }
)
SYSTEM_FILES = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/localtime")
# Libraries that compile code of their own, and keep it pickled.
COMPILERS = ("/numba/", "/llvmlite/", "/torch/", "/jinja2/", "/lib/python3")
STARTS = frozenset(
    {
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.forkpty",
        "pty.spawn",
        "socket.connect",
        "socket.bind",
    }
)
CODE = frozenset({"exec", "compile", "pickle.find_class", "marshal.loads", "code.__new__"})
CHANGES = frozenset(
    {
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.chmod",
        "os.chown",
        "os.truncate",
        "os.utime",
        "shutil.rmtree",
        "shutil.copyfile",
        "shutil.move",
    }
)


class Audit:
    """An audit hook of Python that reports what a case does outside its folder while `armed`."""

    def __init__(self, folder: Path) -> None:
        self.inside = os.path.realpath(folder) + "/"
        self.armed = False
        self.reports: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        self.armed = False  # what the hook itself does
        try:
            report = self._report(event, args)
            if report:
                self.reports.append(report)
        finally:
            self.armed = True

    def _report(self, event: str, args: tuple[Any, ...]) -> str:
        if event in STARTS:
            return f"{event}{args!r:.300}"
        if event == "open":
            return self._opened(args)
        if event in CHANGES:
            outside = [path for path in args if isinstance(path, str | bytes | os.PathLike)]
            outside = [path for path in outside if not self._is_inside(path)]
            outside = [path for path in outside if not _is_a_cache(os.fsdecode(path))]
            return f"{event}: {outside}" if outside else ""
        if event in CODE and not _of_the_installation():
            return f"{event}{args!r:.300}"
        return ""

    def _opened(self, args: tuple[Any, ...]) -> str:
        path, mode, flags = args
        if isinstance(path, int) or self._is_inside(path):
            return ""
        real = os.path.realpath(os.fsdecode(path))
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and real.startswith(SYSTEM_FILES):
            return ""
        if _belongs(real) and (not writes or _is_a_cache(real)):
            return ""
        return f"open {real} ({mode})"

    def _is_inside(self, path: Any) -> bool:
        return (os.path.realpath(os.fsdecode(path)) + "/").startswith(self.inside)


def _belongs(path: str) -> bool:
    return any(path.startswith(root + "/") for root in INSTALLATION)


def _is_a_cache(path: str) -> bool:
    """Whether compiled code is kept there."""
    return "__pycache__" in path and _belongs(os.path.realpath(path))


def _of_the_installation() -> bool:
    """Whether the code below the hook is Python's own, or of a library that compiles."""
    frame = sys._getframe(3)  # the caller of what raised the event
    name = frame.f_code.co_filename
    return name.startswith("<frozen") or any(part in name for part in COMPILERS)


# -- a process with cases --------------------------------------------------------------------------
class Folder:
    """The folder of a kind's cases, which is as whole as `make` wrote it before each case."""

    def __init__(self, kind: Kind, outer: Path) -> None:
        self.path = outer / "case"
        self.path.mkdir()
        kind.make(self.path)
        self.whole = {
            path: path.read_bytes() for path in sorted(self.path.rglob("*")) if path.is_file()
        }

    def restore(self) -> None:
        """Makes all files as they were."""
        for path in sorted(self.path.rglob("*"), reverse=True):
            is_folder = path.is_dir() and not path.is_symlink()
            if not is_folder and (path not in self.whole or path.is_symlink()):
                path.unlink()
            elif is_folder and not any(path.iterdir()):
                path.rmdir()
        for path, data in self.whole.items():
            if path.is_dir():
                shutil.rmtree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def is_read(folder: Path, check: Callable[[Path], None]) -> bool:
    """Whether the folder is read; otherwise it is refused with an error that names it."""
    try:
        check(folder)
    except UserError as error:
        message = str(error)
    else:
        return True
    assert str(folder) in message, message
    return False


def run_cases(name: str, kind: Kind, first: int, n: int) -> None:
    """Runs seeds first .. first + n - 1; prints how many folders were read and how many refused."""
    warnings.simplefilter("error")  # of numpy: a value that did not fit
    with tempfile.TemporaryDirectory() as outer:
        folder = Folder(kind, Path(outer))
        kind.check(folder.path)  # also imports and compiles what the cases need
        folder.restore()
        guard = canary(folder.path)
        guard.write_text("nobody reads this\n" * 100)
        audit = Audit(folder.path)
        refused = 0
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in range(first, first + n):
            rng = np.random.default_rng([seed, *name.encode()])
            if kind.damage:
                kind.damage(folder.path, rng)
            else:
                damage_bytes(folder.path, kind, rng)
            os.utime(guard, (0, 0))
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
            print(f"case {name} {seed}", file=sys.stderr, flush=True)
            audit.armed = True
            try:
                refused += not is_read(folder.path, kind.check)
            finally:
                audit.armed = False
            faulthandler.cancel_dump_traceback_later()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            assert grown < MOST_BYTES, f"{grown} bytes of memory"
            assert not audit.reports, audit.reports
            used = guard.stat()
            assert (used.st_atime, used.st_mtime) == (0, 0), "the canary was read or changed"
            folder.restore()
    print(f"{name}: {n - refused} read, {refused} refused")


def main(kinds: Mapping[str, Kind]) -> None:
    """Runs the cases that the arguments KIND FIRST N name; KIND may be `all`."""
    name, first, n = sys.argv[1:]
    for each in kinds if name == "all" else [name]:
        run_cases(each, kinds[each], int(first), int(n))


# -- campaigns -------------------------------------------------------------------------------------
def in_a_process(
    file: str, name: str, first: int, n: int, timeout: int
) -> subprocess.CompletedProcess[str]:
    """Runs cases of one kind, or of `all`, in a process.

    Args:
        file: `__file__` of the test file that calls `main`.
    """
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", file, name, str(first), str(n)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
    )


def failure(result: subprocess.CompletedProcess[str]) -> str:
    """Kind and number of the case that ended the process, and its output."""
    return result.stderr.rsplit("case ", 1)[-1]


def run_all(
    file: str, kinds: Mapping[str, Kind], n: int, *, least: int = 1, timeout: int = 150
) -> None:
    """Runs `n` cases of each kind in one process.

    Args:
        least: of each kind, as many cases or more are read, and as many refused: both occur.
    """
    result = in_a_process(file, "all", 0, n, timeout)
    assert result.returncode == 0, f"{result.stdout} and then case {failure(result)}"
    lines = re.findall(r"^(\w+): (\d+) read, (\d+) refused$", result.stdout, re.MULTILINE)
    assert [line[0] for line in lines] == list(kinds), result.stdout
    for name, read, refused in lines:
        assert int(read) + int(refused) == n, name
        expected = least if kinds[name].least is None else kinds[name].least
        assert min(int(read), int(refused)) >= expected, f"{name}: {read} read, {refused} refused"


def run_many(file: str, kinds: Mapping[str, Kind], name: str) -> None:
    """Runs EVSPAN_FUZZ_CASES (by default 100,000) cases, shared by the kinds, of one of them."""
    num_cases = int(os.environ.get("EVSPAN_FUZZ_CASES", 100_000)) // len(kinds)
    result = in_a_process(file, name, 1000, num_cases, timeout=3 * 3600)
    assert result.returncode == 0, failure(result)
    print(f"{name}: {num_cases} cases; {result.stdout.strip()}")
