"""Names of the classes of own recordings, and ids in box files that have no name."""

import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from evspan.conf.errors import BoxesError, ConfigError
from evspan.conf.schema.prep import LabelConfig, PrepConfig
from evspan.conf.text import printable
from evspan.data_prep.labels.box_files import BoxArray, read_boxes
from evspan.data_prep.recordings.links import require_targets, stat_of
from evspan.data_prep.shards.format import MANIFEST, load_manifest

CLASSES_FILE = "classes.txt"  # in a source: the name of class 0, 1, ..., one per line
MOST_BYTES = 1 << 16
MOST_CLASSES = 1000
DATASETS = "gen4, etram, etram3, simulated"


def with_classes(config: PrepConfig, box_files: Iterable[Path]) -> PrepConfig:
    """The config with the class names of the source where it has none.

    Args:
        box_files: of all recordings. Without any, no classes are needed.

    Raises:
        ConfigError: there are box files and no names; lists the ids in them and the remedy.
    """
    if config.dataset.classes:
        return config
    names = read_classes(Path(config.source))
    if not names:
        files = list(box_files)
        if not files:
            return config
        raise ConfigError(_no_names(config, files))
    return replace(config, dataset=replace(config.dataset, classes=names))


def read_classes(source: Path) -> list[str]:
    """The names in classes.txt of a source; empty without that file.

    Args:
        source: a folder; for a list or a single recording, the file counts that is next to it.

    Raises:
        ConfigError: the file is no list of different names.
    """
    path = (source if source.is_dir() else source.parent) / CLASSES_FILE
    require_targets([path])
    status = stat_of(path)
    if status is None or not stat.S_ISREG(status.st_mode):
        return []
    if status.st_size > MOST_BYTES:
        raise ConfigError(f"{path} has {status.st_size} bytes, too many for a name per line")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text; write the name of a class per line"
        ) from error
    while names and not names[-1]:
        names.pop()
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if not all(names) or repeated or len(names) > MOST_CLASSES:
        problem = f"names {printable(repeated[0])!r} twice" if repeated else "has empty lines"
        if len(names) > MOST_CLASSES:
            problem = f"has {len(names)} lines"
        raise ConfigError(f"{path} {problem}; write the name of class 0, 1, ... per line")
    return names


def require_named(path: Path, boxes: BoxArray, config: LabelConfig, classes: list[str]) -> None:
    """Checks that every class id has a name where no class map selects ids.

    Args:
        path: of the box file.
        boxes: (N,) RAW_BOX.

    Raises:
        BoxesError: names the file, the ids, how many boxes have them, and the remedy.
    """
    if config.class_map:
        return
    counts = class_ids(boxes)
    unnamed = {class_id: n for class_id, n in counts.items() if class_id >= len(classes)}
    if not unnamed:
        return
    identity = ",".join(f"{i}:{i}" for i in range(len(classes)))
    raise BoxesError(
        f"{path}: {sum(unnamed.values())} of {boxes.size} boxes have a class_id without a name: "
        f"{_listed(unnamed)}. The classes {classes} name "
        f"ids 0 to {len(classes) - 1}. Add the names to dataset.classes, or leave these boxes out: "
        f"dataset.labels.class_map={{{identity}}}"
    )


def class_ids(boxes: BoxArray) -> dict[int, int]:
    """Number of boxes by class id."""
    ids, counts = np.unique(boxes["class_id"], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def _no_names(config: PrepConfig, box_files: list[Path]) -> str:
    total: Counter[int] = Counter()
    for path in box_files:
        try:
            total.update(class_ids(read_boxes(path)))
        except BoxesError:
            continue  # reported when the recording is prepared
    counts = dict(sorted(total.items()))
    names = ",".join(f"class_{i}" for i in counts)
    class_map = ",".join(f"{class_id}:{i}" for i, class_id in enumerate(counts))
    message = (
        f"the classes of source {config.source} have no names. Its box files contain class ids "
        f"{_listed(counts) or '(none)'}. Name them, for example 'dataset.classes=[{names}]' "
        f"'dataset.labels.class_map={{{class_map}}}', or write a name per line, of class 0, 1, "
        f"..., to {CLASSES_FILE} in the source; or choose a known dataset: dataset=NAME of "
        f"{DATASETS}"
    )
    output = Path(config.output)
    if (output / MANIFEST).is_file():
        known = load_manifest(output)
        message += (
            f". {output} was prepared with dataset={known.config['dataset']['name']}, classes "
            f"{known.classes}"
        )
    return message


def _listed(counts: dict[int, int]) -> str:
    """'0 (12 boxes), 3 (1 box)'."""
    most = 10
    parts = []
    for class_id, number in list(counts.items())[:most]:
        parts.append(
            f"{class_id} ({number} box)" if number == 1 else f"{class_id} ({number} boxes)"
        )
    if len(counts) > most:
        parts.append(f"and {len(counts) - most} more")
    return ", ".join(parts)
