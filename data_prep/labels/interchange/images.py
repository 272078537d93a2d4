"""Folders of images next to labels: names in order, and sizes from the files' headers."""

import os
import warnings
from pathlib import Path

from evspan.data_prep.labels.interchange.annotations import (
    MOST_FILES,
    MOST_SIDE,
    LabelsError,
    require_regular,
)
from evspan.data_prep.labels.interchange.names import IMAGE_SUFFIXES, image_stem, parse_frame_name
from PIL import Image

IMAGE_FOLDERS = ("images", "img1", "JPEGImages")


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The visible files with one of these endings in a folder and below, sorted by path.

    Links to folders are not followed.

    Raises:
        LabelsError: there are more than `MOST_FILES` files.
    """
    found: list[Path] = []
    count = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        count += len(names)
        if count > MOST_FILES:
            raise LabelsError(f"{folder} has more than {MOST_FILES} files. Give a smaller folder")
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                found.append(Path(parent, name))
    return sorted(found)


def image_names(folder: Path) -> list[str]:
    """The names of the images in a folder and below, in the order of labelling tools: by name."""
    return [path.name for path in files_below(folder, IMAGE_SUFFIXES)]


def image_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """(width, height) of the images in a folder and below, by the stem of their names.

    Raises:
        LabelsError: a file is no image.
        OSError: a file cannot be read.
    """
    sizes = {}
    for path in files_below(folder, IMAGE_SUFFIXES):
        sizes[image_stem(path.name)] = image_size(path)
    return sizes


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image, from its header.

    Raises:
        LabelsError: the file is no image.
    """
    require_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are not decoded
            with Image.open(path) as image:
                size = image.size
    except Exception as error:  # a damaged header makes Pillow raise a dozen types
        if isinstance(error, OSError) and error.errno:
            raise
        raise LabelsError(f"{path} is no image that can be read. Remove or replace it") from error
    if not 0 < min(size) <= max(size) <= MOST_SIDE:
        raise LabelsError(f"{path} is an image of {size[0]} x {size[1]} pixels. Replace it")
    return size


def timed_images(folder: Path) -> list[str]:
    """Names of images next to a file of labels that contain the times of the frames, in order.

    Empty where there are none, or where a name has no time.
    """
    for name in IMAGE_FOLDERS:
        if (folder / name).is_dir():
            names = image_names(folder / name)
            if names and all(parse_frame_name(n).time_us is not None for n in names):
                return names
    return []
