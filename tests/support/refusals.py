"""A command that refuses its arguments, seen from a test."""

from collections.abc import Callable

import pytest


def refused_by(main: Callable[[list[str]], object], capture, *arguments: object) -> str:
    """The one line that `main` ends with, with exit code 2. capture: pytest's capsys."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    told = capture.readouterr().err
    assert exit_.value.code == 2
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1
    return told
