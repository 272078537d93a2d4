"""The driver of the fuzz campaigns notices what a case must not do."""

import pytest
from support import fuzz

ESCAPES = '''
"""Checks that do what none may do; each prints what the driver says."""
import pickle
import subprocess
from pathlib import Path

import h5py
import numpy as np
from evspan.conf.errors import UserError
from support import fuzz

ARMED = False


def only_in_cases(act):
    def check(folder):
        if ARMED:
            act(folder)

    return check


def refuse(message):
    raise UserError(message)


def with_canary(folder, rng):
    global ARMED
    ARMED = True
    with h5py.File(folder / "a", "w") as file:
        file.create_dataset("a", (5,), "u1", external=[(str(fuzz.canary(folder)), 0, 5)])


ACTS = {
    "nothing": lambda folder: None,
    "refuses": lambda folder: refuse(f"{folder} is damaged"),
    "opens": lambda folder: Path("/etc/passwd").read_text(),
    "writes": lambda folder: (folder.parent / "new").write_text("x"),
    "removes": lambda folder: fuzz.canary(folder).unlink(),
    "starts": lambda folder: subprocess.run(["true"]),
    "unpickles": lambda folder: pickle.loads(pickle.dumps(np.float32)),
    "executes": lambda folder: exec("pass"),
    "reads_in_C": lambda folder: h5py.File(folder / "a")["a"][:],
    "unnamed": lambda folder: refuse("damaged"),
    "raises": lambda folder: 1 / 0,
}
for name, act in ACTS.items():
    ARMED = False
    kind = fuzz.Kind(
        make=lambda folder: (folder / "a").write_text("a"),
        check=only_in_cases(act),
        damage=with_canary,
    )
    try:
        fuzz.run_cases(name, kind, 0, 2)
    except Exception as error:
        print(f"{name}: {type(error).__name__} {error}")
'''
EXPECTED = {
    "nothing": "2 read, 0 refused",
    "refuses": "0 read, 2 refused",
    "opens": "AssertionError ['open /etc/passwd",
    "writes": "AssertionError ['open /",
    "removes": 'AssertionError ["os.remove: ',
    "starts": 'AssertionError ["subprocess.Popen',
    "unpickles": 'AssertionError ["pickle.find_class',
    "executes": "AssertionError [\"compile(b'pass'",
    "reads_in_C": "AssertionError the canary was read",
    "unnamed": "AssertionError damaged",
    "raises": "ZeroDivisionError",
}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_a_case_must_not_do_is_noticed(tmp_path):
    script = tmp_path / "escapes.py"
    script.write_text(ESCAPES)
    result = fuzz.in_a_process(str(script), "all", 0, 2, timeout=120)
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert lines.keys() == EXPECTED.keys(), result.stdout + result.stderr
    for name, expected in EXPECTED.items():
        assert lines[name].startswith(expected), lines[name]
