"""The images: Dockerfile and evspan.def, containers/build, and (soak) an image that is built and used.

The soak needs buildah and a base: the image EVSPAN_CONTAINER_BASE, or one that debootstrap makes (root).
EVSPAN_REQUIRE_CONTAINERS=1 makes skipping a failure.
"""

import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from evspan.launch.cli.main import COMMANDS
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
HERE = ROOT / "containers"
pytestmark = pytest.mark.timeout(240)


class Step(NamedTuple):
    stage: str
    word: str  # FROM, RUN, ...
    rest: str


def dockerfile() -> list[Step]:
    lines = re.sub(r"\\\n\s*", "", (HERE / "Dockerfile").read_text()).splitlines()
    steps, stage = [], ""
    for line in lines:
        if line and not line.startswith("#"):
            word, rest = line.split(" ", 1)
            if word == "FROM":
                stage = rest.partition(" AS ")[2] or "last"
            steps.append(Step(stage, word, rest))
    return steps


def definition() -> dict[str, list[str]]:
    """evspan.def: section -> its lines; the header's lie under ""."""
    sections: dict[str, list[str]] = {"": []}
    for line in (HERE / "evspan.def").read_text().splitlines():
        if line.startswith("%"):
            sections[name := line[1:]] = []
        elif line.strip() and not line.startswith("#"):
            sections[name if len(sections) > 1 else ""].append(line.strip())
    return sections


def copied() -> dict[str, str]:
    """What Dockerfile takes from the checkout into /build -> its path there."""
    found = {}
    for step in dockerfile():
        if step.word == "COPY" and not step.rest.startswith("--from") and step.stage != "wheels":
            *sources, target = step.rest.split()
            found |= {s: f"/build/{Path(s).name if target == './' else target}" for s in sources}
    return found


