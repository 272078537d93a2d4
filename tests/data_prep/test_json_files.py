"""JSON files that are damaged or made by others: read within limits, or refused with their name."""

import json
import os
import re
from pathlib import Path

import pytest
from evspan.conf.json_files import JsonFileError, parse_json, read_json, read_json_object


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "values.json"


def test_a_value_is_read(path: Path) -> None:
    value = {"a": [1, -2.5, None, True], "\u00e9\n": {"": "\U0001f600"}}
    for ascii_only in (True, False):
        path.write_text(json.dumps(value, ensure_ascii=ascii_only), "utf-8")
        assert read_json(path) == value
        assert read_json_object(str(path)) == value


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is not JSON: it is empty"),
        (b"\x00" * 100, "is not JSON"),
        (b'{"a": 1', "is not JSON: .*line 1 column 8"),
        (b'{"a": "\xff"}', "is not JSON: byte 7 is not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "is not JSON: an object has the key 'a' 2 times"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b"[" * 100_000, "is nested too deeply, at most 64 levels"),
        (b"[" * 100_000 + b"]" * 100_000, "is nested too deeply"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "is nested too deeply, at most 64 levels"),
        (b'"' + b"a" * (16 << 20) + b'"', "is too large: 16777218 bytes, at most 16777216"),
        (b"[" + b"{}," * 4_000_000 + b"{}]", "has more than 4000000 values"),
    ],
)
def test_what_is_no_value_or_too_much_is_refused(path: Path, contents: bytes, message: str) -> None:
    path.write_bytes(contents)
    with pytest.raises(JsonFileError, match=f"^{re.escape(str(path))} {message}") as error:
        read_json(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_nesting_up_to_the_limit_is_read() -> None:
    assert parse_json("[" * 64 + "1" + "]" * 64, "x")
    assert parse_json("[[]]", "x", most_depth=1) == [[]]
    with pytest.raises(JsonFileError, match="x is nested too deeply, at most 1 "):
        parse_json("[[0]]", "x", most_depth=1)


@pytest.mark.parametrize(
    ("text", "kind"), [("[]", "an array"), ('"a"', "a string"), ("1", "a number"), ("null", "null")]
)
def test_another_value_than_an_object_is_named(path: Path, text: str, kind: str) -> None:
    path.write_text(text)
    with pytest.raises(JsonFileError, match=f"{path} is not a JSON object but {kind}"):
        read_json_object(path)


def test_a_pipe_is_refused_at_once(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(JsonFileError, match="is no regular file"):
        read_json(path)


def test_errors_of_the_file_system_pass_through(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(path)
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        read_json(path)
