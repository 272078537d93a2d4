"""The files of a run's checkpoints: names, checksums, and the newest intact checkpoint.

RUN/checkpoints/latest               the name of the newest checkpoint
RUN/checkpoints/best                 the name of the one with the highest AP
RUN/checkpoints/step-00001000/       see evspan.pipeline.engine.checkpoints
RUN/checkpoints/damaged-step-...     set aside when a run resumed from an older one
RUN/checkpoints/former-1/            all of these, of a run that was started over in its folder

meta.json contains the size and the xxh3-64 of every other file, under `files`. meta.json and
metrics.json end with their own checksum, of all bytes before that line. Checkpoints without `files`
are of earlier versions, and are read without these checks.

Launchers read this file, too: it does not import torch.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from evspan.conf.errors import UserError
from evspan.conf.json_files import MOST_BYTES, JsonFileError, parse_json_object
from evspan.conf.text import printable

FOLDER = "checkpoints"
LATEST = "latest"
BEST = "best"
META = "meta.json"
METRICS = "metrics.json"
WEIGHTS = "weights.safetensors"
EMA = "ema.safetensors"  # the moving average of the weights, with the same names
FILES = "files"  # key of meta.json
FORMAT_VERSION = 2  # `form` of meta.json; 1 had DeepSpeed's shards instead of moments and lanes
STEP_NAME = re.compile(r"step-([0-9]{8,18})")
FILE_NAME = re.compile(r"[\w-]+\.\w+")  # of what `files` lists
CHECKSUM_LINE = re.compile(rb',\n "xxh3": "([0-9a-f]{16})"\n\}\n')
CHECKSUM_LINE_BYTES = 32
MISSING = "is missing"  # a problem of DamagedError
BLOCK = 1 << 20  # bytes that are read at once for a checksum


class DamagedError(UserError):
    """A file of a checkpoint is not what was saved.

    Attributes:
        folder: the checkpoint. file: its name there. problem: a predicate, "is missing".
    """

    def __init__(self, folder: Path, file: str, problem: str) -> None:
        self.folder = folder
        self.file = file
        self.problem = printable(problem)
        super().__init__(
            f"{folder} is damaged: {file} {self.problem}. Name another checkpoint, or the run "
            "folder, whose newest intact checkpoint is then used"
        )


class FileSum(NamedTuple):
    """The size of a file in bytes and its xxh3-64 in hex."""

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Meta:
    """meta.json.

    Attributes:
        values: all of it, as JSON values.
        files: the checksum of every other file by name; None in a checkpoint of an earlier version.
    """

    values: dict[str, Any]
    files: dict[str, FileSum] | None


def sum_of(data: bytes) -> FileSum:
    """The checksum of a file with these contents."""
    return FileSum(len(data), xxhash.xxh3_64_hexdigest(data))


def file_sum(path: Path) -> FileSum:
    """The checksum of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_64()
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return FileSum(size, digest.hexdigest())


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The inverse of `checkpoint_name`; -1 for another name."""
    match = STEP_NAME.fullmatch(name)
    if match is None or checkpoint_name(int(match[1])) != name:
        return -1
    return int(match[1])


# -- JSON files with a checksum --------------------------------------------------------------------
def dump_with_checksum(values: dict[str, Any]) -> bytes:
    """JSON text whose last entry is the checksum of all bytes before it. `values` is not empty."""
    text = json.dumps(values, indent=1).removesuffix("\n}").encode()
    return text + b',\n "xxh3": "%s"\n}\n' % xxhash.xxh3_64_hexdigest(text).encode()


def read_with_checksum(folder: Path, name: str) -> tuple[dict[str, Any], bool]:
    """Reads what `dump_with_checksum` wrote, or an object without a checksum.

    Returns:
        The object without its checksum, and whether it has one.

    Raises:
        DamagedError: the file is missing, another text than the one written, or no JSON object.
        OSError: it cannot be read.
    """
    try:
        with (folder / name).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedError(folder, name, _not_there(folder / name)) from None
    if len(data) > MOST_BYTES:
        raise DamagedError(folder, name, f"is larger than {MOST_BYTES} bytes")
    line = CHECKSUM_LINE.fullmatch(data[-CHECKSUM_LINE_BYTES:])
    if line and xxhash.xxh3_64_hexdigest(data[:-CHECKSUM_LINE_BYTES]) != line[1].decode():
        raise DamagedError(folder, name, "does not have the checksum in its last line")
    try:
        values = parse_json_object(data, "")
    except JsonFileError as error:
        raise DamagedError(folder, name, str(error).strip()) from None
    if values.pop("xxh3", None) is not None and not line:
        raise DamagedError(folder, name, "does not end with its checksum")
    return values, line is not None


# -- one checkpoint --------------------------------------------------------------------------------
def read_meta(folder: Path) -> Meta:
    """Reads and checks meta.json of a checkpoint.

    Raises:
        DamagedError: it is missing or damaged, or of another checkpoint.
        OSError: it cannot be read.
    """
    values, has_checksum = read_with_checksum(folder, META)
    meta = parse_meta(folder, values, has_checksum=has_checksum)
    step = meta.values["step"]
    if step_of(folder.name) not in (-1, step):
        raise DamagedError(folder, META, f"is of step {step}")
    return meta


def parse_meta(folder: Path, values: dict[str, Any], *, has_checksum: bool) -> Meta:
    """Checks the contents of meta.json.

    Args:
        folder: the checkpoint, for the error. has_checksum: whether the file ends with one.

    Raises:
        DamagedError: what every checkpoint has is missing.
    """
    files = _parse_files(folder, values.get(FILES))
    if (files is not None) != has_checksum:
        raise DamagedError(folder, META, "lacks its checksum or those of the other files")
    step = values.get("step")
    if not _is_count(step):
        raise DamagedError(folder, META, f"has the step {step!r}, not a number")
    expected: dict[str, type] = {"config": dict}
    if values.get("form") == FORMAT_VERSION:
        expected |= {"counters": dict, "skipped": int}
    for key, kind in expected.items():
        if not isinstance(values.get(key), kind):
            raise DamagedError(folder, META, f"has no {key}, or not as it is saved")
    return Meta(values, files)


def _parse_files(folder: Path, stored: Any) -> dict[str, FileSum] | None:
    if stored is None:
        return None
    try:
        files = {}
        for name, of in stored.items():
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{name} is no name of a file")
            files[name] = FileSum(int(of["bytes"]), str(of["xxh3"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DamagedError(folder, META, f"has {FILES} of another form") from None
    return files


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_inventory(folder: Path, meta: Meta) -> None:
    """Checks names and sizes of a checkpoint's files.

    Other files are not read and may be there, but tensors that were not saved with it may not.

    Raises:
        DamagedError: a file is missing, has another size, or is of another checkpoint.
        OSError: the folder cannot be read.
    """
    if meta.files is None:
        return
    for name, expected in meta.files.items():
        _check_size(folder, name, expected)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in meta.files:
            raise DamagedError(folder, path.name, "was not saved with it")


def check_file(folder: Path, meta: Meta, name: str) -> None:
    """Checks the contents of a file. In a checkpoint without checksums, only that it is there.

    Raises:
        DamagedError: it is missing, or has other contents than those saved.
        OSError: it cannot be read.
    """
    path = folder / name
    if meta.files is None:
        if not path.is_file():
            raise DamagedError(folder, name, _not_there(path))
        return
    if name not in meta.files:
        raise DamagedError(folder, name, "was not saved with it")
    expected = meta.files[name]
    _check_size(folder, name, expected)
    xxh3 = file_sum(path).xxh3
    if xxh3 != expected.xxh3:
        raise DamagedError(
            folder, name, f"has the checksum {xxh3}, it was saved with {expected.xxh3}"
        )


def _check_size(folder: Path, name: str, expected: FileSum) -> None:
    path = folder / name
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        size = -1
    if size < 0 or not path.is_file():
        raise DamagedError(folder, name, _not_there(path))
    if size != expected.bytes:
        what = "is cut off" if size < expected.bytes else "is too long"
        raise DamagedError(folder, name, f"{what}: {size} bytes, was saved with {expected.bytes}")


def _not_there(path: Path) -> str:
    return "is no file" if path.exists() else MISSING


# -- the checkpoints of a run ---------------------------------------------------------------------
class Damage(NamedTuple):
    """A damaged file of a checkpoint: names of the checkpoint and of the file, and the problem."""

    checkpoint: str
    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.checkpoint} is damaged ({self.file} {self.problem})"


@dataclass
class Search:
    """The search for the newest intact checkpoint of a run.

    Attributes:
        run: its folder.
        name: of the newest intact checkpoint; None: there is none.
        damaged: newer ones that are damaged, newest first.
        notes: what is wrong with the pointer `latest`, as sentences' ends.
    """

    run: Path
    name: str | None = None
    damaged: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The newest intact checkpoint."""
        assert self.name is not None
        return self.run / FOLDER / self.name

    def message(self) -> str:
        """What is damaged, and what is used instead, in one line; empty where nothing is."""
        problems = [*map(str, self.damaged), *self.notes]
        if not problems:
            return ""
        return f"{'; '.join(problems)}; {self.name}, the newest intact checkpoint, is used"

    def require(self) -> None:
        """Checks that there is an intact checkpoint if there is any.

        Raises:
            UserError: all are damaged or gone.
        """
        problems = [*map(str, self.damaged), *self.notes]
        if self.name is None and problems:
            raise UserError(
                f"{self.run / FOLDER} has no intact checkpoint: {'; '.join(problems)}. Restore "
                "one from a copy, or start over: another run_dir, or checkpoint.resume=false"
            )