def installer() -> Any:
    spec = spec_from_file_location("installer", HERE / "install.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_images_are_made_of_the_same_files_which_exist():
    files = dict(line.split() for line in definition()["files"])
    assert files == copied()
    pyproject = (ROOT / "pyproject.toml").read_text()
    packages = set(re.findall(r'^"evspan\.(\w+)" = "\1"$', pyproject, re.MULTILINE))
    assert packages == {"conf", "data_prep", "launch", "pipeline"}
    assert files.keys() == packages | {
        "pyproject.toml",
        "constraints.txt",
        "containers/install.py",
        "LICENSE",
    }
    for source in files:
        assert (ROOT / source).exists(), source


def test_builders_see_what_is_copied_and_nothing_else():
    rules = [
        line
        for line in (HERE / "Dockerfile.dockerignore").read_text().splitlines()
        if line and line[0] != "#"
    ]

    def seen(path: str) -> bool:
        kept = True
        for rule in rules:  # the last one that matches a path, or a folder above it, decides
            pattern = rule.lstrip("!").removeprefix("**/")
            whole = "**/" in rule
            parts = Path(path).parts
            heads = parts if whole else ["/".join(parts[: n + 1]) for n in range(len(parts))]
            if any(fnmatch.fnmatchcase(head, pattern) for head in heads):
                kept = rule.startswith("!")
        return kept

    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    for path in [
        *files.stdout.splitlines(),
        ".git/config",
        "data_prep/__pycache__/x.pyc",
        ".venv/bin/python",
        "runs/a",
    ]:
        expected = (
            any(path == source or path.startswith(f"{source}/") for source in copied())
            and "__pycache__" not in path
        )
        assert seen(path) == expected, path


def test_both_images_are_made_by_the_same_commands():
    ours = [
        re.sub(r"^(--mount=\S+ +)+", "", step.rest) for step in dockerfile() if step.word == "RUN"
    ]
    theirs = [
        line.replace("{{ DEVICE }}", "${DEVICE}").replace("/build/dist/", "/dist/")
        for line in definition()["post"]
    ]
    assert [line for line in ours if not line.startswith("useradd")] == theirs[1:-1]
    assert (theirs[0], theirs[-1]) == ("cd /build", "rm -rf /build")
    arguments = dict(line.split("=", 1) for line in definition()["arguments"])
    asked = [step.rest for step in dockerfile() if step.word == "ARG" and "=" in step.rest]
    assert arguments == dict(line.split("=", 1) for line in asked)
    assert (
        f"export PATH={dict(e.split('=', 1) for e in variables('cpu'))['PATH']}"
        in definition()["environment"]
    )


def variables(stage: str) -> list[str]:
    return [step.rest for step in dockerfile() if step.word == "ENV" and step.stage == stage]


def test_the_base_has_a_python_that_the_project_takes():
    base = next(step.rest for step in dockerfile() if step.rest.startswith("BASE="))
    minor = int(re.fullmatch(r"BASE=python:3\.(\d+)-slim", base)[1])  # type: ignore[index]
    assert minor >= 11  # install.py reads pyproject.toml with tomllib


def test_an_image_does_not_run_as_root():
    final = [step for step in dockerfile() if step.stage in ("cpu", "cuda", "last")]
    after = [step.word for step in final[[step.word for step in final].index("USER") :]]
    assert after == [
        "USER",
        "WORKDIR",
        "CMD",
        "FROM",
        "ENV",
        "ENV",
        "FROM",
    ]  # and nothing that becomes root again
    user = next(step.rest for step in final if step.word == "USER")
    assert re.fullmatch(
        r"[1-9]\d{3,}:[1-9]\d{3,}", user
    )  # by number, so that a cluster can see that it is not root


@pytest.mark.parametrize(
    "name", ["Dockerfile", "evspan.def", "install.py", "build", "Dockerfile.dockerignore"]
)
def test_no_hosts_and_no_secrets(name):
    text = (HERE / name).read_text()
    assert not re.search(r"\w://\w", text)
    assert not re.search(r"(?i)passw|secret|token|credential|api_?key", text)
    assert not re.search(r"(COPY|files).*pip\.conf", text)


def test_every_installation_is_pinned():
    calls = re.findall(r'pip\(\s*"install".*?\)', (HERE / "install.py").read_text(), re.DOTALL)
    assert len(calls) == 3
    assert all("*PINNED" in call for call in calls)
    # All that the images' own command installs is the wheel just built.
    assert [line for line in definition()["post"] if "pip install" in line] == [
        "/opt/evspan/bin/pip install --no-cache-dir --no-deps --no-index /build/dist/evspan-*.whl"
    ]


def test_an_image_can_export_and_search(tmp_path, monkeypatch):
    """And the README collects wheels of the same extras for a machine without a network."""
    install = installer()
    calls = []

    def pip(*args: str) -> str:
        calls.append(args)
        return '{"install": [{"metadata": {}}]}'

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "wrong_build", lambda torch, device: "")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # whose packages it strips
    monkeypatch.chdir(ROOT)
    install.dependencies("cpu")
    names = {Requirement(word).name for word in calls[2] if re.match(r"[a-z]", word)}
    assert {"torch", "hydra-core", "onnx", "onnxruntime", "onnxscript", "optuna"} <= names
    assert "torch '.[export,search]'" in (HERE / "README.md").read_text()


