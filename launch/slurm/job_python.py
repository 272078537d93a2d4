"""How a SLURM job starts Python, and whose code it imports: on the node, or inside a container.

Every batch script of the project gets its Python from `job_python`: runs and their requeue command,
prep arrays, and jobs that follow a run. So all of them import the same code.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import ConfigError
from evspan.conf.schema.cluster import ClusterConfig, Container, SlurmConfig
from evspan.launch.slurm.code_archive import CodeArchive

IMAGE_SUFFIXES = (".sqsh", ".squashfs")
SEPARATORS = ",:"  # in a list of mounts; neither apptainer nor pyxis can quote them


@dataclass(frozen=True)
class JobPython:
    """Python as a batch script starts it.

    command: shell words; `COMMAND -m MODULE` runs a module of the package. srun_args: further
    options of every srun, which bring its tasks into the container. setup: shell lines that COMMAND
    needs, after those of cluster.setup and cluster.environment.
    """

    command: str
    srun_args: list[str]
    setup: list[str]

    def on_first_node(self, module: str, *arguments: str) -> str:
        """A shell command that runs a module once, from the batch script; also next to the ranks.

        Args:
            arguments: are quoted. More may be appended to the command.
        """
        words = f"{self.command} -m {shlex.join([module, *arguments])}"
        if not self.srun_args:
            return words
        # Before the time limit, the ranks still have all of the job's cores.
        srun = ["srun", "--overlap", "--ntasks=1", "--nodes=1", *self.srun_args]
        return f"{shlex.join(srun)} {words}"


def job_python(
    cluster: SlurmConfig, code: CodeArchive | None, folders: Sequence[str] = ()
) -> JobPython:
    """Python for a job of this cluster.

    Args:
        code: is imported instead of the package that Python has installed.
        folders: that a container mounts besides the working folder and `cluster.mounts`.

    Raises:
        ConfigError: a container cannot mount one of the folders.
    """
    setup = ["export PYTHONSAFEPATH=1"]  # no modules of the working folder that have the same name
    if code is not None:
        setup += code.setup_lines()
    if isinstance(cluster, ClusterConfig) and cluster.container is not Container.none:
        mounts = folders if code is None else [*folders, str(code.folder)]
        command, srun_args = _in_container(cluster, mounts)
        python = shlex.quote(cluster.python or "python")
        if code is not None:
            python = _with_path(python, code.folder)
        return JobPython(f"{command}{python}", srun_args, setup)
    python = shlex.quote(cluster.python or sys.executable)
    return JobPython(python, [], [*setup, *_path_lines(code)])


def _path_lines(code: CodeArchive | None) -> list[str]:
    """Shell lines that prepend `code` and this process's PYTHONPATH to the PYTHONPATH of a node."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [os.path.abspath(path) for path in paths if path]
    if code is not None:
        folders.insert(0, str(code.folder))
    if not folders:
        return []
    joined = shlex.quote(os.pathsep.join(dict.fromkeys(folders)))
    return [f'export PYTHONPATH={joined}"${{PYTHONPATH:+:$PYTHONPATH}}"']


def _with_path(python: str, code: Path) -> str:
    """A command that prepends `code` to the PYTHONPATH that the container has, and starts Python.

    An image may set a PYTHONPATH of its own, which would replace that of the batch script.
    """
    path = f'PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    return shlex.join(["sh", "-c", f'{path} exec {python} "$@"', "sh"])


def _in_container(cluster: ClusterConfig, folders: Sequence[str]) -> tuple[str, list[str]]:
    """Shell words before Python, and options of srun."""
    working_folder = os.getcwd()
    _require_mountable(cluster.container, [working_folder, *folders])
    mounts = list(dict.fromkeys([working_folder, *folders, *cluster.mounts]))
    if cluster.container is Container.pyxis:
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        srun_args = [
            f"--container-image={_pyxis_image(cluster.image)}",
            f"--container-mounts={pairs}",
            f"--container-workdir={working_folder}",
        ]
        return "", srun_args
    command = ["apptainer", "exec"]
    if cluster.gpus_per_node:
        command.append("--nv")
    for mount in mounts:
        command += ["--bind", mount]
    command += ["--pwd", working_folder, cluster.image]
    return f"{shlex.join(command)} ", []


def _pyxis_image(image: str) -> str:
    """The image for pyxis, which imports a name that begins with neither `.` nor `/`."""
    if image.endswith(IMAGE_SUFFIXES) or os.path.isfile(image):
        return os.path.abspath(image)
    return image


def _require_mountable(container: Container, paths: Sequence[str]) -> None:
    """Raises ConfigError for a path that would break a mount when the job starts."""
    for path in paths:
        for character in path:
            # pyxis also writes the path into an fstab line, whose fields end at white space.
            breaks_line = container is Container.pyxis and character.isspace()
            if character in SEPARATORS or breaks_line:
                raise ConfigError(
                    f"{container.value} cannot mount {path}, which contains {character!r}. "
                    "Rename the folder; or submit from another working folder, and give the run "
                    "or the dataset by a symbolic link without that character"
                )