def find_newest_intact(
    run: Path,
    files: Iterable[str] | Callable[[Meta], Iterable[str]] | None = None,
    *,
    passed_over: Sequence[Damage] = (),
) -> Search:
    """Finds the checkpoint with the highest step whose files are intact.

    Args:
        files: names of files whose contents are checked, in addition to meta.json, or a function
            that returns them for a checkpoint; None: all.
        passed_over: damages that are known already.

    Raises:
        OSError: a file cannot be read; whether it is damaged is not known.
    """
    search = Search(run)
    folder = run / FOLDER
    latest, search.notes = _read_latest(folder)
    names = step_names(folder)
    known = {damage.checkpoint: damage for damage in passed_over}
    for name in names:
        if name in known:
            search.damaged.append(known[name])
            continue
        try:
            meta = read_meta(folder / name)
            if meta.files is None and latest in names and _is_newer(name, latest):
                search.notes.append(
                    f"{name} is newer than {LATEST} but has no checksums, as one of a run that was "
                    "started over, and is not used"
                )
                continue
            _check_contents(folder / name, meta, files)
        except DamagedError as error:
            search.damaged.append(Damage(name, error.file, error.problem))
            continue
        search.name = name
        break
    _note_latest(search, latest, names)
    return search


def _check_contents(
    folder: Path, meta: Meta, files: Iterable[str] | Callable[[Meta], Iterable[str]] | None
) -> None:
    """As `find_newest_intact` does."""
    check_inventory(folder, meta)
    if files is None:
        files = meta.files or ()
    elif callable(files):
        files = files(meta)
    for file in files:
        check_file(folder, meta, file)


