"""Output that cannot be written ends no run, and names from files control no terminal."""

import logging
import os
import pty
import subprocess
import sys
from contextlib import ExitStack

import pytest
from evspan.launch.cli.main import main
from evspan.launch.cli.table import format_table
from support.training_runs import train_command

SHARD_FRAMES = {"train": [24], "val": [12]}
pytestmark = pytest.mark.timeout(240)
NAME = "a\x1b[2J\x9b31m\r\u202eb"  # clears the screen, turns red, overwrites, writes backwards
ESCAPED = r"a\x1b[2J\x9b31m\x0d\u202eb"
WORK = """
import logging, os, sys
from evspan.launch.cli.command import run_command

def work():
    library = logging.getLogger("library")
    library.addHandler(logging.StreamHandler(sys.stdout))
    for number in range(20_000):
        print("step", number)
        library.warning("a library's record")
        logging.getLogger("evspan.test").info("a record")
    print("to standard error", file=sys.stderr, flush=True)
    print("flushed", flush=True)
    with open(sys.argv[1], "w") as result:  # descriptors that were closed go to no file
        os.write(1, b"native output") if len(sys.argv) > 2 else None
        result.write("done")
    print("at the end")

run_command(work)
"""


def run(command: list, output: str, *, errors: str = "", **environment: str):
    """The process; its outputs are "full" (a full device), "closed" (a pipe without a reader), or "pipe"."""
    with ExitStack() as stack:
        streams = []
        for kind in (output, errors or "pipe"):
            if kind == "full":
                streams.append(stack.enter_context(open("/dev/full", "w")))
            elif kind == "closed":
                reader, writer = os.pipe()
                os.close(reader)
                stack.callback(os.close, writer)
                streams.append(writer)
            else:
                streams.append(subprocess.PIPE)
        return subprocess.run(
            command,
            stdout=streams[0],
            stderr=streams[1],
            text=True,
            timeout=120,
            env={**os.environ, **environment},
        )


def evspan(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "evspan.launch", *map(str, arguments)]


# -- runs ----------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "errors", "unbuffered"),
    [("closed", "", ""), ("full", "", "1"), ("full", "full", ""), ("closed", "closed", "1")],
)
def test_a_run_goes_on_without_its_output(tmp_path, output, errors, unbuffered):
    result = run(
        [sys.executable, "-c", WORK, tmp_path / "result"],
        output,
        errors=errors,
        PYTHONUNBUFFERED=unbuffered,
    )
    assert result.returncode == 0
    assert (tmp_path / "result").read_text() == "done"
    if errors:
        return
    expected = "to standard error\n"
    if output == "full":
        expected = (
            "warning: standard output: No space left on device; the command goes on without it\n"
            + expected
        )
    assert result.stderr == expected


@pytest.mark.slow
def test_without_standard_streams_no_file_gets_their_output(tmp_path):
    command = [sys.executable, "-c", WORK, str(tmp_path / "result"), "native"]
    code = "import os, sys\nfor fd in range(3): os.close(fd)\nos.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *command], timeout=120)
    assert done.returncode == 1  # os.write fails: nobody reads descriptor 1 ...
    assert (tmp_path / "result").read_text() == ""  # ... which is not the result's


@pytest.mark.slow
def test_a_reader_that_is_slow_gets_all_from_a_pipe_that_does_not_block():
    program = (
        "import os\nos.set_blocking(1, False)\n"
        "from evspan.launch.logging_config import configure_logging\n"
        "configure_logging()\n"
        "for number in range(100_000): print(number)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.read().split() == [b"%d" % number for number in range(100_000)]
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("output", "ranks"), [("closed", 2), ("full", 1)])
def test_training_goes_on_without_its_output(shards, tmp_path, output, ranks):
    overrides = (f"parallel.ranks={ranks}", "training.max_steps=2", "training.batch_size=2")
    result = run(train_command(shards, tmp_path / "run", *overrides), output)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


# -- commands whose result is the output -----------------------------------------------------------
TABLES = (
    ["--help"],
    ["status", "--help"],
    ["train", "--cfg", "job"],
    ["prep", "status", "SHARDS"],
)