def test_the_build_of_torch_is_read_from_its_metadata():
    wrong = installer().wrong_build
    installed_torch = importlib.metadata.metadata("torch").json
    here, other = ("cpu", "cuda") if torch.version.cuda is None else ("cuda", "cpu")
    assert wrong(installed_torch, here) == ""
    assert f"DEVICE={other} needs a {other.upper()} build" in wrong(installed_torch, other)
    elsewhere = {
        "version": "2.13.0",
        "requires_dist": ['nvidia-cublas==13.1; platform_system == "Nowhere"', "sympy"],
    }
    assert wrong(elsewhere, "cpu") == ""
    with_cuda = {
        "version": "2.13.0",
        "requires_dist": ["sympy", 'cuda-toolkit[cublas]==13.0; platform_system == "Linux"'],
    }
    assert wrong(with_cuda, "cuda") == ""
    assert "torch 2.13.0, where pip looks, is a CUDA build" in wrong(with_cuda, "cpu")
    assert "there are: cpu, cuda" in wrong(with_cuda, "tpu")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"a-1-py3-none-any.whl": ""}, {":env:.no-index": "'1'", ":env:.find-links": "'{}'"}),
        (
            {"a-1-py3-none-any.whl": "", "pip.conf": "[global]\nretries = 9\n"},
            {"global.retries": "'9'"},
        ),
    ],
)
def test_pip_looks_where_the_folder_says(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    env = {
        key: value
        for key, value in installer().environment(tmp_path).items()
        if not key.startswith("PIP_") or str(tmp_path) in value or key == "PIP_NO_INDEX"
    }
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = dict(line.split("=", 1) for line in listing.stdout.splitlines())
    keys = (":env:.no-index", ":env:.find-links", "global.retries")
    assert {k: lines[k] for k in keys if k in lines} == {
        k: v.format(tmp_path) for k, v in expected.items()
    }


@pytest.fixture
def tools(tmp_path) -> Path:
    """A PATH on which nothing can build an image."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "mkdir", "rm", "make", "sed", "expand"):
        (folder / name).symlink_to(shutil.which(name) or pytest.skip(f"needs {name}"))
    return folder


def pretend(tools: Path, name: str, works: bool = True) -> None:
    """A tool that cannot be had in tests: it prints how it is called, an argument a line, or fails."""
    (tools / name).write_text(
        f"#!{tools}/bash\n"
        + (f'printf "%s\\n" {name} "$@"\n' if works else "echo down >&2; exit 1\n")
    )
    (tools / name).chmod(0o755)


def build(
    tools: Path, command: list[str] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command or [str(HERE / "build")],
        env={"PATH": str(tools), **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "docker is not there; podman is not there; buildah is not there. Install one"),
        ({"BUILDER": "podman"}, "works here: podman is not there. Install"),
        ({"DEVICE": "gpu"}, "DEVICE is 'gpu'; there are: cpu, cuda"),
        ({"FORMAT": "tar"}, "FORMAT is 'tar'; there are: image, sif, sqsh"),
        ({"FORMAT": "sif"}, "needs apptainer"),
        ({"FORMAT": "sqsh"}, "needs enroot"),
        ({"WHEELS": "no folder"}, "WHEELS is 'no folder', which is not a folder"),
    ],
)
def test_what_cannot_be_built_ends_in_one_line(tools, variables, message):
    ran = build(tools, **variables)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert message in ran.stderr


def test_make_hands_its_variables_on(tools):
    ran = build(tools, ["make", "container", "DEVICE=a b"])
    assert "error: DEVICE is 'a b'; there are: cpu, cuda" in ran.stderr
    assert "make container" in build(tools, ["make", "help"]).stdout


def test_the_first_builder_that_works_is_taken(tools, tmp_path):
    pretend(tools, "docker", works=False)
    ran = build(tools, BUILDER="docker")
    assert ran.returncode == 2
    assert "docker's daemon does not answer, or it has no buildx" in ran.stderr
    pretend(tools, "podman")
    (tmp_path / "my wheels").mkdir()
    ran = build(tools, WHEELS=str(tmp_path / "my wheels"), BASE="mine:1", DEVICE="cuda")
    assert ran.stdout.splitlines() == [
        "podman",
        "build",
        "--layers",
        "--ignorefile",
        "containers/Dockerfile.dockerignore",
        "--build-arg",
        "DEVICE=cuda",
        "--file",
        "containers/Dockerfile",
        "--tag",
        "evspan:cuda",
        "--build-arg",
        "BASE=mine:1",
        "--build-context",
        f"wheels={tmp_path}/my wheels",
        ".",
        "built evspan:cuda with podman",
    ], ran.stderr
    pretend(tools, "docker")
    ran = build(tools, https_proxy="proxy:1")
    assert ran.stdout.splitlines() == [
        "docker",
        "buildx",
        "build",
        "--load",
        "--build-arg",
        "DEVICE=cpu",
        "--file",
        "containers/Dockerfile",
        "--tag",
        "evspan:cpu",
        "--build-arg",
        "https_proxy",
        ".",
        "built evspan:cpu with docker",
    ], ran.stderr


def test_apptainer_and_enroot_are_called_as_their_manuals_say(tools, tmp_path):
    pretend(tools, "apptainer")
    ran = build(tools, FORMAT="sif", WHEELS=str(tmp_path), OUTPUT=str(tmp_path / "out/e.sif"))
    assert ran.stdout.splitlines() == [
        "apptainer",
        "build",
        "--force",
        "--build-arg",
        "DEVICE=cpu",
        "--bind",
        f"{tmp_path}:/mnt",
        f"{tmp_path}/out/e.sif",
        "containers/evspan.def",
        f"built {tmp_path}/out/e.sif",
    ], ran.stderr
    pretend(tools, "enroot")
    pretend(tools, "buildah")
    ran = build(tools, FORMAT="sqsh", OUTPUT=str(tmp_path / "out/e.sqsh"))
    assert ran.returncode == 2
    assert "enroot takes images from docker and podman, not from buildah" in ran.stderr
    pretend(tools, "docker")
    ran = build(tools, FORMAT="sqsh", OUTPUT=str(tmp_path / "out/e.sqsh"))
    assert ran.stdout.splitlines()[-6:] == [
        "enroot",
        "import",
        "--output",
        f"{tmp_path}/out/e.sqsh",
        "dockerd://evspan:cpu",
        f"built {tmp_path}/out/e.sqsh",
    ]


def output_of(command: list[str], timeout: float = 600, **options: Any) -> str:
    """The output of a command, which must succeed."""
    ran = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        **options,
    )
    assert ran.returncode == 0, f"{command}: exit code {ran.returncode}\n{ran.stdout[-4000:]}"
    return ran.stdout


def absent(reason: str) -> None:
    (pytest.fail if os.environ.get("EVSPAN_REQUIRE_CONTAINERS") else pytest.skip)(reason)


class Started:
    """A container of an image, in which commands run."""

    def __init__(self, image: str) -> None:
        self.name = output_of(["buildah", "from", "--pull-never", image]).strip()

    def run(
        self, *command: str, user: str = "", mounts: tuple[str, ...] = (), timeout: float = 300
    ) -> str:
        options = [
            *(["--user", user] if user else []),
            *(part for mount in mounts for part in ("--volume", mount)),
        ]
        return output_of(["buildah", "run", *options, self.name, "--", *command], timeout)

    def remove(self) -> None:
        output_of(["buildah", "rm", self.name])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[None]:
    """A storage of its own for buildah: no one else's images are touched, nothing is left behind."""
    if not shutil.which("buildah"):
        absent("buildah is not installed (apt-get install buildah)")
    folder, theirs = (
        tmp_path_factory.mktemp("store"),
        output_of(["buildah", "info", "--format", "{{.store.GraphRoot}}"]).strip(),
    )
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "{os.environ.get("STORAGE_DRIVER", "overlay")}"\ngraphroot = "{folder}/graph"\n'
        f'runroot = "{folder}/run"\n[storage.options]\nadditionalimagestores = ["{theirs}"]\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_STORAGE_CONF", str(folder / "storage.conf"))
        patch.setenv(
            "BUILDAH_ISOLATION", os.environ.get("BUILDAH_ISOLATION", "chroot")
        )  # no container runtime need be there
        yield
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for path in [
        path for path in reversed(mounted) if path.startswith(f"{folder}/")
    ]:  # buildah leaves some
        output_of(["umount", path])
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def base(store, tmp_path_factory) -> str:
    if existing := os.environ.get("EVSPAN_CONTAINER_BASE"):
        return existing
    if not shutil.which("debootstrap") or os.geteuid() != 0:
        absent(
            "EVSPAN_CONTAINER_BASE names no base image, and debootstrap or root, to make one, is not there"
        )
    root, image = tmp_path_factory.mktemp("base") / "root", "localhost/evspan-test-base"
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    output_of(
        [
            "debootstrap",
            "--variant=minbase",
            "--include=python3,python3-venv,ca-certificates",
            release["VERSION_CODENAME"],
            str(root),
        ]
    )
    for fetched in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / fetched)
    container = output_of(["buildah", "from", "scratch"]).strip()
    output_of(["buildah", "copy", "--quiet", container, str(root), "/"])
    output_of(["buildah", "commit", "--quiet", "--rm", container, image])
    shutil.rmtree(root)
    return image


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """All that the image needs, from where this machine's pip takes it."""
    folder = tmp_path_factory.mktemp("wheels")
    needs = [
        r
        for r in map(Requirement, importlib.metadata.requires("evspan") or [])
        if not r.marker
        or r.marker.evaluate({"extra": ""})
        or r.marker.evaluate({"extra": "export"})
        or r.marker.evaluate({"extra": "search"})
    ]
    output_of(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "-c",
            str(ROOT / "constraints.txt"),
            "--wheel-dir",
            str(folder),
            "pip",
            "setuptools",
            "torch",
            *(f"{r.name}{r.specifier}" for r in needs),
        ]
    )
    return folder


DEVICE = "cpu" if torch.version.cuda is None else "cuda"  # as this machine's pip takes it


@pytest.fixture(scope="module")
def image(base, wheels) -> str:
    name, begun = f"localhost/evspan-test:{DEVICE}", time.monotonic()
    output_of(
        [
            "make",
            "container",
            "BUILDER=buildah",
            f"BASE={base}",
            f"WHEELS={wheels}",
            f"DEVICE={DEVICE}",
            f"IMAGE={name}",
        ],
        timeout=1800,
        cwd=ROOT,
    )
    print(f"\n{name}: built in {time.monotonic() - begun:.0f} s")
    return name


@pytest.fixture
def container(image) -> Iterator[Started]:
    started = Started(image)
    yield started
    started.remove()


def installed(freeze: str) -> dict[str, str]:
    """Distribution -> version, as constraints.txt writes them; without Evspan and the CUDA libraries, which are not there."""
    lines = (re.split(r"==| @ ", line) for line in freeze.splitlines())
    found = {name.lower().replace("_", "-"): version.split("+")[0] for name, version in lines}
    return {
        n: v for n, v in found.items() if not n.startswith(("evspan", "nvidia-", "cuda-", "triton"))
    }


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_image_holds_what_is_pinned_and_no_more(container):
    minor = container.run("python", "-c", "import sys; print(sys.version_info[1])").strip()
    pinned = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    versions = {
        r.name: str(r.specifier).removeprefix("==")
        for r in pinned
        if not r.marker or r.marker.evaluate({"python_version": f"3.{minor}"})
    }
    found = installed(container.run("pip", "freeze", "--all"))
    assert len(found) > 40 and found.items() <= versions.items(), sorted(
        found.items() - versions.items()
    )
    left = container.run(
        "sh", "-c", "ls -A /build /mnt /dist /root/.cache 2>/dev/null || true", user="0"
    )
    assert not [line for line in left.splitlines() if line and not line.startswith("/")], left
    mb = int(container.run("du", "-smx", "/", user="0").split()[0])
    print(f"\nthe image: {mb} MB, {len(found)} distributions")
    assert mb < (2000 if DEVICE == "cpu" else 7000)


