"""Runs what Submitit has pickled, if no one but this user could have written it.

python -m evspan.launch.slurm.submitted_task FOLDER

It takes the place of `python -m submitit.core._submit FOLDER` in batch scripts.
"""

import os
import sys
from pathlib import Path

from evspan.conf.code_version import require_submitted_code
from evspan.conf.private_files import read_private_file, require_private_folder
from evspan.conf.secret_values import RUN_SECRET
from evspan.launch.cli.command import run_command
from evspan.launch.slurm.submitit_adapter import run_submitted
from evspan.launch.slurm.successor import take_task
from evspan.launch.slurm.task_secret import SECRET_FILE, secret_of_attempt

MOST_BYTES = 1 << 10


def run_task(folder: Path) -> None:
    """Unpickles and calls the task of this process.

    Raises:
        ForeignFileError: another user has written the folder, or could have.
        UserError: Python imports other code than was submitted.
    """
    require_submitted_code(os.environ)
    require_private_folder(folder)
    secret = folder / SECRET_FILE
    if secret.exists():
        text = read_private_file(secret, most_bytes=MOST_BYTES).decode("ascii", "replace")
        os.environ[RUN_SECRET] = secret_of_attempt(text, os.environ)
    take_task(folder)
    run_submitted(folder)


if __name__ == "__main__":
    run_command(lambda: run_task(Path(sys.argv[1])))