@pytest.mark.parametrize("arguments", TABLES, ids=" ".join)
@pytest.mark.parametrize("output", ["closed", "full"])
def test_a_table_ends_quietly_on_a_closed_pipe_and_reports_a_full_disk(shards, arguments, output):
    words = [str(shards) if word == "SHARDS" else word for word in arguments]
    result = run(evspan(*words), output)
    if output == "closed":
        assert (result.returncode, result.stderr) == (141, "")
    else:
        message = "error: standard output could not be written: No space left on device\n"
        assert (result.returncode, result.stderr) == (2, message)


def test_an_error_keeps_its_exit_code_without_standard_error():
    assert run(evspan("status", "/nowhere"), "full", errors="full").returncode == 2


# -- control characters ----------------------------------------------------------------------------
def test_prints_records_and_tracebacks_are_escaped():
    program = (
        "import logging, sys\nfrom evspan.launch.logging_config import configure_logging\n"
        "configure_logging()\nname = sys.argv[1]\n"
        "print('two\\nlines', name)\nlogging.getLogger('evspan').info('logged %s', name)\n"
        "logging.getLogger('evspan').error('failed %s', name)\nraise OSError(name)"
    )
    result = run([sys.executable, "-c", program, NAME], "pipe")
    assert result.stdout == f"two\nlines {ESCAPED}\nlogged {ESCAPED}\n"
    assert result.stderr.startswith(f"error: failed {ESCAPED}\nTraceback")
    assert result.stderr.endswith(f"OSError: {ESCAPED}\n")


def test_a_name_that_the_encoding_lacks_is_printed():
    program = (
        "import os\nfrom evspan.launch.logging_config import configure_logging\n"
        "configure_logging()\nprint('Füße 日本', os.fsdecode(b'caf\\xe9'))"
    )
    result = run([sys.executable, "-c", program], "pipe", PYTHONIOENCODING="ascii")
    assert result.stdout == "F\\xfc\\xdfe \\u65e5\\u672c caf\\xe9\n"


def test_a_progress_bar_moves_on_a_terminal_and_its_names_do_not():
    program = (
        "import sys\nfrom tqdm import tqdm\n"
        "from evspan.launch.logging_config import configure_logging\n"
        "configure_logging()\n"
        "for _ in tqdm([1], desc=sys.argv[1], ncols=100, nrows=20, disable=None): pass\n"
        "print('x\\r', file=sys.stderr)"
    )
    terminal, child = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", program, NAME], stderr=child) as process:
        os.close(child)
        output = b""
        while b"x" not in output.split(b"\n")[-1] or process.poll() is None:
            try:
                output += os.read(terminal, 4096)
            except OSError:  # the last writer is gone
                break
    os.close(terminal)
    text = output.decode()
    assert f"\r{ESCAPED}: " in text
    assert "x\\x0d" in text
    assert "\x1b[2J" not in text


def test_a_log_record_in_a_file_stays_a_line(capsys):
    from evspan.launch.logging_config import configure_logging

    configure_logging(2, log_file=True)
    logging.getLogger("evspan.test").info("read %s\nerror: none", NAME)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f" INFO rank 2: read {ESCAPED}")
    assert second.endswith(" INFO rank 2: error: none")


def test_the_cells_of_a_table_are_escaped_before_they_are_aligned():
    lines = format_table([["name", "n"], [NAME, "1"], ["b\nc", "2"]])
    assert lines[1] == f"{ESCAPED}  1"
    assert lines[2] == "b\\x0ac".ljust(len(ESCAPED)) + "  2"


def test_logs_print_the_lines_of_a_log_without_its_colours(tmp_path, monkeypatch, capsys):
    lines = ["\x1b[31mred\x1b[0m\ttab", NAME]
    monkeypatch.setattr("evspan.launch.cli.logs.read_logs", lambda *_: iter(lines))
    main(["logs", str(tmp_path)])
    assert capsys.readouterr().out == f"\\x1b[31mred\\x1b[0m\ttab\n{ESCAPED}\n"
