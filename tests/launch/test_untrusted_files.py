"""Files that SLURM tasks leave for each other: nothing is run that another user could have written."""

import errno
import os
import pickle
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
from evspan.conf.errors import BoxesError, RecordingError, UserError
from evspan.conf.private_files import ForeignFileError, make_private_folder, require_private_folder
from evspan.conf.secret_values import RUN_SECRET
from evspan.data_prep.shards.atomic import NoSpaceError
from evspan.data_prep.shards.format import RecordingEntry
from evspan.data_prep.workers import Outcome
from evspan.launch.slurm import submitted_task
from evspan.launch.slurm.outcome_files import (
    TaskError,
    finished_jobs,
    outcome_file,
    read_outcome,
    write_outcome,
)
from evspan.launch.slurm.task_secret import SECRET_FILE, create_secret, secret_of_attempt

ROOT = Path(__file__).parents[2]


class Job(NamedTuple):
    """A stand-in for a PrepJob; its outcome's file does not contain it."""

    key: str = "train/a"


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def folder(tmp_path):
    make_private_folder(tmp_path / "outcomes")
    return tmp_path / "outcomes"


@pytest.fixture
def as_another_user(monkeypatch):
    """The process has another user's id than the owner of its files."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4321)


def entry() -> RecordingEntry:
    numbers = {name: 7 for name, kind in RecordingEntry.__annotations__.items() if kind is int}
    texts = {
        name: "é\ud800" for name, kind in RecordingEntry.__annotations__.items() if kind is str
    }
    return RecordingEntry(**numbers, **texts, boxes_per_class={"car": 3})


def test_an_entry_arrives_as_it_was(folder):
    write_outcome(folder, 3, Outcome(Job(), value=entry()))
    assert finished_jobs(folder) == {3}
    assert asdict(read_outcome(folder, 3, Job()).get()) == asdict(entry())
    assert stat.S_IMODE(outcome_file(folder, 3).stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["3.json"]


@pytest.mark.parametrize(
    "error",
    [
        RecordingError("a.raw: bad"),
        BoxesError("é\ud800"),
        NoSpaceError("full"),
        OSError(errno.ESTALE, "Stale file handle", "/data/a.raw"),
        PermissionError(errno.EACCES, "Permission denied", "/data/a.raw"),
    ],
)
def test_an_error_arrives_with_its_class_and_message(folder, error):
    write_outcome(folder, 1, Outcome(Job(), error=error))
    read = read_outcome(folder, 1, Job()).error
    assert type(read) is type(error)
    assert str(read) == str(error)


def test_an_error_of_the_code_arrives_with_its_traceback(folder):
    try:
        {}["missing"]
    except KeyError as error:
        write_outcome(folder, 1, Outcome(Job(), error=error))
    read = read_outcome(folder, 1, Job()).error
    assert isinstance(read, TaskError)
    assert "KeyError: 'missing'" in str(read)
    assert "test_untrusted_files.py" in str(read)


def test_a_malicious_pickle_is_not_run(folder, tmp_path):
    outcome_file(folder, 0).write_bytes(pickle.dumps(Malicious(tmp_path / "canary")))
    with pytest.raises(RecordingError, match="is damaged"):
        read_outcome(folder, 0, Job()).get()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "{}",
        '{"entry": 7}',
        '{"entry": {"name": "a"}}',
        '{"error": 7}',
        '{"error": {}}',
        '{"error": {"errno": "x", "message": "", "filename": ""}}',
        '{"error":' + "[" * 9999,
    ],
)
def test_a_damaged_outcome_is_an_error_of_its_recording(folder, text):
    outcome_file(folder, 0).write_text(text)
    with pytest.raises(RecordingError, match=r"0\.json, which a SLURM task wrote, is damaged"):
        read_outcome(folder, 0, Job()).get()


def test_an_error_class_of_elsewhere_is_not_created(folder):
    outcome_file(folder, 0).write_text(
        '{"error": {"classes": ["SystemExit", "os.system", "UserError"], "message": "x"}}'
    )
    assert type(read_outcome(folder, 0, Job()).error) is UserError


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_not_read(folder, mode):
    write_outcome(folder, 0, Outcome(Job(), value=entry()))
    folder.chmod(mode)
    with pytest.raises(ForeignFileError, match=rf"changed by other users \(mode {mode:04o}\)"):
        read_outcome(folder, 0, Job())


def test_a_folder_of_another_user_is_neither_read_nor_taken(folder, as_another_user):
    with pytest.raises(ForeignFileError, match="belongs to the user with id"):
        require_private_folder(folder)
    with pytest.raises(ForeignFileError, match="belongs to the user with id .*own: run_dir=NEW"):
        make_private_folder(folder)


def test_a_folder_of_an_older_version_becomes_private(tmp_path):
    (tmp_path / "old").mkdir(mode=0o755)
    make_private_folder(tmp_path / "old")
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "old")
    with pytest.raises(ForeignFileError, match="no plain folder"):
        make_private_folder(tmp_path / "link")


# -- Submitit's pickles ----------------------------------------------------------------------------
@pytest.fixture
def loaded(monkeypatch):
    """The folders whose pickles were loaded."""
    folders: list[Path] = []
    monkeypatch.setattr(submitted_task, "run_submitted", folders.append)
    return folders


def test_a_task_loads_the_pickle_of_its_own_folder(folder, loaded, monkeypatch):
    monkeypatch.setenv(RUN_SECRET, "of the submitting shell")
    create_secret(folder)
    submitted_task.run_task(folder)
    assert loaded == [folder]
    text = (folder / SECRET_FILE).read_text()
    assert os.environ[RUN_SECRET] == secret_of_attempt(text, os.environ)
    assert len(text) == 64


def test_attempts_and_jobs_have_different_secrets():
    env = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}
    assert secret_of_attempt("a", env) == secret_of_attempt("a", dict(env))
    secrets = {secret_of_attempt("a", {**env, name: "3"}) for name in env}
    assert len(secrets | {secret_of_attempt("a", env), secret_of_attempt("b", env)}) == 5


def test_a_task_loads_nothing_that_others_could_have_written(folder, loaded):
    folder.chmod(0o775)
    with pytest.raises(ForeignFileError):
        submitted_task.run_task(folder)
    assert not loaded


def test_the_refusal_is_one_line(folder):
    folder.chmod(0o777)
    process = subprocess.run(
        [sys.executable, "-m", "evspan.launch.slurm.submitted_task", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
