"""Values that no run may publish: the ranks' common secret, and values of `cluster` settings."""

import secrets

RUN_SECRET = "EVSPAN_RUN_SECRET"  # environment variable of a rank; see pipeline.parallel.run_secret


def new_secret() -> str:
    """A random secret, 64 characters."""
    return secrets.token_hex(32)
