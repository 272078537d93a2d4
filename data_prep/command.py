"""What every command does around its work: mistakes end in one readable line, not in a traceback."""

import os
import sys
from collections.abc import Callable

from data_prep.errors import UserError

USER_ERROR_EXIT_CODE = 2


def debugging() -> bool:
    return os.environ.get("EVSPAN_DEBUG", "") not in ("", "0")


def run_command(main: Callable[[], object]) -> None:
    """Call `main`; print the user's mistakes as `error: ...` on stderr and exit with code 2.

    EVSPAN_DEBUG=1 lets the traceback through. Defects of the program itself always show theirs.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra would print and exit by itself, with code 1
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debugging() or not _is_users(error):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)


def _is_users(error: BaseException) -> bool:
    """Config composition errors come from Hydra and OmegaConf, which most commands never import: go by name."""
    library = type(error).__module__.split(".")[0]
    return isinstance(error, UserError | FileNotFoundError | PermissionError) or library in ("hydra", "omegaconf")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause) and str(cause) not in str(error):
        lines.append(str(cause).splitlines()[0].strip())
    return " ".join(lines) or type(error).__name__
