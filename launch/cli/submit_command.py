"""`evspan submit prep|evaluate|report ...`: one of these commands as a SLURM job."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import ConfigError, UserError
from evspan.conf.schema.cluster import ClusterConfig, Scheduler
from evspan.conf.schema.prep import PrepConfig
from evspan.conf.schema.training import EvaluateConfig, TrainConfig
from evspan.launch.cli.grammar import evaluate_overrides, is_submission
from evspan.launch.slurm.command_job import CommandJob, evaluation_mounts, submit_command_job
from evspan.launch.sweep.registry import COMMANDS

logger = logging.getLogger(__name__)
AFTER = "after="
HELP = """evspan submit prep|evaluate|report ...: the command as a SLURM job

  evspan submit prep source=RAW output=SHARDS [key=value ...] [cluster.KEY=VALUE ...]
  evspan submit evaluate RUN [key=value ...] [after=RUN] [cluster.KEY=VALUE ...]
  evspan submit report SWEEP [options] [after=SWEEP] [cluster.KEY=VALUE ...]
      The words of the command, and those of the job: cluster=NAME, cluster.KEY=VALUE, and
      after=FOLDER, which may be repeated. It returns when SLURM has accepted the job.

  after=FOLDER waits for all that was submitted for a run, a sweep or a folder of shards. What
  counts is that it is done, also by a job that was requeued or by a successor. If it fails or is
  cancelled, the job ends without starting, and evspan status shows why; a report is made in any
  case.

  prep      the job waits for the job array of evspan prep cluster=slurm
  evaluate  on one node; parallel.ranks=N there, one per GPU
  report    the whole of evspan report

  afterwards
      evspan status FOLDER | evspan cancel FOLDER; the output: FOLDER/.jobs/NAME/logs/rank-00.log"""


@dataclass(frozen=True)
class _Words:
    """The words of `evspan submit COMMAND ...`.

    argv: the command and its own arguments. cluster: overrides. after: folders.
    """

    argv: list[str]
    cluster: list[str]
    after: list[str]


def submit_command(argv: Sequence[str]) -> None:
    """Submits a command, or prints the help.

    Raises:
        ConfigError: an argument is wrong, or SLURM refuses the job.
        UserError: the command waits or runs already, or what it waits for has failed.
    """
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return
    words = _separated(argv)
    job = {"prep": _prep, "evaluate": _evaluate, "report": _report}[argv[0]](words)
    if job.cluster.scheduler is Scheduler.local:
        raise UserError(
            f"cluster=local starts no job; run evspan {argv[0]} itself, or choose cluster=slurm"
        )
    result = submit_command_job(job)
    if job.cluster.dry_run:
        print(result)
        return
    target = job.folder.parents[1]
    logger.info("SLURM job %s: evspan %s; watch: evspan status %s", result, argv[0], target)


def _separated(argv: Sequence[str]) -> _Words:
    own = [word for word in argv if not is_submission(word)]
    cluster = [word for word in argv if word.startswith("cluster")]
    after = [word.removeprefix(AFTER) for word in argv if word.startswith(AFTER)]
    return _Words(own, cluster, [str(Path(folder).absolute()) for folder in after])


def _prep(words: _Words) -> CommandJob:
    from evspan.conf.compose import compose

    cluster = words.cluster
    if not any(word.startswith("cluster=") for word in cluster):
        cluster = ["cluster=slurm", *cluster]
    config = compose(PrepConfig, [*words.argv[1:], *cluster])
    if not config.source or not config.output:
        raise ConfigError("prep needs source=RECORDINGS and output=SHARDS")
    inner = [word for word in cluster if not word.startswith("cluster.dry_run=")]
    return CommandJob(
        _folder(Path(config.output), "prep"),
        [*words.argv, *inner],
        config.cluster,
        after=words.after,
    )


def _evaluate(words: _Words) -> CommandJob:
    from evspan.conf.compose import compose
    from evspan.launch.cli.run_defaults import run_config, with_run_config

    overrides = evaluate_overrides(words.argv[1:])
    config = compose(EvaluateConfig, overrides)
    if not config.checkpoint:
        raise ConfigError("name the run to evaluate: evspan submit evaluate RUN")
    checkpoint = Path(config.checkpoint)
    path = run_config(checkpoint)
    if path is None and not checkpoint.exists():
        raise ConfigError(f"{checkpoint} does not exist; name a run or a checkpoint of one")
    target = path.parent if path is not None else checkpoint.absolute().parent
    cluster = _cluster(words)
    ranks = config.parallel.ranks
    if cluster.nodes(ranks)[0] > 1:
        raise ConfigError(
            f"parallel.ranks={ranks} needs several nodes, and evspan submit evaluate has one; set "
            f"parallel.ranks={cluster.most_ranks_per_node()} or less, or cluster.ranks_per_node"
        )
    return CommandJob(
        _folder(target, f"evaluate-{config.evaluation.split}"),
        words.argv,
        cluster,
        cpus=ranks * cluster.cpus_per_task,
        gpus=min(ranks, cluster.gpus_per_node),
        after=words.after,
        mounts=evaluation_mounts(with_run_config(config, overrides)),
    )


def _report(words: _Words) -> CommandJob:
    from evspan.launch.cli.report import parse_options

    path = parse_options(words.argv[1:]).path
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; name the folder of a run or of a sweep")
    return CommandJob(
        _folder(path, "report"), words.argv, _cluster(words), after=words.after, any_end=True
    )


def _cluster(words: _Words) -> ClusterConfig:
    """The cluster of a command whose own config has none."""
    from evspan.conf.compose import compose, config_dir_options

    return compose(TrainConfig, [*config_dir_options(words.argv), *words.cluster]).cluster


def _folder(target: Path, name: str) -> Path:
    return target.absolute() / COMMANDS / name
