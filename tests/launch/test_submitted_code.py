"""The copy of the package that jobs import, and what `status` says when the checkout changes."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from evspan.conf import code_version
from evspan.conf.code_version import package_files, require_submitted_code, running_code
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.private_files import ForeignFileError
from evspan.conf.schema.cluster import ClusterConfig, CodeSource, Container
from evspan.launch.cli.status import parse_options as status_options
from evspan.launch.cli.status import status
from evspan.launch.slurm import code_archive
from evspan.launch.slurm.code_archive import plan_code
from evspan.launch.slurm.job_python import JobPython, job_python
from evspan.pipeline.history import append

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of the checkout's package, whose files a test may change. Commands archive it."""
    folder = tmp_path / "checkout"
    for name, path in package_files(ROOT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / name)
    monkeypatch.setattr(code_archive, "package_root", lambda: folder)
    code_archive._snapshot.cache_clear()
    yield folder
    code_archive._snapshot.cache_clear()


def run(
    python: JobPython, program: str, env: Mapping[str, str] = {}
) -> subprocess.CompletedProcess:
    """Runs a program as a batch script of the job does."""
    text = "\n".join(["set -eu", *python.setup, f"{python.command} -c {program!r}"])
    environment = {**os.environ, **env}
    return subprocess.run(
        ["bash", "-s"], input=text, text=True, env=environment, capture_output=True, timeout=120
    )


WHERE = "import evspan.launch, evspan.conf.compose as c; print(evspan.launch.__file__, c.__file__)"


@pytest.mark.slow
def test_a_job_imports_the_copy_instead_of_any_installation(checkout, tmp_path):
    """Also before an editable installation, and a namespace package that is earlier on the path."""
    (checkout / "launch" / "local" / "new.py").write_text("VALUE = 5\n")  # not committed
    (checkout / "launch" / ".hidden.py").write_text("")
    (checkout / "launch" / "results.bin").write_bytes(bytes(100))
    code = plan_code(ClusterConfig(), tmp_path / "run")
    assert code is not None
    assert not code.folder.exists(), "a plan writes nothing"
    code.write()
    (checkout / "launch" / "__init__.py").write_text("raise RuntimeError('the checkout')\n")
    earlier = tmp_path / "earlier" / "evspan"
    (earlier / "launch").mkdir(parents=True)
    (earlier / "launch" / "__init__.py").write_text("raise RuntimeError('another one')\n")
    program = f"import evspan.launch.local.new as n; print(n.VALUE); {WHERE}"
    python = job_python(ClusterConfig(), code)
    # A site's module may put its own path first.
    late = JobPython(python.command, [], [*python.setup, 'PYTHONPATH="$EARLIER:$PYTHONPATH"'])
    for job in (python, late):
        done = run(job, program, {"EARLIER": str(earlier.parent), "PYTHONPATH": str(ROOT.parent)})
        assert done.returncode == 0, done.stderr
        value, launch, compose = done.stdout.split()
        assert value == "5"
        assert launch == f"{code.folder}/evspan/launch/__init__.py"
        assert compose == f"{code.folder}/evspan/conf/compose.py"
    manifest = json.loads((code.folder / "code.json").read_text())
    assert manifest["digest"] == code.folder.name
    assert manifest["source"] == str(checkout)
    assert set(manifest["files"]) == set(package_files(ROOT)) | {"launch/local/new.py"}
    written = {str(p.relative_to(code.folder)) for p in code.folder.rglob("*") if p.is_file()}
    added = {"code.json", "evspan/__init__.py"}
    own = {name for name in written if "__pycache__" not in name}
    assert own == added | {f"evspan/{name}" for name in manifest["files"]}
    modes = {p.stat().st_mode & 0o222 for p in code.folder.rglob("*.py")}
    assert modes == {0}


def test_the_copy_is_written_once_and_again_where_it_is_damaged(checkout, tmp_path):
    code = plan_code(ClusterConfig(), tmp_path)
    code.write()
    file = code.folder / "evspan" / "launch" / "__init__.py"
    before = file.stat()
    code.write()
    assert file.stat().st_ino == before.st_ino
    file.chmod(0o644)
    file.write_text("raise\n")
    code.write()
    assert file.read_bytes() == (checkout / "launch" / "__init__.py").read_bytes()
    assert [path.name for path in code.folder.parent.iterdir()] == [code.folder.name]
    code_archive._snapshot.cache_clear()
    (checkout / "launch" / "__init__.py").write_text("VALUE = 1\n")
    assert plan_code(ClusterConfig(), tmp_path).folder != code.folder


