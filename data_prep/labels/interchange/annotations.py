"""Labels independent of the file format: pictures, boxes with class names, tracks."""

import errno
import math
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from evspan.conf.errors import UserError
from evspan.conf.text import printable

MOST_BYTES = 512 << 20  # of a file that is read
MOST_FILES = 1_000_000  # of a folder that is read
MOST_PICTURES = 2_000_000
MOST_SIDE = 1 << 14  # of a picture, in pixels
MOST_COORDINATE = 1e6
MOST_CLASSES = 1000
LONGEST_NAME = 200  # characters of a class name


class LabelsError(UserError):
    """A file of labels cannot be read. The message names the file, the place and the remedy."""


class Picture(NamedTuple):
    """A labelled frame.

    name: of its image file; empty where the format has none. frame: its number, from 0. time_us:
    where the format states it. recording: empty where the format does not name it. size: (width,
    height) in pixels of the coordinates.
    """

    name: str = ""
    frame: int | None = None
    time_us: int | None = None
    recording: str = ""
    size: tuple[int, int] | None = None


class Label(NamedTuple):
    """A box of a picture.

    picture: index in `Annotations.pictures`. x, y: top left, in pixels. track: None without one.
    ignore: a region in which detections count neither as right nor as wrong.
    """

    picture: int
    class_name: str
    x: float
    y: float
    w: float
    h: float
    track: int | None = None
    confidence: float = 1.0
    ignore: bool = False


@dataclass
class Annotations:
    """The content of a file or folder of labels. classes: in the order of their ids there."""

    classes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


def number(value: object, place: str, what: str, *, most: float = MOST_COORDINATE) -> float:
    """A finite number of at most `most` from a file: a number, or a text that is one.

    Args:
        place: the file and the place in it, for the message.

    Raises:
        LabelsError: it is no such number.
    """
    try:
        result = math.nan
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            result = float(value)
    except (ValueError, OverflowError):
        result = math.nan
    if not abs(result) <= most:
        raise LabelsError(
            f"{place}: {what} is {shown(value)}; it must be a number from {-most:g} to {most:g}. "
            "Correct or remove it"
        )
    return result


def whole(value: object, place: str, what: str, *, least: int = 0, most: int = 2**53) -> int:
    """A whole number of a file, from `least` to `most`.

    Raises:
        LabelsError: it is no such number.
    """
    result: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        result = value
    elif isinstance(value, str | float):
        as_float = number(value, place, what, most=2**53)
        if as_float == int(as_float):
            result = int(as_float)
    if result is None or not least <= result <= most:
        raise LabelsError(
            f"{place}: {what} is {shown(value)}; it must be a whole number from {least} to {most}. "
            "Correct or remove it"
        )
    return result


def class_name(value: object, place: str) -> str:
    """A class name of a file, without blanks around it.

    Raises:
        LabelsError: it is no text of one line, or too long.
    """
    name = value.strip() if isinstance(value, str) else ""
    if not name or len(name) > LONGEST_NAME or printable(name) != name:
        raise LabelsError(
            f"{place}: {shown(value)} is no name of a class; it must be a text of one line with 1 "
            f"to {LONGEST_NAME} characters"
        )
    return name


def require_classes(names: list[str], place: str) -> list[str]:
    """The names, where each is there once.

    Raises:
        LabelsError: a name is there twice, or there are too many.
    """
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise LabelsError(f"{place}: class {repeated[0]!r} is there twice. Rename one of them")
    if len(names) > MOST_CLASSES:
        raise LabelsError(f"{place} has {len(names)} classes; at most {MOST_CLASSES} are read")
    return names


def picture_size(width: object, height: object, place: str) -> tuple[int, int] | None:
    """(width, height) of a picture; None where one of them is missing or 0.

    Raises:
        LabelsError: a value that is no size.
    """
    if width in (None, "") or height in (None, ""):
        return None
    sides = (
        whole(width, place, "the width", most=MOST_SIDE),
        whole(height, place, "the height", most=MOST_SIDE),
    )
    return sides if min(sides) > 0 else None


def require_few_pictures(count: int, path: Path) -> None:
    """Refuses more pictures than one file or folder reasonably has.

    Raises:
        LabelsError: there are more than `MOST_PICTURES`.
    """
    if count > MOST_PICTURES:
        raise LabelsError(
            f"{path} has {count} frames; at most {MOST_PICTURES} are read. Is the number of "
            "frames damaged? Split the file otherwise"
        )


def require_regular(path: Path) -> None:
    """Refuses what is no regular file: opening a named pipe would wait for a writer.

    Raises:
        LabelsError: there is no file, a folder, a pipe or a device.
        OSError: its kind cannot be found out.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise LabelsError(f"{path} is not there, or is a link that leads nowhere") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise LabelsError(f"{path} is a link that leads to itself") from error
        raise
    if not stat.S_ISREG(mode):
        raise LabelsError(f"{path} is no regular file")


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a file of bounded size.

    Raises:
        LabelsError: it is too large, or no regular file.
        OSError: it cannot be read.
    """
    require_regular(path)
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise LabelsError(f"{path} is larger than {most_bytes} bytes. Split it")
    return data


def read_text(path: Path) -> str:
    """The text of a file of bounded size.

    Raises:
        LabelsError: it is too large, no UTF-8, or no regular file.
        OSError: it cannot be read.
    """
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LabelsError(f"{path} is not UTF-8 text: byte {error.start}") from error
    if "\0" in text:
        raise LabelsError(f"{path} contains NUL bytes, so it is no text")
    return text


def name_lines(path: Path) -> list[str]:
    """The class names of a file with one per line.

    Raises:
        LabelsError: it is no such file.
    """
    lines = read_text(path).splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) > MOST_CLASSES:
        raise LabelsError(f"{path} has {len(lines)} lines; at most {MOST_CLASSES} names are read")
    names = [class_name(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]
    return require_classes(names, str(path))


def shown(value: object) -> str:
    """A value of a file for a message: short, and printable."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = printable(text)
    return text if len(text) <= 60 else text[:57] + "..."


def different_names(names: Iterable[str]) -> list[str]:
    """The different names, in the order in which they first appear."""
    return list(dict.fromkeys(names))