TRY = """
set -e
cd "$(mktemp -d)"
evspan --help
evspan simulate raw --recordings train=2,val=1 --seconds 1 --processes 1
evspan prep source=raw output=shards frames.downsample=4 processes=1
evspan train experiment=demo dataset.root=shards run_dir=run parallel.ranks=2 training.max_steps=1
evspan infer run raw/val/val_000_td.raw --output out
ls out
"""


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "user", ["", "4321:4321"], ids=["its own user", "a user that the image does not have"]
)
def test_everything_runs_in_it_without_root(container, user):
    run = partial(container.run, user=user)
    assert run("id", "-u").strip() == (user.partition(":")[0] or "10001")
    output = run(
        "sh", "-c", "touch /opt/evspan/x 2>/dev/null || echo refused; touch ~/$(id -u) && echo ~"
    )
    assert output.split() == ["refused", "/home/evspan"]
    output = run("bash", "-c", TRY, timeout=900)
    assert "evspan COMMAND" in output
    assert "3 of 3 recordings prepared" in output
    assert "val_000_bbox.npy" in output
    if "doctor" in COMMANDS:
        assert "doctor: 0 failed" in run("evspan", "doctor")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_commands_of_the_definition_make_the_same(base, wheels, container):
    """Its files and %post in the same base, as Apptainer, which is not there, would run them: everything but its own work."""
    theirs = Started(base)
    try:
        for line in definition()["files"]:
            source, target = line.split()
            output_of(["buildah", "copy", "--quiet", theirs.name, str(ROOT / source), target])
        post = "\n".join(definition()["post"]).replace("{{ DEVICE }}", DEVICE)
        theirs.run("/bin/sh", "-ex", "-c", post, mounts=(f"{wheels}:/mnt:ro",), timeout=1800)
        export = next(
            line for line in definition()["environment"] if line.startswith("export PATH=")
        )
        freeze = "pip freeze --all"
        assert installed(theirs.run("sh", "-c", f"{export}; {freeze}")) == installed(
            container.run("sh", "-c", freeze)
        )
        files = "cd /opt/evspan; find . -type f | sort"
        assert theirs.run("sh", "-c", files) == container.run("sh", "-c", files)
        run = [*definition()["runscript"], ""]
        assert "evspan COMMAND" in theirs.run("sh", "-c", "\n".join([export, *run]))
        assert "evspan 0" in theirs.run(
            "sh", "-c", "\n".join([export, *run]), "x", "evspan", "--version"
        )
        assert theirs.run("sh", "-c", "ls -d /build 2>/dev/null || echo none").strip() == "none"
    finally:
        theirs.remove()