def test_a_copy_that_others_could_write_ends_the_job(checkout, tmp_path):
    code = plan_code(ClusterConfig(), tmp_path)
    code.write()
    lines = [*code.setup_lines(), "echo started $EVSPAN_CODE"]

    def outcome() -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-s"], input="\n".join(lines), text=True, capture_output=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    assert outcome() == (0, f"started {code.folder}\n")
    code.folder.chmod(0o775)
    assert outcome()[0] == 2
    with pytest.raises(ForeignFileError, match="can be changed by other users"):
        code.write()
    code.folder.chmod(0o700)
    assert outcome()[0] == 0
    code.folder.rename(tmp_path / "elsewhere")
    assert outcome()[0] == 2
    code.folder.symlink_to(tmp_path / "elsewhere")
    number, text = outcome()
    assert number == 2
    assert text.splitlines()[-1].startswith(f"evspan: {code.folder} is missing, or others can")


def test_nobody_else_can_write_into_a_copy_whatever_the_umask(checkout, tmp_path):
    """numba unpickles the indices of its cache, and Python writes compiled modules beside ours."""
    cache = checkout / "launch" / "__pycache__"
    cache.mkdir(exist_ok=True)
    index = cache / "main.f-1.py311.nbi"
    index.write_bytes(b"index")
    (checkout / "launch" / "main.py").touch()
    index.chmod(0o664)
    before = os.umask(0o002)
    try:
        code = plan_code(ClusterConfig(), tmp_path)
        code.write()
    finally:
        os.umask(before)
    paths = [code.folder, *code.folder.rglob("*")]
    assert [path for path in paths if path.stat().st_mode & 0o022] == []
    assert (code.folder / "evspan/launch/__pycache__" / index.name).exists()
    packages = {path.parent for path in code.folder.rglob("*.py")}
    assert all((package / "__pycache__").is_dir() for package in packages)


def test_live_code_and_paths_that_cannot_be_imported_from(checkout, tmp_path):
    live = ClusterConfig(code=CodeSource.live)
    assert plan_code(live, tmp_path) is None
    assert "EVSPAN_CODE" not in "".join(job_python(live, None).setup)
    with pytest.raises(ConfigError, match="contains ':'"):
        plan_code(ClusterConfig(), tmp_path / "a:b")


def test_more_than_code_is_refused(checkout, tmp_path, monkeypatch):
    data = checkout / "pipeline" / "shards"
    data.mkdir()
    (data / "large.yaml").write_bytes(bytes(65 << 20))
    with pytest.raises(
        UserError, match=r"pipeline/shards is one of its folders.*cluster.code=live"
    ):
        plan_code(ClusterConfig(), tmp_path)
    (data / "large.yaml").unlink()
    monkeypatch.setattr(code_version, "MOST_FILES", 100)
    with pytest.raises(UserError, match="more than 100 files"):
        plan_code(ClusterConfig(), tmp_path)


def test_a_process_of_a_job_refuses_other_code(tmp_path):
    require_submitted_code({})
    require_submitted_code({"EVSPAN_CODE": str(ROOT)})
    with pytest.raises(UserError, match=f"Python imports evspan from {ROOT}"):
        require_submitted_code({"EVSPAN_CODE": str(tmp_path)})


