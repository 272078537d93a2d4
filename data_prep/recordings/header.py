"""The text headers of .raw and .dat files: lines that start with "% "."""

import re
from pathlib import Path

from evspan.conf.errors import RecordingError
from evspan.conf.schema.prep import LARGEST_SENSOR

LONGEST_HEADER = 1 << 16  # bytes
VGA = (480, 640)  # height, width
HD = (720, 1280)
# Sizes by system_ID, for headers that contain no size.
SYSTEMS = {
    **dict.fromkeys((21, 23, 25, 28, 29, 33, 34, 35, 40, 41, 151, 153), VGA),  # Gen3 and Gen3.1
    **dict.fromkeys((26, 30, 31, 32, 39, 46, 48, 49, 50, 154), HD),  # Gen4, Gen4.1 and IMX636
}
SIZE_KEYS = ("format", "geometry", "height", "width")  # that a header may state once


def read_header(path: Path) -> tuple[dict[str, str], int]:
    """Reads the header lines.

    Returns:
        The fields by lower-case key (the first of a name counts), and the length of the header in
        bytes. `% end` closes a header.

    Raises:
        RecordingError: a header line does not end, or two lines state different formats or sizes.
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
        if fields.setdefault(key, value) != value and key in SIZE_KEYS:
            raise RecordingError(
                f"{path}: the header states two values of {key}, {fields[key][:40]!r} and "
                f"{value[:40]!r}. Two headers were joined, or it is damaged: correct it, or copy "
                "the file again"
            )
    return fields, length


def format_options(fields: dict[str, str]) -> dict[str, str]:
    """The options of the line `% format EVT3;height=720;width=1280` as a dict."""
    parts = fields.get("format", "").split(";")
    return dict(part.strip().split("=", 1) for part in parts if "=" in part)


def raw_format(path: Path) -> str:
    """The format that the header names: evt2, evt21, evt3, ...; empty where it names none.

    Raises:
        RecordingError: it names two.
    """
    fields, _ = read_header(path)
    names = [f"evt{fields['evt']}"] if "evt" in fields else []
    if "format" in fields:
        names.append(fields["format"].split(";")[0])
    names = [name.strip().lower().removesuffix(".0").replace(".", "") for name in names]
    names = [name for name in names if name not in ("", "evt")]
    if len(set(names)) > 1:
        raise RecordingError(
            f"{path}: the header states two formats, {names[0][:20].upper()} and "
            f"{names[1][:20].upper()}. Correct the header, or copy the file again"
        )
    return names[0] if names else ""


def stated_size(path: Path, fields: dict[str, str]) -> tuple[int, int] | None:
    """The sensor's size as the header states it.

    It may be in `format ...;height=H;width=W`, in `Height H` and `Width W`, and in `geometry WxH`;
    otherwise it follows from the number of the system.

    Returns:
        Height and width in pixels; None where the header does not state them.

    Raises:
        RecordingError: the size is not a sensor's, or different ones are stated.
    """
    statements: dict[str, dict[str, str]] = {"format": format_options(fields), "lines": fields}
    if "geometry" in fields:
        width, _, height = fields["geometry"].partition("x")
        statements["geometry"] = {"height": height, "width": width}
    system = system_number(fields)
    size: tuple[int, int] | None = SYSTEMS.get(system)
    for source in statements.values():
        if "height" in source and "width" in source:
            size = checked_size(path, source["height"], source["width"])
            _require_agreement(path, statements)
            break
    return size


def _require_agreement(path: Path, statements: dict[str, dict[str, str]]) -> None:
    for side in ("height", "width"):
        values = {name: source[side] for name, source in statements.items() if side in source}
        if len({value.strip() for value in values.values()}) > 1:
            listed = ", ".join(f"{value[:20]!r} in {name}" for name, value in values.items())
            raise RecordingError(
                f"{path}: the header states different values of the sensor's {side}: {listed}. "
                "Correct the header, or copy the file again"
            )


def require_size(path: Path, default: tuple[int, int] | None) -> tuple[int, int]:
    """The size to assume where a file states none.

    Raises:
        RecordingError: there is no default.
    """
    if default:
        return default
    raise RecordingError(
        f"{path}: the header does not contain the sensor's size. Set "
        "dataset.sensor_size=[HEIGHT,WIDTH], or add a line '% geometry 1280x720' (width x height) "
        "to it"
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
