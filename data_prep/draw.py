"""Frames and boxes as pictures and animations."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from evspan.conf.errors import UserError
from numpy.typing import ArrayLike, NDArray
from PIL import GifImagePlugin, Image, ImageDraw, ImageFont

BACKGROUND, ON, OFF = (
    np.array(c, np.float32) for c in ((255, 255, 255), (30, 60, 200), (225, 40, 35))
)
FAINTEST = 0.5  # how far a single event stands out from the background
SATURATED = 4  # events of a pixel from which on colours get no stronger
GIF_COLOURS = 128
ANIMATION_SUFFIXES = (".gif", ".mp4")

RGB = NDArray[np.uint8]  # (H, W, 3)
Colour = tuple[int, int, int]


def frame_to_rgb(frame: NDArray[np.uint8]) -> RGB:
    """(2 * bins, H, W) counts -> (H, W, 3): ON blue, OFF red, both violet; the more events the stronger, on white."""
    off, on = frame.reshape(2, -1, *frame.shape[1:]).sum(1, dtype=np.int32).astype(np.float32)
    count = on + off
    strength = np.where(
        count > 0, np.minimum(FAINTEST + (1 - FAINTEST) * (count - 1) / (SATURATED - 1), 1), 0
    )[..., None]
    brighter = (on / np.maximum(count, 1))[..., None]
    colour = brighter * ON + (1 - brighter) * OFF
    return (BACKGROUND + strength * (colour - BACKGROUND)).astype(np.uint8)


def box_corners(boxes: NDArray[np.void]) -> NDArray[np.float64]:
    """Corners of boxes with the fields x, y (top left), w and h.

    Args:
        boxes: (N,) structured array, as in a box file or a shard.

    Returns:
        (N, 4) left, top, right, bottom.
    """
    right = boxes["x"] + boxes["w"]
    bottom = boxes["y"] + boxes["h"]
    return np.stack((boxes["x"], boxes["y"], right, bottom), axis=1).astype(np.float64)


def draw_boxes(
    rgb: RGB,
    boxes_xyxy: ArrayLike,
    labels: Sequence[str] | None = None,
    color: Colour = (0, 150, 0),
    upscale: int = 1,
) -> RGB:
    """Outlines with labels above them (below the top where there is no room), on a copy.

    Args:
        boxes_xyxy: (N, 4) left, top, right, bottom in pixels of `rgb`. upscale: enlarge the picture by a whole number first.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4) * upscale
    enlarged = (
        rgb.repeat(upscale, 0).repeat(upscale, 1) if upscale > 1 else np.ascontiguousarray(rgb)
    )
    picture = Image.fromarray(enlarged)
    pen = ImageDraw.Draw(picture)
    for box, label in zip(boxes, labels if labels is not None else [""] * len(boxes), strict=True):
        left, top, right, bottom = np.round(box).astype(int).tolist()
        pen.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)),
            outline=color,
            width=1 + picture.height // 500,
        )
        if label:
            _write(pen, picture, left, top, label, color)
    return np.asarray(picture)


def draw_label(rgb: RGB, text: str, color: Colour = (90, 90, 90)) -> RGB:
    """Text in the lower left corner, on a copy."""
    picture = Image.fromarray(np.ascontiguousarray(rgb))
    _write(ImageDraw.Draw(picture), picture, 0, picture.height, text, color)
    return np.asarray(picture)