def _is_newer(name: str, other: str) -> bool:
    return step_of(name) > step_of(other)


def step_names(folder: Path) -> list[str]:
    """The names of all checkpoints, the highest step first."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if step_of(path.name) >= 0]
    return sorted(names, key=step_of, reverse=True)


def read_pointer(path: Path) -> str | None:
    """The name that a pointer contains; None where there is no file.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return printable(file.read(200).decode(errors="replace").rstrip("\r\n"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_latest(folder: Path) -> tuple[str, list[str]]:
    """The name in `latest`, empty without a valid one, and what is wrong with it."""
    name = read_pointer(folder / LATEST)
    if name is None:
        return "", []
    if step_of(name) < 0:
        return "", [f"{LATEST} contains {name!r}, which is no name of a checkpoint"]
    return name, []


def _note_latest(search: Search, latest: str, names: Sequence[str]) -> None:
    if not names and not latest:
        return
    if not latest and not search.notes:
        search.notes.append(f"{LATEST} is missing")
    elif latest and latest not in names:
        search.notes.append(f"{LATEST} names {latest}, which is missing")
    elif search.name is not None and latest and _is_newer(search.name, latest):
        search.notes.append(f"{LATEST} names {latest}, which is older")


# -- the checkpoint that a user names --------------------------------------------------------------
class FoundWeights(NamedTuple):
    """A weights file. message: a line on what is damaged and not used; empty where nothing is."""

    file: Path
    message: str = ""


def weights_file(checkpoint_folder: Path, *, raw: bool = False) -> Path:
    """The file of the weights that a checkpoint is used with; nothing is checked.

    Args:
        raw: the weights that the optimizer updates. False: their moving average (EMA) where the
            checkpoint has one, else the same.
    """
    average = checkpoint_folder / EMA
    return average if not raw and average.is_file() else checkpoint_folder / WEIGHTS


def _weights_name(meta: Meta, *, raw: bool) -> str:
    """The name of `weights_file` in a checkpoint with this meta.json."""
    return EMA if not raw and EMA in (meta.files or ()) else WEIGHTS


def find_weights(path: Path, *, raw: bool = False) -> FoundWeights:
    """The weights file of what a user names. In a checkpoint, its contents are checked.

    Args:
        path: a .safetensors file, a checkpoint folder, RUN/checkpoints/best, or a run folder or
            RUN/checkpoints/latest: the newest intact checkpoint.
        raw: of a checkpoint, the weights that the optimizer updates; False: their moving average
            where it has one. A file that is named is used as it is.

    Raises:
        DamagedError: a file of the checkpoint that is named is damaged.
        UserError: there is none, or the run has no intact one.
        OSError: a file cannot be read.
    """
    if path.name == BEST and path.is_file():
        name = read_pointer(path) or ""
        if step_of(name) < 0 or not (path.parent / name).is_dir():
            raise DamagedError(path.parent, BEST, f"contains {name!r}, which is no checkpoint")
        path = path.parent / name
    if path.name == LATEST and path.is_file():
        path = path.parent.parent
    if path.is_file():
        if path.name in (WEIGHTS, EMA) and _is_checkpoint(path.parent):
            check_file(path.parent, read_meta(path.parent), path.name)
        return FoundWeights(path)
    if _is_checkpoint(path):
        meta = read_meta(path)
        name = _weights_name(meta, raw=raw)
        check_file(path, meta, name)
        return FoundWeights(path / name)
    if (path / WEIGHTS).is_file():
        return FoundWeights(weights_file(path, raw=raw))
    search = find_newest_intact(path, lambda meta: [_weights_name(meta, raw=raw)])
    search.require()
    if search.name is None:
        raise UserError(
            f"{path} holds no checkpoint. Name a run folder (it has {FOLDER}/{LATEST}), one of its "
            "checkpoints, or a .safetensors file"
        )
    message = search.message()
    if message:
        message = f"{path / FOLDER}: {message}"
    name = _weights_name(read_meta(search.folder), raw=raw)
    return FoundWeights(search.folder / name, message)


def _is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and (step_of(folder.name) >= 0 or (folder / META).is_file())
