"""Plans runs before they are submitted: their folders, overrides and configs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evspan.conf.compose import compose, override_key, replace_override
from evspan.conf.errors import ConfigError, is_user_error, one_line
from evspan.conf.hydra_adapter import Expansion
from evspan.conf.schema.cluster import ClusterConfig
from evspan.conf.schema.training import TrainConfig
from evspan.launch.local.run import check_training
from evspan.launch.sweep.registry import SWEEP
from evspan.pipeline.history import read


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be started.

    overrides: what distinguishes the run, for people: in a sweep only the keys with several values.
    """

    folder: Path
    overrides: list[str]
    config: TrainConfig

    def is_done(self) -> bool:
        """Whether the history in the run's folder ends with `done`."""
        events = read(self.folder)
        return bool(events) and bool(events[-1]["event"] == "done")


@dataclass(frozen=True)
class SweepPlan:
    """The runs of a sweep.

    folder: of the sweep. cluster: where all runs are started.
    refused: folder -> message, of runs whose overrides are wrong.
    """

    folder: Path
    cluster: ClusterConfig
    runs: list[PlannedRun]
    refused: dict[Path, str]


def plan_sweep(expansion: Expansion, config_dir: Sequence[str]) -> SweepPlan:
    """Give each combination a folder, and compose its config with that folder as run_dir.

    The folder and the cluster of the sweep are those of the first combination that composes.
    Writes sweep.json.

    Args:
        config_dir: `--config-dir FOLDER`, or nothing.

    Raises:
        ConfigError: no combination composes.
    """
    first = _first_composed(expansion.combinations, config_dir)
    sweep = Path(first.run_dir)
    shown = [_swept(overrides, expansion.swept_keys) for overrides in expansion.combinations]
    folders = [sweep / name for name in assign_folders(sweep, shown)]
    runs = []
    refused = {}
    for overrides, swept, folder in zip(expansion.combinations, shown, folders, strict=True):
        try:
            config = _composed(replace_override(overrides, "run_dir", str(folder)), config_dir)
        except Exception as error:
            if not is_user_error(error):
                raise
            refused[folder] = one_line(error)
        else:
            runs.append(PlannedRun(folder, swept, config))
    _record_errors(sweep, {folder: refused.get(folder) for folder in folders})
    return SweepPlan(sweep, first.cluster, runs, refused)


def check_run(config: TrainConfig) -> None:
    """Check what can be known before a run starts.

    Raises:
        UserError: the dataset or a folder cannot be used, or the ranks do not fill whole nodes.
    """
    check_training(config)
    config.cluster.nodes(config.parallel.ranks)


def assign_folders(sweep: Path, overrides_of_runs: Sequence[Sequence[str]]) -> list[str]:
    """Folder names of the runs: known overrides keep theirs, others get the next number.

    Writes sweep.json, the table of all runs that the sweep ever had.
    """
    table = _read_table(sweep)
    names = {tuple(entry["overrides"]): str(entry["folder"]) for entry in table}
    for overrides in overrides_of_runs:
        if tuple(overrides) not in names:
            names[tuple(overrides)] = str(len(table))
            table.append({"folder": str(len(table)), "overrides": list(overrides), "error": None})
    _write_table(sweep, table)
    return [names[tuple(overrides)] for overrides in overrides_of_runs]


def _first_composed(
    combinations: Sequence[Sequence[str]], config_dir: Sequence[str]
) -> TrainConfig:
    first_error = ""
    for overrides in combinations:
        try:
            return _composed(overrides, config_dir)
        except Exception as error:
            if not is_user_error(error):
                raise
            first_error = first_error or one_line(error)
    raise ConfigError(
        f"none of the {len(combinations)} runs can be composed; the first: {first_error}"
    )


def _composed(overrides: Sequence[str], config_dir: Sequence[str]) -> TrainConfig:
    config = compose(TrainConfig, [*config_dir, *overrides])
    check_run(config)
    return config


def _swept(overrides: Sequence[str], keys: Sequence[str]) -> list[str]:
    return [override for override in overrides if override_key(override) in keys]


# -- sweep.json ----------------------------------------------------------------------------------
def _read_table(sweep: Path) -> list[dict[str, Any]]:
    try:
        runs: list[dict[str, Any]] = json.loads((sweep / SWEEP).read_text())["runs"]
    except FileNotFoundError:
        return []
    return runs


def _write_table(sweep: Path, table: list[dict[str, Any]]) -> None:
    sweep.mkdir(parents=True, exist_ok=True)
    (sweep / SWEEP).write_text(json.dumps({"runs": table}, indent=1) + "\n")


def _record_errors(sweep: Path, errors: Mapping[Path, str | None]) -> None:
    table = _read_table(sweep)
    for entry in table:
        folder = sweep / entry["folder"]
        if folder in errors:
            entry["error"] = errors[folder]
    _write_table(sweep, table)
