"""The text headers of .raw and .dat files: lines that start with %."""

import re
from pathlib import Path

from data_prep.errors import RecordingError

LONGEST = 1 << 16
SYSTEMS = {"21": (480, 640), "48": (720, 1280)}  # system_ID of headers that name no size: Gen3 VGA, Gen4.1 HD


def read_header(path: Path) -> tuple[dict[str, str], int]:
    """({key: value}, length in bytes). Keys are lower case; `% end` closes a header where there is one."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        length = 0
        while file.peek(2)[:2] == b"% " and length < LONGEST:
            line = file.readline(LONGEST)
            length += len(line)
            words = line[1:].decode("latin-1").strip().split(None, 1)
            if words and words[0].lower() == "end":
                break
            if words:
                fields.setdefault(words[0].lower(), words[1].strip() if len(words) > 1 else "")
    return fields, length


def raw_format(path: Path) -> str:
    """evt2, evt21, evt3, ... as the header names it; empty where it does not."""
    fields, _ = read_header(path)
    if "format" in fields:  # "EVT3;height=720;width=1280"
        return fields["format"].split(";")[0].strip().lower().replace(".", "")
    return {"2.0": "evt2", "2.1": "evt21", "3.0": "evt3"}.get(fields.get("evt", ""), "")


def sensor_size(path: Path, fields: dict[str, str], default: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) from `format ...;height=H;width=W`, `geometry WxH`, or `Height H` and `Width W`.

    Raises:
        RecordingError: none of them is there and there is no default.
    """
    options = dict(part.split("=", 1) for part in fields.get("format", "").split(";") if "=" in part)
    geometry = re.fullmatch(r"(\d+)x(\d+)", fields.get("geometry", ""))
    height, width = options.get("height", fields.get("height")), options.get("width", fields.get("width"))
    try:
        if height and width:
            return int(height), int(width)
    except ValueError:
        pass
    if geometry:
        return int(geometry[2]), int(geometry[1])
    if (system := fields.get("system_id")) in SYSTEMS:
        return SYSTEMS[system]
    if default:
        return default
    raise RecordingError(f"{path}: the header does not tell the sensor's size. Add a line '% geometry 1280x720' (width x "
                         "height) to it")
