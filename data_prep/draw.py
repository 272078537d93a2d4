"""Draws frames and boxes as RGB images, and writes sheets and animations of them."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from evspan.conf.errors import UserError
from numpy.typing import ArrayLike, NDArray
from PIL import GifImagePlugin, Image, ImageDraw, ImageFont

BACKGROUND = np.array((255, 255, 255), np.float32)
ON = np.array((30, 60, 200), np.float32)
OFF = np.array((225, 40, 35), np.float32)
FAINTEST = 0.5  # how far a single event differs from the background, 0..1
SATURATED = 4  # events of a pixel from which on colours get no stronger
GIF_COLOURS = 128
MAX_GIF_HUNDREDTHS = 65_535  # of a second that a frame of a GIF can last: a field of 16 bits
SHEET_GAP = 2  # pixels between the images of a sheet
SHEET_GREY = 90
ANIMATION_SUFFIXES = (".gif", ".mp4")

RGB = NDArray[np.uint8]  # (H, W, 3)
Colour = tuple[int, int, int]
NOTE_COLOR: Colour = (90, 90, 90)


def frame_to_rgb(frame: NDArray[np.uint8]) -> RGB:
    """Draws the events of a frame on white: ON blue, OFF red, both violet; more events, stronger.

    Args:
        frame: (2 * bins, H, W) counts; the first half of the channels is polarity 0.

    Returns:
        (H, W, 3) uint8.
    """
    per_polarity = frame.reshape(2, -1, *frame.shape[1:]).sum(1, dtype=np.int32)
    off, on = per_polarity.astype(np.float32)
    count = on + off
    strength = np.minimum(FAINTEST + (1 - FAINTEST) * (count - 1) / (SATURATED - 1), 1)
    strength = np.where(count > 0, strength, 0)[..., None]
    on_fraction = (on / np.maximum(count, 1))[..., None]
    colour = on_fraction * ON + (1 - on_fraction) * OFF
    rgb = BACKGROUND + strength * (colour - BACKGROUND)
    return np.asarray(rgb).astype(np.uint8)


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
    colors: Sequence[Colour] | None = None,
) -> RGB:
    """Draws outlines with labels above them (inside where there is no space above), on a copy.

    Args:
        rgb: (H, W, 3) uint8.
        boxes_xyxy: (N, 4) left, top, right, bottom in pixels of `rgb`. What lies outside of it is
            cut; a box with a NaN, as an untrained network may give, is left out.
        labels: N texts; empty ones are not drawn.
        upscale: whole number by which the image is enlarged first.
        colors: N, one per box; None: all have `color`.

    Returns:
        (H * upscale, W * upscale, 3) uint8.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4) * upscale
    if upscale > 1:
        rgb = rgb.repeat(upscale, axis=0).repeat(upscale, axis=1)
    image = Image.fromarray(np.ascontiguousarray(rgb))
    pen = ImageDraw.Draw(image)
    line_width = 1 + image.height // 500
    beyond = 2 * line_width  # so that a cut edge is not seen
    limits = np.asarray([image.width, image.height] * 2) + beyond
    texts = labels if labels is not None else [""] * len(boxes)
    box_colors = colors if colors is not None else [color] * len(boxes)
    for box, text, box_color in zip(boxes, texts, box_colors, strict=True):
        if np.isnan(box).any():
            continue
        left, top, right, bottom = np.clip(np.round(box), -beyond, limits).astype(int).tolist()
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        pen.rectangle(corners, outline=box_color, width=line_width)
        if text:
            _write(pen, image, left, top, text, box_color)
    return np.asarray(image)


def draw_legend(rgb: RGB, entries: Sequence[tuple[str, Colour]]) -> RGB:
    """Writes names on their colours into the lower right corner, the first on top, on a copy.

    Where there is no space for all, the last names are below the line "and 12 more".

    Args:
        rgb: (H, W, 3) uint8.
        entries: names with their colours.
    """
    image = Image.fromarray(np.ascontiguousarray(rgb))
    pen = ImageDraw.Draw(image)
    bottom = image.height
    for index in range(len(entries) - 1, -1, -1):
        text, color = entries[index]
        space = bottom
        if index:  # space for the line in place of the names above
            space -= _text_ground(pen, image, f"and {index} more").height
        if _text_ground(pen, image, text).height > space:
            text = f"and {index + 1} more"
            if _text_ground(pen, image, text).height <= bottom:
                _write(pen, image, image.width, bottom, text, NOTE_COLOR)
            break
        bottom = _write(pen, image, image.width, bottom, text, color)
    return np.asarray(image)


def draw_label(rgb: RGB, text: str, color: Colour = NOTE_COLOR) -> RGB:
    """Writes a text into the lower left corner of an image (H, W, 3), on a copy."""
    image = Image.fromarray(np.ascontiguousarray(rgb))
    _write(ImageDraw.Draw(image), image, 0, image.height, text, color)
    return np.asarray(image)


def _write(
    pen: ImageDraw.ImageDraw, image: Image.Image, left: int, bottom: int, text: str, color: Colour
) -> int:
    """Writes white text on a coloured ground that ends at `bottom`. Returns the ground's top."""
    ground = _text_ground(pen, image, text)
    x = max(0, min(left, image.width - ground.width))
    y = bottom - ground.height
    if y < 0:  # no space above: write inside the box
        y = bottom + 1
    pen.rectangle((x, y, x + ground.width - 1, y + ground.height - 1), fill=color)
    pen.text((x + 1, y), text, fill=(255, 255, 255), font=_font(image))
    return y


class _Size(NamedTuple):
    """Of a rectangle, in pixels."""

    width: int
    height: int


