"""Names of frame images: the recording, and the time in microseconds or the number of the frame.

Evspan names a frame `drive_000000050000us.png`: the recording, and the end of the frame's window
on the recording's clock. What labelling tools add to names is removed.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

TIME = re.compile(r"(?:^|[_-])(\d{1,18})us(?![A-Za-z0-9])")
INDEX = re.compile(r"(?:frame)?[_\-. ]?(\d{1,15})$", re.IGNORECASE)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# Prefixes of Label Studio, which differ from image to image: `0a1b2c3d__` of images that it
# downloads for an export, and behind it `0a1b2c3d-` of uploads. A date is a recording's own.
LABEL_STUDIO = (
    re.compile(r"^(?:[0-9a-f]{6}|[0-9a-f]{8})__"),
    re.compile(r"^(?!(?:19|20)\d{6}-)[0-9a-f]{8}-"),
)
ROBOFLOW = re.compile(r"[_.](?:png|jpe?g|bmp)\.rf\.[0-9A-Za-z]+$")
# Folders that labelling tools make; any other one names the recording of its images.
FOLDERS = {
    "annotations",
    "data",
    "default",
    "frames",
    "images",
    "img1",
    "jpegimages",
    "labels",
    "obj_test_data",
    "obj_train_data",
    "obj_valid_data",
    "test",
    "train",
    "val",
    "valid",
    "",
}


class FrameName(NamedTuple):
    """What the name of an image contains. recording: empty if it is not named."""

    recording: str
    time_us: int | None = None
    frame: int | None = None


def frame_file(recording: str, time_us: int) -> str:
    """The name of a frame's image, which `parse_frame_name` reads."""
    return f"{recording}_{time_us:012d}us.png"


def image_stem(name: str) -> str:
    """The name without folders, the suffix of an image and what labelling tools added."""
    stem = PurePosixPath(name.replace("\\", "/")).name
    for suffix in IMAGE_SUFFIXES:
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
            break
    return ROBOFLOW.sub("", stem)


def own_prefixes(names: Iterable[str], recordings: Iterable[str]) -> set[str]:
    """Prefixes that look like Label Studio's and belong to the names of recordings.

    They are those that several images share, and those of known recordings.

    Args:
        names: of all images that are read together.
        recordings: names of known recordings.
    """
    recordings = list(recordings)
    own: set[str] = set()
    for pattern in LABEL_STUDIO:
        own.update(_prefixes(recordings, pattern))
    stems = {image_stem(name) for name in names}
    for pattern in LABEL_STUDIO:
        images = _prefixes(stems, pattern)
        own.update(prefix for prefix, count in images.items() if count > 1)
        stems = {_without_prefix(stem, pattern, own) for stem in stems}
    return own


def _prefixes(names: Iterable[str], pattern: re.Pattern[str]) -> Counter[str]:
    """How many of the names have each prefix."""
    counts: Counter[str] = Counter()
    for name in names:
        match = pattern.match(name)
        if match:
            counts[match[0]] += 1
    return counts


def _without_prefix(stem: str, pattern: re.Pattern[str], own: Collection[str]) -> str:
    match = pattern.match(stem)
    if match is None or match[0] in own:
        return stem
    return stem[match.end() :]


def parse_frame_name(name: str, own: Collection[str] = ()) -> FrameName:
    """Reads the recording, and the time or the number of the frame, from an image's name.

    Args:
        own: prefixes that `own_prefixes` returns, which stay.
    """
    stem = image_stem(name)
    for pattern in LABEL_STUDIO:
        stem = _without_prefix(stem, pattern, own)
    times = list(TIME.finditer(stem))
    if times:
        recording = stem[: times[-1].start()]
        return FrameName(recording or _folder(name), time_us=int(times[-1][1]))
    if match := INDEX.search(stem):
        recording = stem[: match.start()].rstrip("_-. ")
        return FrameName(recording or _folder(name), frame=int(match[1]))
    return FrameName(stem)


def _folder(name: str) -> str:
    """The folder of the image where it can name a recording."""
    folder = PurePosixPath(name.replace("\\", "/")).parent.name
    if folder.lower() in FOLDERS or folder in (".", ".."):
        return ""
    return folder
