"""Runs a command that refuses its arguments."""

from collections.abc import Callable

import pytest


def refused_by(main: Callable[[list[str]], object], capture, *arguments: object) -> str:
    """The one-line error of `main`, which exits with code 2. capture: pytest's capsys."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    error = capture.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    return error
