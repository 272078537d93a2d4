"""Drawn frames and boxes: their pixels."""

import os
import shutil
import subprocess
from itertools import pairwise

import numpy as np
import pytest
from evspan.conf.errors import UserError
from evspan.data_prep.draw import (
    BACKGROUND,
    NOTE_COLOR,
    OFF,
    ON,
    AnimationWriter,
    draw_boxes,
    draw_label,
    draw_legend,
    frame_to_rgb,
    write_strip,
)
from PIL import Image, ImageSequence
from PIL.GifImagePlugin import GifImageFile

WHITE = (255, 255, 255)
GREEN = (0, 150, 0)


def frame_of(
    counts: dict[tuple[int, int, int], int], bins: int = 2, height: int = 8, width: int = 10
) -> np.ndarray:
    frame = np.zeros((2 * bins, height, width), np.uint8)
    for cell, count in counts.items():
        frame[cell] = count
    return frame


def colour_at(rgb, y, x) -> tuple[int, ...]:
    return tuple(rgb[y, x].tolist())


# -- frames ---------------------------------------------------------------------------------------
def test_darker_is_red_brighter_blue_both_violet_and_nothing_white():
    darker = {(0, 1, 1): 4, (1, 1, 2): 4}  # channels 0 and 1: polarity 0, both time bins
    brighter = {(2, 2, 1): 4, (3, 2, 2): 255}
    both = {(0, 3, 3): 5, (3, 3, 3): 5}
    rgb = frame_to_rgb(frame_of({**darker, **brighter, **both}))
    assert rgb.shape == (8, 10, 3)
    assert rgb.dtype == np.uint8
    assert colour_at(rgb, 1, 1) == colour_at(rgb, 1, 2) == tuple(OFF)
    assert colour_at(rgb, 2, 1) == colour_at(rgb, 2, 2) == tuple(ON)
    assert colour_at(rgb, 3, 3) == tuple(((ON + OFF) / 2).astype(int))
    assert (rgb.reshape(-1, 3) == WHITE).all(1).sum() == 80 - 5


def test_more_events_are_stronger_up_to_four_and_one_is_visible():
    shades = [frame_to_rgb(frame_of({(2, 0, 0): n}))[0, 0].astype(int) for n in (0, 1, 2, 3, 4, 9)]
    distance = [np.abs(shade - BACKGROUND).sum() for shade in shades]
    assert distance[0] == 0
    assert distance[1] > 0.4 * distance[-1]
    assert distance[4] == distance[5]
    assert all(a < b for a, b in pairwise(distance[:5]))


# -- boxes ----------------------------------------------------------------------------------------
def outline(left, top, right, bottom) -> set[tuple[int, int]]:
    return {
        (y, x)
        for y in range(top, bottom)
        for x in range(left, right)
        if y in (top, bottom - 1) or x in (left, right - 1)
    }


def painted(rgb, color) -> set[tuple[int, int]]:
    return {(int(y), int(x)) for y, x in np.argwhere((rgb == color).all(2))}


def blank(height=40, width=60) -> np.ndarray:
    return np.full((height, width, 3), 255, np.uint8)


def test_a_box_is_outlined_where_it_is_and_the_input_stays():
    image = blank()
    drawn = draw_boxes(image, np.array([[5, 10, 25, 30], [30.4, 9.6, 41.6, 20.2]]))
    assert painted(drawn, GREEN) == outline(5, 10, 25, 30) | outline(30, 10, 42, 20)
    assert (image == 255).all()
    assert painted(draw_boxes(image, [[1, 2, 9, 9]], color=(1, 2, 3)), (1, 2, 3)) == outline(
        1, 2, 9, 9
    )


def test_upscaled_pixels_are_squares_and_boxes_scale_with_them():
    image = blank()
    image[7, 9] = (1, 2, 3)
    drawn = draw_boxes(image, [[5, 10, 25, 30]], upscale=3)
    assert drawn.shape == (120, 180, 3)
    assert painted(drawn, (1, 2, 3)) == {(y, x) for y in range(21, 24) for x in range(27, 30)}
    assert painted(drawn, GREEN) == outline(15, 30, 75, 90)


def test_boxes_outside_the_image_and_boxes_without_extent():
    drawn = draw_boxes(blank(), [[-20, -20, 10, 10], [50, 30, 90, 90]])
    both = outline(-20, -20, 10, 10) | outline(50, 30, 90, 90)
    assert painted(drawn, GREEN) == {(y, x) for y, x in both if 0 <= y < 40 and 0 <= x < 60}
    assert (20, 30) in painted(draw_boxes(blank(), [[30, 20, 30, 20]]), GREEN)
    np.testing.assert_array_equal(draw_boxes(blank(), np.zeros((0, 4))), blank())


