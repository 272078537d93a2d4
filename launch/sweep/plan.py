"""Plans runs before they are submitted: their folders, overrides and configs."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evspan.conf.compose import compose, override_key, replace_override
from evspan.conf.errors import ConfigError, UserError, is_user_error, one_line, require
from evspan.conf.hydra_adapter import Expansion
from evspan.conf.json_files import JsonFileError, read_json_object
from evspan.conf.schema.cluster import ClusterConfig
from evspan.conf.schema.search import SearchMethod
from evspan.conf.schema.training import TrainConfig
from evspan.conf.secret_values import hidden_overrides, hide_values
from evspan.data_prep.shards.atomic import atomic_write
from evspan.launch.local.run import check_sweep_folder, check_training
from evspan.launch.local.run_folder import SWEEPS, numbered_folder
from evspan.launch.search.files import SEARCH
from evspan.launch.sweep.registry import SWEEP, is_folder_name
from evspan.pipeline.history import read

logger = logging.getLogger(__name__)
_DAMAGED = "Restore it, or start the sweep in another folder: run_dir=sweeps/NAME"


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be started.

    overrides: what distinguishes the run, for people: in a sweep only the keys with several values.
        Values that may be secrets are hidden.
    """

    folder: Path
    overrides: list[str]
    config: TrainConfig

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", hidden_overrides(self.overrides))

    def is_done(self) -> bool:
        """Whether the history in the run's folder ends with `done`."""
        events = read(self.folder)
        return bool(events) and bool(events[-1]["event"] == "done")


@dataclass(frozen=True)
class SweepSettings:
    """folder: of the sweep. cluster: where all its runs are started."""

    folder: Path
    cluster: ClusterConfig


@dataclass(frozen=True)
class SweepPlan:
    """The runs of a sweep.

    refused: folder -> message, of runs whose overrides are wrong.
    table: the contents of sweep.json, with these runs.
    """

    settings: SweepSettings
    runs: list[PlannedRun]
    refused: dict[Path, str]
    table: list[dict[str, Any]]


def sweep_settings(expansion: Expansion, config_dir: Sequence[str]) -> SweepSettings:
    """The folder and the cluster of a sweep: those of the first combination that composes.

    Args:
        config_dir: `--config-dir FOLDER`, or nothing.

    Raises:
        ConfigError: no combination composes, or the folder is that of a run.
    """
    first = _first_composed(expansion.combinations, config_dir)
    require(
        first.search.method is SearchMethod.none,
        f"the config has search.method={first.search.method.name}, and a search is chosen on the "
        "command line: evspan sweep search=optuna ...",
    )
    if first.run_dir:
        folder = Path(first.run_dir)
        check_sweep_folder(folder)
        require(
            not (folder / SEARCH).exists(),
            f"{folder} is the folder of a search; name another one for the grid: "
            "run_dir=sweeps/NAME. A search continues with search=optuna",
        )
    else:
        folder = numbered_folder(SWEEPS, create=not first.cluster.dry_run)
    return SweepSettings(folder, first.cluster)


def plan_sweep(
    expansion: Expansion, config_dir: Sequence[str], settings: SweepSettings
) -> SweepPlan:
    """Give each combination a folder, and compose its config with that folder as run_dir.

    Nothing is written; `write_table` records the plan.

    Args:
        config_dir: `--config-dir FOLDER`, or nothing.

    Raises:
        UserError: sweep.json is damaged.
    """
    sweep = settings.folder
    shown = [_swept(overrides, expansion.swept_keys) for overrides in expansion.combinations]
    table = read_table(sweep)
    folders = [sweep / name for name in assign_folders(table, shown)]
    runs = []
    refused = {}
    for overrides, swept, folder in zip(expansion.combinations, shown, folders, strict=True):
        try:
            config = _composed(replace_override(overrides, "run_dir", str(folder)), config_dir)
        except Exception as error:
            if not is_user_error(error):
                raise
            refused[folder] = hide_values(one_line(error), overrides)
        else:
            runs.append(PlannedRun(folder, swept, config))
    for entry in table:
        folder = sweep / entry["folder"]
        if folder in folders:
            entry["error"] = None if was_started(folder) else refused.get(folder)
    return SweepPlan(settings, runs, refused, table)


def was_started(folder: Path) -> bool:
    """Whether a run was submitted or trained before: its state is that of its own history."""
    return any(event["event"] in ("submitted", "start") for event in read(folder))


def check_run(config: TrainConfig) -> None:
    """Check what can be known before a run starts.

    Raises:
        UserError: the dataset or a folder cannot be used, or the ranks do not fill whole nodes.
    """
    config.cluster.nodes(config.parallel.ranks)
    if not config.cluster.after:
        check_training(config)
        return
    try:
        check_training(config)
    except UserError as error:  # the dataset or the weights may be what the run waits for
        logger.info("%s: checked when the job starts: %s", config.run_dir, one_line(error))


def assign_folders(
    table: list[dict[str, Any]], overrides_of_runs: Sequence[Sequence[str]]
) -> list[str]:
    """Folder names of the runs: known overrides keep theirs, others get the next number.

    Args:
        table: the contents of sweep.json: all runs that the sweep ever had. Gets the new ones.
    """
    names = {tuple(entry["overrides"]): str(entry["folder"]) for entry in table}
    for overrides in overrides_of_runs:
        if tuple(overrides) not in names:
            names[tuple(overrides)] = str(len(table))
            table.append({"folder": str(len(table)), "overrides": list(overrides), "error": None})
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
    """The overrides of swept keys, for sweep.json: different values stay different."""
    swept = [override for override in overrides if override_key(override) in keys]
    return hidden_overrides(swept, distinct=True)


# -- sweep.json ----------------------------------------------------------------------------------
def read_table(sweep: Path) -> list[dict[str, Any]]:
    """The rows of sweep.json: folder, overrides and error of each run; empty without the file.

    Raises:
        UserError: the file is damaged. Runs would get the folders of others.
    """
    path = sweep / SWEEP
    try:
        runs = read_json_object(path).get("runs")
    except FileNotFoundError:
        return []
    except JsonFileError as error:
        raise UserError(f"{error}. {_DAMAGED}") from error
    if not isinstance(runs, list) or not all(_is_row(row) for row in runs):
        raise UserError(f"{path} does not list runs with their folders and overrides. {_DAMAGED}")
    return runs


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not is_folder_name(row.get("folder")):
        return False
    overrides = row.get("overrides")
    return isinstance(overrides, list) and all(isinstance(text, str) for text in overrides)


def write_table(plan: SweepPlan) -> None:
    """Write sweep.json, with the lock on the sweep. The file is replaced as a whole."""
    write_rows(plan.settings.folder, plan.table)


def write_rows(sweep: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of sweep.json, as `write_table` does."""
    with atomic_write(sweep / SWEEP) as temporary:
        temporary.write_text(json.dumps({"runs": list(rows)}, indent=1) + "\n")