def _write(
    pen: ImageDraw.ImageDraw, picture: Image.Image, left: int, bottom: int, text: str, color: Colour
) -> None:
    font = ImageFont.load_default(size=max(9, min(16, picture.height // 30)))
    _, _, width, height = (int(v) for v in pen.textbbox((0, 0), text, font=font))
    x = max(0, min(left, picture.width - width - 3))
    y = (
        bottom - height - 2 if bottom >= height + 2 else bottom + 1
    )  # inside the box where there is no room above
    pen.rectangle((x, y, x + width + 2, y + height + 1), fill=color)
    pen.text((x + 1, y), text, fill=(255, 255, 255), font=font)


def write_strip(path: str | Path, pictures: Sequence[RGB], columns: int = 0) -> None:
    """One picture of pictures of equal size, row by row, a thin line between them. columns 0: about as wide as high."""
    height, width, _ = pictures[0].shape
    columns = columns or max(1, round((len(pictures) * height / width) ** 0.5))
    rows = -(-len(pictures) // columns)
    gap = 2
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 90, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = picture
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, "PNG")


class AnimationWriter:
    """`.gif` or `.mp4`, chosen by suffix, written frame by frame: memory does not grow with its length.

    Raises:
        UserError: another suffix, or `.mp4` without the program ffmpeg.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path, self.fps, self.frames = Path(path), fps, 0
        self.shape: tuple[int, ...] = ()
        kinds: dict[str, type[_Gif] | type[_Mp4]] = {".gif": _Gif, ".mp4": _Mp4}
        if self.path.suffix.lower() not in kinds:
            raise UserError(f"{path} is neither .gif nor .mp4; name the animation so")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._encoder = kinds[self.path.suffix.lower()](self.path, fps)

    def add(self, rgb: RGB) -> None:
        """The next frame, (H, W, 3) uint8, all of one size."""
        if self.frames and rgb.shape != self.shape:
            raise ValueError(
                f"frame {self.frames} of {self.path} has shape {rgb.shape}, those before {self.shape}"
            )
        self.shape = rgb.shape
        self._encoder.add(np.ascontiguousarray(rgb), self.frames)
        self.frames += 1

    def close(self) -> None:
        self._encoder.close(self.frames)

    def __enter__(self) -> "AnimationWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._encoder.abandon()


class _Gif:
    """Pillow's own `save(append_images=...)` keeps every frame; here each is encoded and written at once."""

    FOREVER = b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self.file = path.open("wb")

    def add(self, rgb: RGB, index: int) -> None:
        picture = Image.fromarray(rgb).quantize(
            GIF_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
        if index == 0:
            for part in GifImagePlugin.getheader(picture.copy())[0]:
                self.file.write(part)
            self.file.write(self.FOREVER)
        # GIF counts in hundredths: differences of rounded ends keep the total right at any rate.
        hundredths = round(100 * (index + 1) / self.fps) - round(100 * index / self.fps)
        for part in GifImagePlugin.getdata(
            picture, duration=10 * max(1, hundredths), include_color_table=True
        ):
            self.file.write(part)

    def close(self, frames: int) -> None:
        self.file.write(b";")
        self.file.close()
        if not frames:
            self.abandon()

    def abandon(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


class _Mp4:
    """H.264 through the program ffmpeg, fed by a pipe."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self.process: subprocess.Popen[bytes] | None = None
        self.log: IO[Any] = tempfile.TemporaryFile()  # noqa: SIM115  a full pipe of messages would stop ffmpeg
        try:
            subprocess.run(
                ["ffmpeg", "-version"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: MP4 needs the program ffmpeg, which is not there. Install the Debian package ffmpeg, "
                f"or write {path.with_suffix('.gif').name}"
            ) from error

    def _start(self, height: int, width: int) -> "subprocess.Popen[bytes]":
        source = [
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-s",
            f"{width}x{height}",
            "-r",
            str(self.fps),
            "-i",
            "-",
        ]
        even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white"]  # yuv420p halves both sides
        codec = [
            "-c:v",
            "libx264",
            "-preset",
            "veryfast",
            "-crf",
            "20",
            "-threads",
            "2",
            "-pix_fmt",
            "yuv420p",
        ]
        command = [
            "ffmpeg",
            "-y",
            "-loglevel",
            "error",
            *source,
            *even,
            *codec,
            "-movflags",
            "+faststart",
            str(self.path),
        ]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.log
        )

    def add(self, rgb: RGB, index: int) -> None:
        if self.process is None:
            self.process = self._start(*rgb.shape[:2])
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(rgb.tobytes())
        except BrokenPipeError:
            self._failed()

    def close(self, frames: int) -> None:
        if self.process is None:
            return
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        if self.process.wait():
            self._failed()
        self.log.close()

    def _failed(self) -> None:
        assert self.process is not None
        code = self.process.wait()
        self.log.seek(0)
        told = self.log.read().decode(errors="replace").strip().splitlines()
        self.abandon()
        raise UserError(
            f"{self.path}: ffmpeg ended with code {code}: {told[-1] if told else 'no message'}. Write a .gif instead"
        )

    def abandon(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdin is not None:
                try:
                    self.process.stdin.close()
                except BrokenPipeError:
                    pass
        if self.path.is_file():
            self.path.unlink()
