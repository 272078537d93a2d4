"""Shell completion in a real bash and a real zsh."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest
from evspan.launch.cli.completion import script
from evspan.launch.cli.main import COMMANDS

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        (folder / shell).write_text(script(shell))
    return folder


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "drive.raw").touch()
    monkeypatch.chdir(tmp_path)


def bash(scripts, line: str, breaks: str = " =:") -> list[str]:
    """What the completion function replies at the end of a command line."""
    program = """
        source "$1"
        COMP_LINE=$2 COMP_POINT=${#2} COMP_WORDBREAKS=$3
        _evspan
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    result = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", scripts / "bash", line, breaks],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout.split()


CASES = [
    ("evspan tra", ["train"]),
    ("evspan comp", ["completion"]),
    ("evspan help tra", ["train"]),
    ("evspan train exp", ["experiment="]),
    ("evspan train training.max_s", ["training.max_steps="]),
    ("evspan train tr", ["training."]),
    ("evspan train model.f", ["model.fpn."]),
    ("evspan train size=", ["base", "micro", "small", "tiny"]),
    ("evspan train seed=1 training.precision=f", ["fp32"]),
    ("evspan train training.compile=", ["true", "false"]),
    ("evspan train experiment=gen4/sm", ["gen4/small"]),
    ("evspan train run_dir=ru", ["runs"]),
    ("evspan train --mul", ["--multirun"]),
    ("evspan sweep cluster.dry", ["cluster.dry_run="]),
    ("evspan evaluate ru", ["runs"]),
    ("evspan evaluate runs/tiny evaluation.spl", ["evaluation.split="]),
    ("evspan evaluate comp", ["compare"]),
    ("evspan evaluate compare --js", ["--json"]),
    ("evspan prep inf", ["info"]),
    ("evspan prep info dri", ["drive.raw"]),
    ("evspan prep preview --fra", ["--frames"]),
    ("evspan prep source=dri", ["drive.raw"]),
    ("evspan simulate raw --format ", ["dat", "h5", "raw"]),
    ("evspan simulate raw --over", ["--overwrite"]),
    ("evspan infer runs/tiny dri", ["drive.raw"]),
    ("evspan infer runs/tiny drive.raw --conf", ["--confidence"]),
    ("evspan completion z", ["zsh"]),
    ("evspan quux ", ["drive.raw", "runs"]),
]


@pytest.mark.parametrize(("line", "reply"), CASES, ids=[line for line, _ in CASES])
def test_bash_completes(scripts, files, line, reply):
    assert sorted(bash(scripts, line)) == sorted(reply)


def test_bash_completes_every_command(scripts):
    assert sorted(bash(scripts, "evspan ")) == sorted([*COMMANDS, "help"])


def test_bash_keeps_the_key_where_the_equals_sign_separates_no_words(scripts):
    assert bash(scripts, "evspan train size=mi", breaks=" ") == ["size=micro"]


@pytest.mark.parametrize("line", ["evspan ", "evspan train ", "evspan train size="])
def test_a_key_press_starts_no_python(scripts, tmp_path, monkeypatch, line):
    programs = tmp_path / "bin"
    programs.mkdir()
    started = tmp_path / "started"
    for name in ("python", "python3", "evspan"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> '{started}'\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    assert bash(scripts, line)
    assert not started.exists(), started.read_text()
    assert sys.executable not in (scripts / "bash").read_text()


def typed(command: list[str], text: str, expected: str) -> str:
    """The screen of an interactive shell after `text`, until it shows `expected` or 10 s have passed."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="dumb", PS1="$ ", HISTFILE="")
        os.execvp(command[0], command)
    os.write(terminal, text.encode())
    screen = ""
    end = time.monotonic() + 10
    while expected not in screen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            screen += os.read(terminal, 4096).decode(errors="replace")
    os.close(terminal)
    os.waitpid(child, 0)
    return screen


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("evspan trai\t", "evspan train "),
        ("evspan train experiment=gen4/sma\t", "evspan train experiment=gen4/small"),
        ("evspan train training.max_st\t7", "evspan train training.max_steps=7"),
        ("evspan evaluate runs/ti\t", "evspan evaluate runs/tiny/"),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_an_interactive_shell_completes_the_line(scripts, files, shell, keys, line):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    if shell == "bash":
        command = ["bash", "--norc", "-i"]
        setup = f"source {scripts / shell}\n"
    else:
        command = ["zsh", "-f", "-i"]
        setup = f"autoload -Uz compinit && compinit -D -u; source {scripts / shell}\n"
    screen = typed(command, setup + keys, line)
    assert line in screen, screen
