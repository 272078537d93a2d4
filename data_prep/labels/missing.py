"""Recordings without labels: what is missing, and the commands that make labels."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from evspan.conf.text import plural, printable
from evspan.data_prep.labels.box_files import BOXES_ENDING, recording_name
from evspan.data_prep.shards.format import SPLITS

LEARNING_SPLITS = ("train", "val")  # where a recording without boxes is a surprise
NAMED = 3  # recordings that a line names


def missing_labels(
    recordings: Iterable[tuple[str, Path]], source: Path, *, any_labelled: bool
) -> dict[str, str]:
    """One line, by split, for each split with recordings that have no box file.

    Args:
        recordings: split and path of those that have none.
        source: what prep reads.
        any_labelled: other recordings of the source have one; then those of test/ are not missed.
    """
    by_split: dict[str, list[Path]] = {}
    for split, path in recordings:
        by_split.setdefault(split, []).append(path)
    lines = {}
    for split in SPLITS:
        paths = by_split.get(split, [])
        if paths and (split in LEARNING_SPLITS or not any_labelled):
            lines[split] = f"{split}: {_problem(split, paths)}. {_remedy(split, paths, source)}"
    return lines


def _problem(split: str, paths: Sequence[Path]) -> str:
    names = [printable(recording_name(path)) for path in paths[:NAMED]]
    listed = ", ".join(names)
    if len(paths) > NAMED:
        listed += f" and {len(paths) - NAMED} more"
    pronoun = "it" if len(paths) == 1 else "them"
    effect = f"only inference can use {pronoun}"
    if split == "train":
        effect = f"nothing is learned from {pronoun}"
    elif split == "val":
        effect = f"nothing is scored on {pronoun}"
    return (
        f"{plural(len(paths), 'recording')} without a box file ({names[0]}{BOXES_ENDING} next to "
        f"{printable(paths[0].name)}): {listed}; {effect}"
    )


def _remedy(split: str, paths: Sequence[Path], source: Path) -> str:
    path = printable(str(paths[0]))
    folder = printable(str(paths[0].parent))
    return (
        f"To label: evspan labels export {path} PICTURES draws images for a labelling tool, and "
        f"evspan labels import FILE {folder} reads what it saves (COCO, YOLO, VOC, CVAT, CSV, "
        f"MOT); evspan labels pseudo RUN {printable(str(source))} OUT --split {split} lets a "
        "trained detector label them"
    )
