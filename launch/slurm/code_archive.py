"""The copy of the package that jobs import: written when they are submitted, and never changed.

FOLDER/code/DIGEST/            FOLDER is the sweep, or the single run
    code.json                  the digest, the commit, where the files come from, their digests
    evspan/                    the package's files (`evspan.conf.code_version`), read-only

DIGEST is that of the files: jobs with the same code share a copy. It is put in front of PYTHONPATH.
`evspan/__init__.py`, which only the copy has, makes it a regular package: Python prefers one to the
namespace package `evspan` of an installation, editable or not, wherever both are on the path.

The files keep their times, and numba's cached functions are copied: numba recognises them by the
time and size of the source file, so a job need not compile them again.
"""

import json
import os
import re
import shlex
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from evspan.conf.code_version import (
    CODE_FOLDER,
    MANIFEST,
    code_digest,
    content_digest,
    package_files,
    package_root,
    read_manifest,
    running_code,
)
from evspan.conf.errors import ConfigError
from evspan.conf.private_files import require_private_folder
from evspan.conf.schema.cluster import CodeSource, SlurmConfig

FOLDER = "code"
PACKAGE = "evspan"
READ_ONLY = 0o444
NUMBA_FILE = re.compile(r"(.+?)\..*\.(nbi|nbc)")  # MODULE.FUNCTION-LINE.pyVERSION.nbi


class PackageFile(NamedTuple):
    """A file of the package as it was submitted. time_ns: its modification time."""

    content: bytes
    time_ns: int


@dataclass(frozen=True)
class CodeArchive:
    """The copy in a folder, which `write` creates.

    files: by their names relative to the package. commit: of the checkout. source: the checkout.
    """

    folder: Path
    digest: str
    files: dict[str, PackageFile]
    commit: str | None
    source: Path

    def write(self) -> None:
        """Create the copy, or take an intact one.

        Raises:
            ForeignFileError: the copy belongs to another user.
            OSError: it cannot be written.
        """
        if self._exists():
            return
        parent = self.folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
        try:
            self._fill(temporary)
            if self.folder.exists():  # somebody has changed it
                os.rename(self.folder, temporary.with_suffix(".damaged"))
            os.rename(temporary, self.folder)
        except OSError:
            if not self._exists():  # another command has written it meanwhile
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(temporary.with_suffix(".damaged"), ignore_errors=True)

    def setup_lines(self) -> list[str]:
        """Lines of a batch script: nobody else may have written the copy, from which code runs."""
        folder = shlex.quote(str(self.folder))
        owner = os.lstat(self.folder).st_uid if self.folder.exists() else os.geteuid()
        return [
            f"code={folder}",
            'if ! read -r mode owner < <(stat -c "%f %u" -- "$code") ||',
            f"    [[ $owner != {owner} ]] || (((0x$mode & 0170022) != 0040000)); then",
            '    echo "evspan: $code is missing, or others can write it; submit again" >&2',
            "    exit 2",
            "fi",
            f'export {CODE_FOLDER}="$code"',
        ]

    def _exists(self) -> bool:
        """Whether the copy is there, and intact."""
        if not self.folder.exists():
            return False
        require_private_folder(self.folder)
        try:
            for name, file in self.files.items():
                if (self.folder / PACKAGE / name).read_bytes() != file.content:
                    return False
        except OSError:
            return False
        return read_manifest(self.folder).get("digest") == self.digest

    def _fill(self, folder: Path) -> None:
        # Readable for those who can read the run.
        mode = 0o700 | os.stat(folder.parent).st_mode & 0o755
        package = folder / PACKAGE
        subfolders: set[Path] = set()
        for name in self.files:
            subfolders.update(Path(name).parents)
        for path in [folder, package, *(package / parent for parent in sorted(subfolders))]:
            path.mkdir(exist_ok=True)
            path.chmod(mode)
        _write(package / "__init__.py", PackageFile(b"", 0))
        for name, file in self.files.items():
            _write(package / name, file)
        manifest = {
            "digest": self.digest,
            "commit": self.commit,
            "source": str(self.source),
            "time": round(time.time(), 3),
            "files": {name: content_digest(file.content) for name, file in self.files.items()},
        }
        text = json.dumps(manifest, indent=1) + "\n"
        _write(folder / MANIFEST, PackageFile(text.encode(), time.time_ns()))
        for parent in subfolders:  # Python would make these with the job's umask
            cache = package / parent / "__pycache__"
            cache.mkdir()
            cache.chmod(mode)
        self._copy_numba_cache(package)

    def _copy_numba_cache(self, package: Path) -> None:
        """Copy the functions that numba has compiled from the same files.

        As all of the copy, nobody else may write them: numba unpickles its indices.
        """
        root = package_root()
        for folder in sorted({Path(name).parent for name in self.files}):
            source = root / folder / "__pycache__"
            target = package / folder / "__pycache__"
            # The index comes first: what it lists is there.
            for path in sorted(source.glob("*.nb[ic]"), key=lambda path: path.suffix != ".nbi"):
                match = NUMBA_FILE.fullmatch(path.name)
                if match and f"{(folder / match[1]).as_posix()}.py" in self.files:
                    shutil.copyfile(path, target / path.name)
                    (target / path.name).chmod(0o644)


def plan_code(cluster: SlurmConfig, folder: Path) -> CodeArchive | None:
    """The copy that jobs of this folder import, not yet written; None for cluster.code=live.

    A process reads its package once: all that it submits has the same code.

    Args:
        folder: of the sweep, or of the single run.

    Raises:
        ConfigError: the path cannot be in PYTHONPATH.
        UserError: the package is too large.
    """
    if cluster.code is CodeSource.live:
        return None
    if os.pathsep in str(folder.absolute()):
        raise ConfigError(
            f"{folder.absolute()} contains {os.pathsep!r}, so PYTHONPATH cannot contain the "
            "submitted code in it; choose a folder without it, or cluster.code=live"
        )
    files, digest = _snapshot()
    source = package_root()
    manifest = read_manifest(source.parent)
    if manifest:  # this process runs an archive itself
        source = Path(str(manifest.get("source")))
    return CodeArchive(
        folder.absolute() / FOLDER / digest, digest, files, running_code().commit, source
    )


def submitted_code(code: CodeArchive | None) -> dict[str, str | None]:
    """What `submitted.json` records: digest, commit, folder of the copy (empty: there is none)."""
    version = running_code()
    folder = "" if code is None else str(code.folder)
    return {"digest": version.digest, "commit": version.commit, "folder": folder}


@cache
def _snapshot() -> tuple[dict[str, PackageFile], str]:
    """The files of this process's package, and their digest."""
    files = {
        name: PackageFile(path.read_bytes(), path.stat().st_mtime_ns)
        for name, path in package_files(package_root()).items()
    }
    return files, code_digest({name: content_digest(file.content) for name, file in files.items()})


def _write(path: Path, file: PackageFile) -> None:
    path.write_bytes(file.content)
    path.chmod(READ_ONLY)
    os.utime(path, ns=(file.time_ns, file.time_ns))