def _text_ground(pen: ImageDraw.ImageDraw, image: Image.Image, text: str) -> _Size:
    """The size of a text with the ground that it is written on."""
    _, _, right, bottom = pen.textbbox((0, 0), text, font=_font(image))
    return _Size(int(right) + 3, int(bottom) + 2)


def _font(image: Image.Image) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=max(9, min(16, image.height // 30)))


def write_strip(path: str | Path, images: Sequence[RGB], columns: int = 0) -> None:
    """Writes a sheet of images as PNG, row by row, with thin lines between them.

    Args:
        images: (H, W, 3) uint8 each, of equal size.
        columns: images of a row; 0: as many as make the sheet about as wide as it is high.
    """
    height, width, _ = images[0].shape
    columns = columns or max(1, round((len(images) * height / width) ** 0.5))
    rows = -(-len(images) // columns)
    row_height = height + SHEET_GAP
    column_width = width + SHEET_GAP
    sheet_size = (rows * row_height - SHEET_GAP, columns * column_width - SHEET_GAP, 3)
    sheet = np.full(sheet_size, SHEET_GREY, np.uint8)
    for i, image in enumerate(images):
        y = i // columns * row_height
        x = i % columns * column_width
        sheet[y : y + height, x : x + width] = image
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, "PNG")


class _Encoder(Protocol):
    """Writes a file frame by frame."""

    def add(self, rgb: RGB, index: int) -> None: ...

    def close(self, frames: int) -> None: ...

    def abandon(self) -> None:
        """Ends without a file."""


class AnimationWriter:
    """Writes a `.gif` or `.mp4` frame by frame: memory does not grow with its length.

    Raises:
        UserError: another suffix, or `.mp4` without the program ffmpeg.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path = Path(path)
        self.fps = fps
        self.frames = 0
        self.shape: tuple[int, ...] = ()
        suffix = self.path.suffix.lower()
        if suffix not in ANIMATION_SUFFIXES:
            raise UserError(f"{path} is neither .gif nor .mp4; give the animation such a name")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._encoder: _Encoder
        if suffix == ".gif":
            self._encoder = _Gif(self.path, fps)
        else:
            self._encoder = _Mp4(self.path, fps)

    def add(self, rgb: RGB) -> None:
        """Appends a frame (H, W, 3) uint8; all frames have one size."""
        if self.frames and rgb.shape != self.shape:
            raise ValueError(
                f"frame {self.frames} of {self.path} has shape {rgb.shape}, "
                f"those before {self.shape}"
            )
        self.shape = rgb.shape
        self._encoder.add(np.ascontiguousarray(rgb), self.frames)
        self.frames += 1

    def close(self) -> None:
        """Completes the file."""
        self._encoder.close(self.frames)

    def __enter__(self) -> "AnimationWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._encoder.abandon()


class _Gif:
    """Encodes each frame at once. Pillow's own `save(append_images=...)` keeps all in memory.

    GIF counts in hundredths of a second. Frames end at rounded times, which keeps the total right
    at any rate. Above 100 frames per second, a frame that would end with the one before it is left
    out. A frame lasts MAX_GIF_HUNDREDTHS at most.
    """

    LOOP_FOREVER = b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps
        self.file = path.open("wb")
        self.written_hundredths = 0  # sum of the durations so far

    def add(self, rgb: RGB, index: int) -> None:
        duration = round(100 * (index + 1) / self.fps) - self.written_hundredths
        if duration < 1 and index > 0:
            return
        duration = min(max(1, duration), MAX_GIF_HUNDREDTHS)
        self.written_hundredths += duration
        image = Image.fromarray(rgb).quantize(
            GIF_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
        if index == 0:
            for part in GifImagePlugin.getheader(image.copy())[0]:
                self.file.write(part)
            self.file.write(self.LOOP_FOREVER)
        parts = GifImagePlugin.getdata(image, duration=10 * duration, include_color_table=True)
        for part in parts:
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
    """H.264 through a pipe to the program ffmpeg."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps
        self.process: subprocess.Popen[bytes] | None = None
        # A file, since a full pipe of messages would stop ffmpeg.
        self.log: IO[Any] = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        try:
            subprocess.run(
                ["ffmpeg", "-version"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: MP4 needs the program ffmpeg, which is not there. Install the Debian "
                f"package ffmpeg, or write {path.with_suffix('.gif').name}"
            ) from error

    def _start(self, height: int, width: int) -> "subprocess.Popen[bytes]":
        source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {self.fps} -i -"
        even_sides = "-vf pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white"  # yuv420p halves both
        codec = "-c:v libx264 -preset veryfast -crf 20 -threads 2 -pix_fmt yuv420p"
        options = f"-y -loglevel error {source} {even_sides} {codec} -movflags +faststart"
        return subprocess.Popen(
            ["ffmpeg", *options.split(), str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.log,
        )

    def add(self, rgb: RGB, index: int) -> None:
        if self.process is None:
            height, width, _ = rgb.shape
            self.process = self._start(height, width)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(rgb.tobytes())
        except BrokenPipeError:
            self._fail(self.process)

    def close(self, frames: int) -> None:
        if self.process is None:
            return
        _close_input(self.process)
        if self.process.wait():
            self._fail(self.process)
        self.log.close()

    def _fail(self, process: "subprocess.Popen[bytes]") -> None:
        code = process.wait()
        self.log.seek(0)
        messages = self.log.read().decode(errors="replace").strip().splitlines()
        message = messages[-1] if messages else "no message"
        self.abandon()
        raise UserError(
            f"{self.path}: ffmpeg ended with code {code}: {message}. Write a .gif instead"
        )

    def abandon(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            _close_input(self.process)
        if self.path.is_file():
            self.path.unlink()


def _close_input(process: "subprocess.Popen[bytes]") -> None:
    """Closes the pipe to a process that may have ended."""
    assert process.stdin is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass
