"""The secret that the ranks of a SLURM job share, in a file that only the user can read."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from evspan.conf.private_files import create_private_file
from evspan.conf.secret_values import new_secret

SECRET_FILE = "secret"  # next to Submitit's pickles


def create_secret(folder: Path) -> None:
    """Creates the secret of an array of runs in its private folder."""
    file = folder / SECRET_FILE
    file.unlink(missing_ok=True)
    create_private_file(file, new_secret())


def secret_of_attempt(secret: str, env: Mapping[str, str]) -> str:
    """What the ranks of one attempt of one run share: jobs that meet at a port stay apart."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    attempt = ".".join(env.get(name, "0") for name in names)
    return hashlib.sha256(f"{secret}.{attempt}".encode()).hexdigest()
