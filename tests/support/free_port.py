"""A port for the ranks of a test."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of this machine that no other program gets meanwhile.

    It is bound here but never listened on. Rank 0 can still listen on it, because torch binds with
    SO_REUSEADDR, as this does.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]
