"""Which code runs: the files of the package, their digest, and the git commit that they come from.

The package's folders are `conf`, `data_prep`, `launch` and `pipeline`, side by side in a checkout
as in an installation. A file belongs to the package if an installation has it: `.py`, `.yaml`,
`py.typed`, and everything in a folder `templates`. Untracked and changed files count as they are.

A SLURM job imports a copy of these files (`evspan.launch.slurm.code_archive`).
"""

import hashlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from evspan.conf.errors import UserError
from evspan.conf.json_files import JsonFileError, read_json_object

LAYERS = ("conf", "data_prep", "launch", "pipeline")
SUFFIXES = (".py", ".yaml")
TYPED = "py.typed"
TEMPLATES = "templates"
MOST_FILES = 5_000
MOST_BYTES = 64 << 20
DIGEST_LENGTH = 16  # hexadecimal digits
CODE_FOLDER = "EVSPAN_CODE"  # variable of a job: the folder that it has to import the package from
MANIFEST = "code.json"  # next to the package in an archive
GIT_TIMEOUT_S = 20


class CodeVersion(NamedTuple):
    """The code that this process runs.

    digest: of the package's files; empty if they cannot be read. commit: of the git checkout, with
    '-dirty' if tracked files differ; None without git.
    """

    digest: str
    commit: str | None


def package_root() -> Path:
    """The folder that contains the package's folders."""
    return Path(__file__).absolute().parents[1]


def package_files(root: Path) -> dict[str, Path]:
    """The package's files below `root` by their names relative to it, sorted.

    Raises:
        UserError: they are too many or too large to be only code.
    """
    files: dict[str, Path] = {}
    size = 0
    for layer in LAYERS:
        for path in _files_of(root / layer):
            files[path.relative_to(root).as_posix()] = path
            size += path.stat().st_size
            if len(files) > MOST_FILES or size > MOST_BYTES:
                raise UserError(
                    f"the package in {root} has more than {MOST_FILES} files or "
                    f"{MOST_BYTES >> 20} MiB ({path.parent} is one of its folders). Move what is "
                    "not code out of conf, data_prep, launch and pipeline, or set cluster.code=live"
                )
    return dict(sorted(files.items()))


def _files_of(folder: Path) -> Iterator[Path]:
    for name, subfolders, files in os.walk(folder):
        subfolders[:] = [sub for sub in subfolders if sub != "__pycache__" and sub[0] != "."]
        is_templates = Path(name).name == TEMPLATES
        for file in files:
            path = Path(name, file)
            belongs = is_templates or path.suffix in SUFFIXES or file == TYPED
            if belongs and file[0] != "." and path.is_file():
                yield path


def content_digest(content: bytes) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def code_digest(digests: Mapping[str, str]) -> str:
    """The digest of a package from those of its files, by their names."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return content_digest(lines.encode())[:DIGEST_LENGTH]


def file_digests(root: Path) -> dict[str, str]:
    """The digests of the package's files below `root`, by their names.

    Raises:
        UserError: they are too many or too large to be only code.
        OSError: one cannot be read.
    """
    files = package_files(root)
    return {name: content_digest(path.read_bytes()) for name, path in files.items()}


@cache
def running_code() -> CodeVersion:
    """The code that this process runs. That of an archive is in its manifest."""
    manifest = read_manifest(package_root().parent)
    if manifest:
        commit = manifest.get("commit")
        return CodeVersion(str(manifest.get("digest")), None if commit is None else str(commit))
    try:
        digest = code_digest(file_digests(package_root()))
    except (OSError, UserError):  # it is not worth failing for
        digest = ""
    return CodeVersion(digest, code_commit())


def read_manifest(archive: Path) -> dict[str, object]:
    """The manifest of an archive; empty if the folder is none."""
    try:
        return read_json_object(archive / MANIFEST)
    except (OSError, ValueError, JsonFileError):  # ValueError: a null character in the path
        return {}


def require_submitted_code(env: Mapping[str, str]) -> None:
    """Checks that this process of a job runs the code that was submitted.

    Raises:
        UserError: Python has imported the package from elsewhere.
    """
    folder = env.get(CODE_FOLDER, "")
    if folder and not package_root().is_relative_to(folder):
        raise UserError(
            f"this job was submitted with the code in {folder}, but Python imports evspan from "
            f"{package_root()}. Remove what changes PYTHONPATH or sys.path on the nodes "
            "(cluster.setup, cluster.environment, cluster.python), or set cluster.code=live"
        )


def code_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the git checkout that tracks `file`, with "-dirty" if tracked files differ.

    Returns:
        None if no checkout tracks it, or git does not run.
    """
    file = file.resolve()
    try:
        # An installed package may be inside a checkout of something else, which does not track it.
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=GIT_TIMEOUT_S,
    )
    return result.stdout.strip()
