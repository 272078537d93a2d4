"""Where numba keeps compiled functions. Imports neither numba nor numpy.

numba writes next to the source files, or else into the user's cache folder, and fails where it can
write to neither: an installation that is read-only (a container, a shared module) and a user
without a home. Then NUMBA_CACHE_DIR names a folder in the temporary folder. Files in it are loaded
as machine code, so it belongs to this user alone.
"""

import atexit
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

VARIABLE = "NUMBA_CACHE_DIR"


def provide_numba_cache() -> None:
    """Sets NUMBA_CACHE_DIR where numba could write nowhere else.

    Child processes inherit it. A value that the user has set stays.
    """
    if os.environ.get(VARIABLE) or _can_write(Path(__file__).parent / "__pycache__"):
        return
    if _can_write(_user_cache()):
        return
    try:
        folder = _private_folder()
    except OSError:  # no temporary folder can be written either; numba's error says so
        return
    os.environ[VARIABLE] = folder
    if "numba" in sys.modules:  # it has read its variables already
        sys.modules["numba"].config.reload_config()


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "numba")


def _can_write(folder: Path) -> bool:
    """Whether files can be created in a folder, which is created first, as numba does.

    Permissions do not say it: root may write to a folder of /proc, and cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _private_folder() -> str:
    """A folder that only this user can read and write.

    Its name is the same for every process of the user. Where another user, or this one with other
    permissions, has taken the name, it is a new folder for this process and its children.
    """
    folder = Path(tempfile.gettempdir(), f"evspan-numba-{os.geteuid()}")
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not _is_private(folder):
            temporary = tempfile.mkdtemp(prefix=f"{folder.name}-")
            atexit.register(_remove, temporary, os.getpid())
            return temporary
    return str(folder)


def _is_private(folder: Path) -> bool:
    info = folder.lstat()  # a link is not followed
    is_own = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
    return is_own and stat.S_IMODE(info.st_mode) & 0o077 == 0


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)
