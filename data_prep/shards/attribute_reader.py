"""Prints the string attributes of groups of an HDF5 file as JSON, without importing Evspan.

attribute_reader.py FILE GROUP BYTES SECONDS ATTRIBUTE ...

GROUP: its name; empty: all groups below the root. BYTES, SECONDS: limits of the address space and
of processor time. The output is {group: {attribute: text}}. `attributes.py` runs this as a process
that may be killed.
"""

import json
import resource
import sys

MOST_CHARACTERS = 1 << 20


def main(path: str, group: str, most_bytes: int, seconds: int, names: list[str]) -> None:
    """Prints the attributes that are text; those of other groups and types are left out."""
    import h5py

    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    limit = int(used) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    texts: dict[str, dict[str, str]] = {}
    with h5py.File(path, "r", locking=False) as file:
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
    print(json.dumps(texts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