@pytest.mark.filterwarnings("error")
def test_boxes_without_end_are_cut_and_boxes_without_position_left_out():
    drawn = draw_boxes(blank(), [[-np.inf, -np.inf, 10, 10], [np.nan, 0, 5, 5], [0, 0, 1e30, 1e30]])
    assert np.array_equal(drawn, draw_boxes(blank(), [[-20, -20, 10, 10], [0, 0, 200, 200]]))


def test_a_label_is_above_its_box_or_inside_where_there_is_no_space():
    low = draw_boxes(blank(100, 200), [[20, 50, 120, 90]], ["car"])
    above = painted(low, GREEN) - outline(20, 50, 120, 90)
    assert above
    assert max(y for y, _ in above) <= 50
    assert min(x for _, x in above) == 20
    high = draw_boxes(blank(100, 200), [[20, 2, 120, 90]], ["car"])
    inside = painted(high, GREEN) - outline(20, 2, 120, 90)
    assert inside
    assert min(y for y, _ in inside) >= 2
    assert max(y for y, _ in inside) < 30
    right = draw_boxes(blank(100, 200), [[195, 50, 199, 90]], ["pedestrian"])
    assert min(x for _, x in painted(right, GREEN)) < 160  # it is moved into the image
    letters = low[30:50, 20:60]
    assert (letters == 255).all(2).sum() > 5  # white letters on the label's ground


def test_the_number_of_labels_must_be_that_of_the_boxes():
    with pytest.raises(ValueError, match="shorter"):
        draw_boxes(blank(), [[1, 2, 3, 4]], [])


def test_a_note_is_in_the_lower_left_corner():
    noted = draw_label(blank(100, 200), "1.25 s")
    ground = painted(noted, (90, 90, 90))
    assert ground
    assert min(y for y, _ in ground) > 80
    assert min(x for _, x in ground) == 0
    assert max(x for _, x in ground) < 60


def legend_of(count: int) -> list[tuple[str, tuple[int, int, int]]]:
    return [(f"class {i}", (10 + i, 5 * i, 100)) for i in range(count)]


