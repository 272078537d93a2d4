"""The text headers of .raw and .dat files: lines that start with "% "."""

import re
from pathlib import Path

from evspan.conf.errors import RecordingError

LONGEST_HEADER = 1 << 16  # bytes
LARGEST_SENSOR = 8192  # pixels a side; more is a damaged header
VGA = (480, 640)  # height, width
HD = (720, 1280)
# Sizes by system_ID, for headers that contain no size.
SYSTEMS = {
    **dict.fromkeys((21, 29, 33, 34, 35, 40, 41), VGA),  # Gen3 and Gen3.1
    **dict.fromkeys((30, 31, 32, 39, 46, 48, 49, 50), HD),  # Gen4, Gen4.1 and IMX636
}


def read_header(path: Path) -> tuple[dict[str, str], int]:
    """Reads the header lines.

    Returns:
        The fields by lower-case key (the first of a name counts), and the length of the header in
        bytes. `% end` closes a header.

    Raises:
        RecordingError: a header line does not end.
    """
    with path.open("rb") as file:
        text = file.read(LONGEST_HEADER)
    fields: dict[str, str] = {}
    length = 0
    while text.startswith(b"% ", length):
        line, end, _ = text[length + 1 :].partition(b"\n")
        if not end:
            raise RecordingError(
                f"{path}: the header line at byte {length} does not end within {len(text)} bytes. "
                "The file is cut off or damaged: copy it again"
            )
        length += len(line) + 2
        words = line.decode("latin-1").split(maxsplit=1)
        if not words:
            continue
        key = words[0].lower()
        if key == "end":
            break
        value = words[1].strip() if len(words) > 1 else ""
        fields.setdefault(key, value)
    return fields, length


def format_options(fields: dict[str, str]) -> dict[str, str]:
    """The options of the line `% format EVT3;height=720;width=1280` as a dict."""
    parts = fields.get("format", "").split(";")
    return dict(part.strip().split("=", 1) for part in parts if "=" in part)


def raw_format(path: Path) -> str:
    """The format that the header names: evt2, evt21, evt3, ...; empty where it names none."""
    fields, _ = read_header(path)
    if "format" in fields:
        name = fields["format"].split(";")[0]
    elif "evt" in fields:
        name = f"evt{fields['evt']}"
    else:
        return ""
    name = name.strip().lower().removesuffix(".0").replace(".", "")
    return "" if name == "evt" else name


def sensor_size(
    path: Path, fields: dict[str, str], default: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The sensor's size from the first of these that the header contains.

    `format ...;height=H;width=W`, `Height H` and `Width W`, `geometry WxH`, the number of the
    system.

    Returns:
        Height and width in pixels.

    Raises:
        RecordingError: the header contains none of them and there is no default, or the size is
            not a sensor's.
    """
    for source in (format_options(fields), fields):
        if "height" in source and "width" in source:
            return checked_size(path, source["height"], source["width"])
    if "geometry" in fields:
        width, _, height = fields["geometry"].partition("x")
        return checked_size(path, height, width)
    system = system_number(fields)
    if system in SYSTEMS:
        return SYSTEMS[system]
    if default:
        return default
    raise RecordingError(
        f"{path}: the header does not contain the sensor's size. Add a line "
        "'% geometry 1280x720' (width x height) to it"
    )


def system_number(fields: dict[str, str]) -> int:
    """The number of `% system_ID 49`; 0 where there is none."""
    number = fields.get("system_id", "")
    return int(number) if re.fullmatch("[0-9]{1,9}", number) else 0


def checked_size(path: Path, height: str, width: str) -> tuple[int, int]:
    """Height and width as numbers.

    Raises:
        RecordingError: they are not pixel counts from 1 to LARGEST_SENSOR.
    """
    if _is_side(height) and _is_side(width):
        return int(height), int(width)
    raise RecordingError(
        f"{path}: the sensor's size is height {height[:20]!r} and width {width[:20]!r}; it must be "
        f"1 to {LARGEST_SENSOR} pixels each. Correct the header, or copy the file again"
    )


def _is_side(text: str) -> bool:
    return bool(re.fullmatch("[0-9]{1,9}", text)) and 1 <= int(text) <= LARGEST_SENSOR
