"""The text headers of .raw and .dat files: lines that start with "% "."""

import re
from pathlib import Path

from evspan.conf.errors import RecordingError

LONGEST = 1 << 16
LARGEST_SENSOR = 8192  # pixels a side; more is a damaged header
VGA, HD = (480, 640), (720, 1280)
SYSTEMS = {
    **dict.fromkeys(
        (21, 29, 33, 34, 35, 40, 41), VGA
    ),  # system_ID of headers that name no size: Gen3 and 3.1,
    **dict.fromkeys((30, 31, 32, 39, 46, 48, 49, 50), HD),
}  # Gen4, Gen4.1 and IMX636


def read_header(path: Path) -> tuple[dict[str, str], int]:
    """({key: value}, length in bytes). Keys are lower case, the first of a name counts; `% end` closes a header.

    Raises:
        RecordingError: a header line does not end.
    """
    with path.open("rb") as file:
        text = file.read(LONGEST)
    fields: dict[str, str] = {}
    length = 0
    while text.startswith(b"% ", length):
        line, end, _ = text[length + 1 :].partition(b"\n")
        if not end:
            raise RecordingError(
                f"{path}: the header line at byte {length} does not end within {len(text)} bytes. The file is "
                "cut off or damaged: copy it again"
            )
        length += len(line) + 2
        words = line.decode("latin-1").strip().split(None, 1)
        if words and words[0].lower() == "end":
            break
        if words:
            fields.setdefault(words[0].lower(), words[1].strip() if len(words) > 1 else "")
    return fields, length


def format_options(fields: dict[str, str]) -> dict[str, str]:
    """`height=720;width=1280;...` of the line `% format EVT3;height=720;width=1280`."""
    return dict(
        part.strip().split("=", 1) for part in fields.get("format", "").split(";") if "=" in part
    )


def raw_format(path: Path) -> str:
    """evt2, evt21, evt3, ... as the header names it; empty where it does not."""
    fields, _ = read_header(path)
    name = fields["format"].split(";")[0] if "format" in fields else f"evt{fields.get('evt', '')}"
    name = name.strip().lower().removesuffix(".0").replace(".", "")
    return "" if name == "evt" else name


def sensor_size(
    path: Path, fields: dict[str, str], default: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(height, width) from `format ...;height=H;width=W`, `Height H` and `Width W`, `geometry WxH`, or the system's number.

    Raises:
        RecordingError: none of them is there and there is no default, or what is there is no sensor's size.
    """
    for source in (format_options(fields), fields):
        if "height" in source and "width" in source:
            return checked_size(path, source["height"], source["width"])
    if "geometry" in fields:
        width, _, height = fields["geometry"].partition("x")
        return checked_size(path, height, width)
    if (system := system_number(fields)) in SYSTEMS:
        return SYSTEMS[system]
    if default:
        return default
    raise RecordingError(
        f"{path}: the header does not tell the sensor's size. Add a line '% geometry 1280x720' (width x "
        "height) to it"
    )


def system_number(fields: dict[str, str]) -> int:
    """`% system_ID 49`; 0 where there is none."""
    told = fields.get("system_id", "")
    return int(told) if re.fullmatch("[0-9]{1,9}", told) else 0


def checked_size(path: Path, height: str, width: str) -> tuple[int, int]:
    """(height, width). Raises RecordingError where they are no pixel counts from 1 to LARGEST_SENSOR."""
    if all(
        re.fullmatch("[0-9]{1,9}", side) and 1 <= int(side) <= LARGEST_SENSOR
        for side in (height, width)
    ):
        return int(height), int(width)
    raise RecordingError(
        f"{path}: the sensor's size is told as height {height[:20]!r} and width {width[:20]!r}; it must be 1 to "
        f"{LARGEST_SENSOR} pixels each. Mend the header, or copy the file again"
    )