def grey_part(rgb) -> np.ndarray:
    """The rectangle of a text on NOTE_COLOR."""
    ys, xs = np.nonzero((rgb == NOTE_COLOR).all(2))
    return rgb[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def rows_of(rgb, color) -> set[int]:
    return {y for y, _ in painted(rgb, color)}


@pytest.mark.parametrize("count", [3, 40])
def test_names_of_a_legend_are_below_each_other(count):
    entries = legend_of(count)
    drawn = draw_legend(blank(360, 640), entries)
    shown = [color for _, color in entries if painted(drawn, color)]
    assert shown == [color for _, color in entries][-len(shown) :]
    for above, below in pairwise(shown):
        assert max(rows_of(drawn, above)) < min(rows_of(drawn, below))
    assert max(rows_of(drawn, shown[-1])) == 359
    assert (len(shown) == count) == (count == 3)


def test_a_legend_without_space_for_all_names_has_the_number_of_the_others():
    entries = legend_of(40)
    drawn = draw_legend(blank(360, 640), entries)
    shown = [color for _, color in entries if painted(drawn, color)]
    assert 15 < len(shown) < 40

    line = grey_part(drawn)
    expected = draw_label(blank(360, 640), f"and {40 - len(shown)} more")
    np.testing.assert_array_equal(line, grey_part(expected))
    assert max(rows_of(drawn, NOTE_COLOR)) < min(rows_of(drawn, shown[0]))
    assert (draw_legend(blank(8, 60), entries) == 255).all()  # no space for a line


# -- sheets ---------------------------------------------------------------------------------------
def plain(colour, height=20, width=30) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def test_a_sheet_has_its_images_row_by_row(tmp_path):
    colours = [(10 * i, 0, 255 - 10 * i) for i in range(5)]
    write_strip(tmp_path / "new" / "strip.png", [plain(c) for c in colours], columns=3)
    sheet = np.asarray(Image.open(tmp_path / "new" / "strip.png").convert("RGB"))
    assert sheet.shape == (2 * 20 + 2, 3 * 30 + 4, 3)
    for i, colour in enumerate(colours):
        y = i // 3 * 22
        x = i % 3 * 32
        assert (sheet[y : y + 20, x : x + 30] == colour).all()
    assert (sheet[20:22] == 90).all()
    assert (sheet[22:, 64:] == 90).all()


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 1), (12, 3), (16, 3)])
def test_a_sheet_is_about_as_wide_as_high(tmp_path, count, columns):
    write_strip(tmp_path / "sheet.png", [plain((1, 2, 3), 36, 64)] * count)
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width == columns * 66 - 2
    assert height == -(-count // columns) * 38 - 2


# -- animations -----------------------------------------------------------------------------------
def moving(count: int, height=31, width=45):
    """Images of odd size that all differ, one of them all white."""
    for i in range(count):
        image = blank(height, width)
        if i != 2:
            image[5:15, 2 * i : 2 * i + 6] = (200, 30, 30)
        yield image


@pytest.mark.parametrize("fps", [20, 10, 12.5, 30, 60, 7.3])
def test_a_gif_has_every_frame_and_takes_as_long_as_it_should(tmp_path, fps):
    images = list(moving(15))
    with AnimationWriter(tmp_path / "new" / "a.gif", fps) as animation:
        for image in images:
            animation.add(image)
    gif = Image.open(tmp_path / "new" / "a.gif")
    assert isinstance(gif, GifImageFile)
    assert gif.n_frames == 15
    assert gif.size == (45, 31)
    assert gif.info["loop"] == 0
    durations = []
    for shown, image in zip(ImageSequence.Iterator(gif), images, strict=True):
        durations.append(shown.info["duration"])
        np.testing.assert_allclose(np.asarray(shown.convert("RGB")).astype(int), image, atol=8)
    assert sum(durations) == pytest.approx(1000 * 15 / fps, abs=10)
    assert max(durations) - min(durations) <= 10


@pytest.mark.parametrize(("fps", "count"), [(200, 20), (1000, 3), (130, 26)])
def test_a_gif_of_a_high_rate_leaves_out_frames_and_takes_as_long_as_it_should(
    tmp_path, fps, count
):
    write_animation(tmp_path / "a.gif", moving(count), fps)
    durations = durations_of(tmp_path / "a.gif")
    hundredths = max(1, round(100 * count / fps))
    assert durations == [10] * hundredths


def test_a_frame_of_a_gif_lasts_as_long_as_the_format_can_represent(tmp_path):
    write_animation(tmp_path / "a.gif", moving(2), fps=0.001)
    assert durations_of(tmp_path / "a.gif") == [655_350, 655_350]


def durations_of(path) -> list[int]:
    """Milliseconds of each frame."""
    with Image.open(path) as gif:
        return [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]


def write_animation(path, images, fps=20.0):
    with AnimationWriter(path, fps) as animation:
        for image in images:
            animation.add(image)


def write_and_fail(path):
    with AnimationWriter(path, 20) as animation:
        for image in moving(3):
            animation.add(image)
        raise ZeroDivisionError


def test_an_animation_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_and_fail(tmp_path / "a.gif")
    shapes = r"frame 1 of .*b.gif has shape \(10, 60, 3\), those before \(40, 60, 3\)"
    with pytest.raises(ValueError, match=shapes):
        write_animation(tmp_path / "b.gif", [blank(), blank(10)])
    with AnimationWriter(tmp_path / "empty.gif", 20):
        pass
    assert not list(tmp_path.iterdir())


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.avi is neither \.gif nor \.mp4"):
        AnimationWriter(tmp_path / "a.avi", 20)


def test_without_ffmpeg_an_mp4_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"Install the Debian package ffmpeg, or write a\.gif"):
        AnimationWriter(tmp_path / "a.mp4", 20)
    assert not list(tmp_path.iterdir())


ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="no ffmpeg; apt-get install ffmpeg enables this test"
)


@ffmpeg
@pytest.mark.timeout(240)
def test_an_mp4_has_every_frame_at_its_rate(tmp_path):
    images = list(moving(40))
    write_animation(tmp_path / "a.mp4", images)
    probed = subprocess.run(
        ["ffmpeg", "-i", str(tmp_path / "a.mp4")], capture_output=True, text=True, timeout=120
    ).stderr
    stream = next(line for line in probed.splitlines() if "Video:" in line)
    assert all(word in stream for word in ("h264", "yuv420p", "46x32", "20 fps"))
    assert "Duration: 00:00:02.00" in probed
    raw = subprocess.run(
        [
            "ffmpeg",
            "-v",
            "error",
            "-i",
            str(tmp_path / "a.mp4"),
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-",
        ],
        capture_output=True,
        check=True,
        timeout=120,
    ).stdout
    shown = np.frombuffer(raw, np.uint8).reshape(40, 32, 46, 3)
    for actual, image in zip(shown, images, strict=True):
        # Colours are halved in resolution.
        assert np.abs(actual[:31, :45].astype(int) - image).mean() < 12
    assert os.listdir(tmp_path) == ["a.mp4"]


@ffmpeg
@pytest.mark.timeout(240)
def test_an_mp4_that_fails_leaves_nothing_and_reports_why(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_and_fail(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(UserError, match=r"b\.mp4: ffmpeg ended with code"):
        write_animation(tmp_path / "b.mp4", moving(3))
    assert not (tmp_path / "a.mp4").exists()