def test_a_container_imports_the_copy_too(checkout, tmp_path, monkeypatch):
    """The image's own PYTHONPATH stays behind it. A program stands for apptainer."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apptainer").write_text(
        "#!/bin/bash\n"
        'printf "%s\\n" "$@" > "$0.args"\n'
        'while [[ $1 != image.sif ]]; do shift; done; shift\nPYTHONPATH=/image exec "$@"\n'
    )
    (programs / "apptainer").chmod(0o755)
    cluster = ClusterConfig(container=Container.apptainer, image="image.sif", python=sys.executable)
    folder = tmp_path / "a 'run'"
    code = plan_code(cluster, folder)
    code.write()
    python = job_python(cluster, code, [str(folder / "data")])
    program = f"import os; {WHERE}; print(os.environ[`PYTHONPATH`])".replace("`", '"')
    done = run(python, program, {"PATH": f"{programs}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    where, path = done.stdout.splitlines()
    assert where.count(f"{code.folder}/evspan/") == 2
    assert path == f"{code.folder}:/image"
    assert str(code.folder) in (programs / "apptainer.args").read_text().splitlines()
    pyxis = ClusterConfig(container=Container.pyxis, image="image.sqsh")
    code = plan_code(pyxis, tmp_path / "run")
    assert f"{code.folder}:{code.folder}" in " ".join(job_python(pyxis, code).srun_args)


@pytest.mark.parametrize(
    ("image", "is_file", "expected"),
    [
        ("evspan.sqsh", False, "{cwd}/evspan.sqsh"),
        ("images/evspan.squashfs", False, "{cwd}/images/evspan.squashfs"),
        ("/shared/evspan.sqsh", False, "/shared/evspan.sqsh"),
        ("evspan", True, "{cwd}/evspan"),
        ("nvcr.io#nvidia/pytorch:25.01-py3", False, "nvcr.io#nvidia/pytorch:25.01-py3"),
        ("ubuntu", False, "ubuntu"),
    ],
)
def test_pyxis_reads_an_image_file_instead_of_importing_its_name(
    tmp_path, monkeypatch, image, is_file, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ubuntu").mkdir()  # a folder is no image
    if is_file:
        (tmp_path / image).touch()
    cluster = ClusterConfig(container=Container.pyxis, image=image)
    srun_args = job_python(cluster, None).srun_args
    assert f"--container-image={expected.format(cwd=tmp_path)}" in srun_args


@pytest.mark.parametrize(
    ("container", "name", "character"),
    [
        (Container.apptainer, "a,b", ","),
        (Container.apptainer, "12:30", ":"),
        (Container.pyxis, "a,b", ","),
        (Container.pyxis, "12:30", ":"),
        (Container.pyxis, "two words", " "),
    ],
)
def test_a_path_that_a_container_cannot_mount_is_refused(
    tmp_path, monkeypatch, container, name, character
):
    cluster = ClusterConfig(container=container, image="image.sif")
    folder = tmp_path / name
    folder.mkdir()
    message = re.escape(f"{container.value} cannot mount {folder}, which contains {character!r}")
    with pytest.raises(ConfigError, match=message):
        job_python(cluster, None, [str(folder)])
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=message):
        job_python(cluster, None)


def test_mounts_of_the_cluster_keep_their_colon_and_apptainer_its_spaces(tmp_path):
    mounts = ["/data:/inside"]
    cluster = ClusterConfig(container=Container.apptainer, image="image.sif", mounts=mounts)
    command = job_python(cluster, None, [str(tmp_path / "two words")]).command
    assert "--bind /data:/inside" in command
    assert f"--bind '{tmp_path / 'two words'}'" in command
    pyxis = ClusterConfig(container=Container.pyxis, image="image.sqsh", mounts=mounts)
    assert any(word.endswith(",/data:/inside") for word in job_python(pyxis, None).srun_args)


@pytest.mark.slow
def test_functions_that_numba_has_compiled_are_not_compiled_again(checkout, tmp_path):
    (checkout / "data_prep" / "added.py").write_text(
        "from numba import njit\n\n\n@njit(cache=True)\ndef double(x):\n    return 2 * x\n"
    )
    program = (
        "from evspan.data_prep.added import double; print(double(4)); "
        "print(sum(double.stats.cache_hits.values()), double._cache._impl.locator._cache_path)"
    )
    package = tmp_path / "path" / "evspan"
    package.parent.mkdir()
    package.symlink_to(checkout)
    (checkout / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", program]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert first.stdout.split()[:2] == ["8", "0"], first.stderr
    code = plan_code(ClusterConfig(), tmp_path)
    code.write()
    python = job_python(ClusterConfig(), code)
    done = run(python, program, {"PYTHONPATH": ""})
    assert done.stdout.split() == ["8", "1", f"{code.folder}/evspan/data_prep/__pycache__"]


def test_status_names_the_files_that_have_changed(checkout, tmp_path, capsys, monkeypatch):
    code = plan_code(ClusterConfig(), tmp_path / "sweep")
    code.write()
    for name in ("0", "1", "2"):
        folder = tmp_path / "sweep" / name
        append(folder, "submitted", job="7")
        append(folder, "start", step=0, of=9, attempt=1, job="7")
        record = {"job": "7", "time": 1.0, "code": {"folder": str(code.folder)}}
        (folder / "submitted.json").write_text(json.dumps(record))
    append(tmp_path / "sweep" / "2", "done", step=9)
    # Without SLURM's commands, a run that has not recorded its end counts as running.
    monkeypatch.setenv("PATH", "/nowhere")

    def notes() -> list[str]:
        status(status_options([str(tmp_path / "sweep")]))
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if "has changed" in line]

    assert notes() == []
    (checkout / "launch" / "demo.py").unlink()
    (checkout / "launch" / "new.py").touch()
    (checkout / "conf" / "train.yaml").write_text("seed: 5\n")
    (line,) = notes()
    assert f"{checkout} has changed since 2 runs (0, 1) started from it: " in line
    assert "conf/train.yaml, launch/demo.py, launch/new.py; they go on with" in line
    status(status_options([str(tmp_path / "sweep"), "--json"]))
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [len(row["code_changed"]) for row in rows] == [3, 3, 0]
    # What is damaged, or no longer there, is no reason to fail.
    (code.folder / "code.json").chmod(0o644)
    (code.folder / "code.json").write_text("{")
    assert notes() == []


def test_a_start_records_the_code(tmp_path):
    from evspan.pipeline.history import read, record_start

    record_start(tmp_path, 0, 9)
    (event,) = read(tmp_path)
    assert event["digest"] == running_code().digest
    assert len(event["digest"]) == 16
    assert event["commit"] == code_version.code_commit()
