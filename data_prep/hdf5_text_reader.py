"""Prints the string attributes of groups of an HDF5 file as JSON.

hdf5_text_reader.py PATHS FILE GROUP BYTES SECONDS ATTRIBUTE ...

PATHS: folders of modules, a JSON array. GROUP: its name; empty: all groups below the root. BYTES,
SECONDS: limits of the address space and of processor time. The output is a line READING, before
the file is opened, and then {group: {attribute: text}}. `hdf5_texts` runs this as a process that
may be killed. The exit code is DAMAGED where the content of the file cannot be read.
"""

import json
import resource
import sys
from collections.abc import Sequence

READING = "reading"
DAMAGED = 3
MOST_CHARACTERS = 1 << 20
GRACE_SECONDS = 2  # after the limit of processor time, which is a signal of its own


def _limit(kind: int, most: int) -> bool:
    """Lowers a limit; returns whether it is lower than the process had."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY and hard <= most:
        return False
    grace = GRACE_SECONDS if kind == resource.RLIMIT_CPU else 0
    upper = most + grace if hard == resource.RLIM_INFINITY else min(most + grace, hard)
    resource.setrlimit(kind, (most, upper))
    return True


def _read(path: str, group: str, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The attributes that are text; those of other types are left out."""
    from evspan.data_prep.hdf5_files import open_hdf5_for_reading

    texts: dict[str, dict[str, str]] = {}
    with open_hdf5_for_reading(path) as file:
        for member in [group] if group else list(file):
            attributes = file[member].attrs
            texts[member] = {}
            for name in names:
                if name not in attributes:
                    continue
                value = attributes[name]
                text = value.decode() if isinstance(value, bytes) else value
                if isinstance(text, str) and len(text) <= MOST_CHARACTERS:
                    texts[member][name] = text
    return texts


def main(path: str, group: str, most_bytes: int, seconds: int, names: Sequence[str]) -> int:
    """Prints the texts; returns the exit code."""
    from evspan.data_prep.hdf5_files import is_damage, is_failed_allocation

    has_own_limit = _limit(resource.RLIMIT_AS, most_bytes)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _limit(resource.RLIMIT_CPU, int(used) + 1 + seconds)
    print(READING, flush=True)
    try:
        texts = _read(path, group, names)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        # This limit is far above what an intact file needs.
        is_too_large = has_own_limit and is_failed_allocation(error)
        return DAMAGED if is_too_large or is_damage(error) else 1
    print(json.dumps(texts))
    return 0


if __name__ == "__main__":
    sys.path += json.loads(sys.argv[1])
    file, group_name, bytes_, seconds_ = sys.argv[2:6]
    sys.exit(main(file, group_name, int(bytes_), int(seconds_), sys.argv[6:]))
