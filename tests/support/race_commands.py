"""Races of evspan commands: each in a process of its own, all started at the same moment.

    python tests/support/race_commands.py < RACES > RESULTS

RACES is JSON: a list of races, each a list of argument lists. RESULTS likewise: [exit code, output]
of each command. The commands are forks of a process that has imported them: they reach their locks
within milliseconds of each other.
"""

import json
import os
import sys
import tempfile
from typing import NoReturn


def main() -> None:
    """Runs the races, one after the other."""
    races = json.loads(sys.stdin.read())
    import evspan.launch.local.run
    import evspan.launch.slurm.submit_runs
    import evspan.launch.sweep.submit
    from evspan.conf.compose import compose
    from evspan.conf.schema.training import TrainConfig

    if any(argv[0] == "train" for commands in races for argv in commands):
        import evspan.pipeline.engine.trainer  # noqa: F401

    compose(TrainConfig, ["cluster=slurm"])  # imports Hydra's plugins
    print(json.dumps([race(commands) for commands in races]))


def race(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Runs the commands at the same moment. Returns the exit code and the output of each."""
    start, starter = os.pipe()
    outputs = [tempfile.TemporaryFile("w+") for _ in commands]  # noqa: SIM115  closed below
    children = []
    for argv, output in zip(commands, outputs, strict=True):
        pid = os.fork()
        if pid == 0:
            os.close(starter)
            run(argv, output.fileno(), start)
        children.append(pid)
    os.close(start)
    os.close(starter)  # all read the end of the pipe
    results = []
    for pid, output in zip(children, outputs, strict=True):
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        results.append((code, f"process {pid}\n{output.read()}"))
        output.close()
    return results


def run(argv: list[str], output: int, start: int) -> NoReturn:
    """Waits for the start, runs the command and ends the process."""
    from importlib import import_module

    os.dup2(output, 1)
    os.dup2(output, 2)
    command = import_module(f"evspan.launch.cli.{argv[0]}")
    code = 1
    try:
        os.read(start, 1)
        command.main(argv[1:])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
