"""SLURM's commands as shell scripts: jobs are numbered, and wait in the queue for ever."""

import os
from pathlib import Path

SCRIPTS = {
    "sbatch": 'sleep 0.2; echo x >> "$0.jobs"; echo "Submitted batch job $(wc -l < "$0.jobs")"',
    "squeue": 'number=0; for job in $(cat "${0%squeue}sbatch.jobs" 2>/dev/null); do\n'
    'number=$((number + 1)); echo "$number|PENDING|(Priority)|"; '
    'for index in 0 1; do echo "${number}_$index|PENDING|(Priority)|"; done; done',
    "srun": "exit 1",
    "scancel": "exit 1",
    "scontrol": "exit 1",
}


class SlurmShim:
    """The scripts in a folder. path: of the environment, with them first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for name, text in SCRIPTS.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        self.path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])

    def jobs(self) -> int:
        """Number of jobs that were submitted."""
        log = self.folder / "sbatch.jobs"
        return len(log.read_text().splitlines()) if log.exists() else 0
