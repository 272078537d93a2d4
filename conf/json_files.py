"""Reads JSON from files that may be damaged or written by others: bounded size, nesting, memory."""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from evspan.conf.errors import UserError

MOST_BYTES = 16 << 20
MOST_DEPTH = 64
MOST_VALUES = 4_000_000  # an empty value takes 3 bytes of a file and up to 100 bytes of memory


class JsonFileError(UserError):
    """The text is no JSON, or exceeds a limit. The message names the file, place and problem."""


def read_json(
    path: str | Path,
    *,
    most_bytes: int = MOST_BYTES,
    most_depth: int = MOST_DEPTH,
    most_values: int = MOST_VALUES,
) -> Any:
    """Reads a file that contains one JSON value, in UTF-8.

    Args:
        most_bytes: limit of the file's size; a larger file is not read.
        most_depth: limit of the nesting of arrays and objects.
        most_values: limit of the number of values, which take memory.

    Raises:
        JsonFileError: the contents are not such a value, or no regular file is there.
        OSError: the file cannot be read.
    """
    # Opening a named pipe would wait for a writer.
    if not stat.S_ISREG(os.stat(path).st_mode) and not Path(path).is_dir():
        raise JsonFileError(f"{path} is no regular file")
    with Path(path).open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        size = max(os.stat(path).st_size, len(data))
        raise JsonFileError(f"{path} is too large: {size} bytes, at most {most_bytes} are read")
    return parse_json(data, str(path), most_depth=most_depth, most_values=most_values)


def read_json_object(
    path: str | Path, *, most_bytes: int = MOST_BYTES, most_depth: int = MOST_DEPTH
) -> dict[str, Any]:
    """Reads a file that contains one JSON object, as `read_json` does.

    Raises:
        JsonFileError: also where the value is no object.
        OSError: the file cannot be read.
    """
    value = read_json(path, most_bytes=most_bytes, most_depth=most_depth)
    return _require_object(value, str(path))


def parse_json(
    data: bytes | str,
    place: str,
    *,
    most_depth: int = MOST_DEPTH,
    most_values: int = MOST_VALUES,
) -> Any:
    """Parses one JSON value whose size the caller has limited.

    Args:
        place: where the text is from, for the message.

    Raises:
        JsonFileError: it is no such value; an object has a key several times.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        if _num_values(text) > most_values:
            raise JsonFileError(f"{place} has more than {most_values} values")
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise JsonFileError(f"{place} is nested too deeply, at most {most_depth} levels") from None
    except UnicodeDecodeError as error:
        raise JsonFileError(f"{place} is not JSON: byte {error.start} is not UTF-8") from error
    except ValueError as error:  # JSONDecodeError, a duplicate key, a number of too many digits
        if not data.strip():
            raise JsonFileError(f"{place} is not JSON: it is empty") from error
        raise JsonFileError(f"{place} is not JSON: {error}") from error
    if _is_deeper(value, most_depth):
        raise JsonFileError(f"{place} is nested too deeply, at most {most_depth} levels")
    return value


def parse_json_object(
    data: bytes | str, place: str, *, most_depth: int = MOST_DEPTH
) -> dict[str, Any]:
    """Parses one JSON object as `parse_json` does.

    Raises:
        JsonFileError: also where the value is no object.
    """
    return _require_object(parse_json(data, place, most_depth=most_depth), place)


def _num_values(text: str) -> int:
    """At least the number of values in the text."""
    return text.count(",") + text.count("[") + text.count("{") + 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        key, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the key {key[:80]!r} {times} times")
    return values


def _is_deeper(value: Any, most_depth: int) -> bool:
    level = [value]
    for _ in range(most_depth + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return False
        level = below
    return True


def _require_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise JsonFileError(f"{place} is not a JSON object but {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "an array"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return "a number"
