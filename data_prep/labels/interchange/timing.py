"""The recording and the time of each picture, in microseconds on the recording's clock."""

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.conf.text import printable
from evspan.data_prep.labels.interchange.annotations import (
    LabelsError,
    Picture,
    read_text,
    require_few_pictures,
    shown,
    whole,
)
from evspan.data_prep.labels.interchange.images import image_names, timed_images
from evspan.data_prep.labels.interchange.names import own_prefixes, parse_frame_name

FRAME_LIST = "frames.csv"  # next to formats without names: the image of each frame number
FRAME_LIST_HEADING = ["frame", "name"]
MOST_TIME_US = 2**52


@dataclass(frozen=True)
class Timing:
    """What is added to the files' own times. None: it is not given.

    period_us: between two frames. offset_us: the time of frame 0, or what is added to times.
    """

    period_us: float | None = None
    offset_us: int = 0

    def of_index(self, index: int) -> int | None:
        """The time of a frame by its number; None without a period."""
        if self.period_us is None:
            return None
        return self.offset_us + round(index * self.period_us)


class PictureTimes:
    """Finds the recording and the time of pictures that were read together."""

    def __init__(
        self,
        path: Path,
        name: str,
        timing: Timing,
        *,
        images: Path | None,
        recording: str,
        own: Collection[str] = (),
    ) -> None:
        """Finds the images' names that numbers of frames stand for.

        Args:
            path: of the labels; the images' names may be next to it.
            name: of the recording, where neither the pictures nor the command names it.
            images: folder of the labelled images.
            recording: name that the command gives; it replaces all others.
            own: prefixes that belong to names of recordings; see `own_prefixes`.
        """
        self.path = path
        self.name = name
        self.timing = timing
        self.recording = recording
        self.names: set[str] = set()  # recordings that pictures name
        self.images = image_names(images) if images else _names_next_to(path)
        self.own = {*own, *own_prefixes(self.images, ())}

    def locate(self, picture: Picture) -> tuple[str, int]:
        """(recording, time in microseconds) of a picture.

        Raises:
            LabelsError: the time is not known; the message names the options that give it.
        """
        named = parse_frame_name(picture.name, self.own) if picture.name else None
        index = picture.frame
        time_us = picture.time_us
        recording = picture.recording
        if named is not None:
            recording = recording or named.recording
            time_us = named.time_us if time_us is None else time_us
            index = named.frame if index is None else index
        if time_us is None and index is not None and index < len(self.images):
            of_image = parse_frame_name(self.images[index], self.own)
            time_us = of_image.time_us
            recording = recording or of_image.recording
        if time_us is not None:
            time_us += self.timing.offset_us
        elif index is not None:
            time_us = self.timing.of_index(index)
        if time_us is None:
            raise LabelsError(self._problem(picture, index))
        if not 0 <= time_us <= MOST_TIME_US:
            raise LabelsError(
                f"{self.path}: a frame is at {time_us} us; times must be from 0 to "
                f"{MOST_TIME_US} us. Correct --offset-us"
            )
        if recording:
            self.names.add(recording)
        return self._checked_name(self.recording or recording or self.name), time_us

    def _problem(self, picture: Picture, index: int | None) -> str:
        if index is None:
            return (
                f"{self.path}: the name {shown(picture.name)} has neither a time nor the number of "
                "a frame. Name images RECORDING_000000050000us.png (microseconds) or "
                "RECORDING_000012.png (frame 12), or import a table (CSV) with a column time_us"
            )
        return (
            f"{self.path}: the times are not known, only the numbers of frames (frame {index}). "
            "Give --fps N or --frame-ms MS, and --offset-us where frame 0 is not at 0; or "
            "--images FOLDER with the images of evspan labels export, whose names have times"
        )

    def _checked_name(self, name: str) -> str:
        if not name:
            raise UserError(
                f"{self.path} does not name its recording. Give --recording FILE, or a file "
                "X_bbox.npy as OUT"
            )
        if "/" in name or "\\" in name or printable(name) != name or name.strip(".") == "":
            raise LabelsError(f"{self.path}: {shown(name)} cannot be the name of a recording")
        if len(name.encode(errors="replace")) > 200:
            raise LabelsError(f"{self.path}: the name {shown(name)} is too long for a file")
        return name


def _names_next_to(path: Path) -> list[str]:
    """The images' names in the order of frames, from a list or a folder next to the labels."""
    folders = [path] if path.is_dir() else [path.parent]
    if folders[0].name in ("gt", "det"):
        folders.append(folders[0].parent)
    for folder in folders:
        for file in (folder / f"{path.stem}_{FRAME_LIST}", folder / FRAME_LIST):
            if file.is_file() and file != path:
                return read_frame_list(file)
    for folder in folders:
        names = timed_images(folder)
        if names:
            return names
    return []


def read_frame_list(path: Path) -> list[str]:
    """The images' names of frame 0, 1, ..., from frames.csv; empty for missing numbers.

    Raises:
        LabelsError: it is no such list.
    """
    names: dict[int, str] = {}
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if not row or row == FRAME_LIST_HEADING:
                continue
            if len(row) != 2:
                raise LabelsError(f"{place} is not `frame,name`. Delete or correct the file")
            names[whole(row[0], place, "the frame")] = row[1]
    except csv.Error as error:
        raise LabelsError(f"{path}: {error}. Delete or correct the file") from error
    count = max(names, default=-1) + 1
    require_few_pictures(count, path)
    return [names.get(i, "") for i in range(count)]


def write_frame_list(path: Path, names: Sequence[str]) -> None:
    """Writes frames.csv: the image of each frame number, from 0 on."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FRAME_LIST_HEADING)
        writer.writerows(_numbered(names))


def _numbered(names: Sequence[str]) -> Iterator[list[str]]:
    for i, name in enumerate(names):
        yield [str(i), name]
