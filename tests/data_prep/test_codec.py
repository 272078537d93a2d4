"""Stored frames: decoded as the documented numpy does it, whatever is in them; damage is reported."""

import h5py
import numpy as np
import pytest
from evspan.conf.schema.prep import Codec
from evspan.data_prep.frames import codec
from evspan.data_prep.frames.codec import FrameEncoder, decode_frames
from evspan.data_prep.shards.format import FRAME_SHAPE
from evspan.data_prep.shards.write import CODE_CHUNK, FILTERS, CodeWriter
from support.prepared import frames_in


def frame(rng, shape, fraction, most):
    counts = rng.integers(1, most + 1, shape)
    return np.where(rng.random(shape) < fraction, counts, 0).astype(np.uint8)


FRAMES = {
    "empty": (0, 10),
    "one in a thousand": (0.001, 10),
    "a tenth": (0.1, 3),
    "full": (1, 10),
    "bytes to the brim": (0.3, 255),
}


@pytest.mark.parametrize("shape", [(4, 30, 50), (2, 3, 7), (1, 1, 1), (20, 45, 80)])
@pytest.mark.parametrize("kind", FRAMES)
def test_frames_come_back(tmp_path, kind, shape):
    rng, encode = np.random.default_rng(1), FrameEncoder()
    frames = np.stack([frame(rng, shape, *FRAMES[kind]) for _ in range(3)])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        codes = [encode(f).copy() for f in frames]
        assert [len(c[c != codec.SKIP]) for c in codes] == frames.reshape(3, -1).sum(1).tolist(), (
            "a byte an event"
        )
        file["frames"], file["frame_start"] = (
            np.concatenate(codes),
            np.cumsum([0, *map(len, codes)]),
        )
        file.attrs[FRAME_SHAPE] = shape
        np.testing.assert_array_equal(frames_in(file), frames)
        np.testing.assert_array_equal(
            decode_frames(file["frames"][:], file["frame_start"][:], shape), frames
        )


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 507, 508, 509, 762])
def test_gaps_at_the_limits_of_a_byte(gap):
    cells = np.zeros(2000, np.uint8)
    cells[[5, 6 + gap, 1999]] = 1, 3, 2
    code = FrameEncoder()(cells).copy()
    np.testing.assert_array_equal(decode_frames(code, np.array([0, code.size]), (2000,))[0], cells)


def test_the_buffer_grows(monkeypatch):
    encode = FrameEncoder()
    encode.out = np.empty(4, np.uint8)
    cells = np.full(100, 9, np.uint8)
    code = encode(cells).copy()
    assert code.size == 900
    np.testing.assert_array_equal(decode_frames(code, np.array([0, 900]), (100,))[0], cells)


def test_bytes_that_are_no_code_are_refused_and_write_nothing():
    rng = np.random.default_rng(0)
    refused = 0
    for n in range(300):
        code = rng.choice([0, 1, 100, 253, 254, 255], rng.integers(0, 60)).astype(np.uint8)
        try:
            frames = decode_frames(code, np.array([0, code.size]), (8, 60))
            assert frames.sum() == (code != codec.SKIP).sum(), n
        except ValueError as error:
            refused += 1
            assert "does not decode to (8, 60)" in str(error)
    assert 20 < refused < 290
    for start in ([0, 5], [-1, 2], [3, 1]):
        with pytest.raises(ValueError, match="does not decode"):
            decode_frames(np.zeros(4, np.uint8), np.array(start), (8, 60))


@pytest.mark.parametrize("kind", Codec)
def test_the_file_holds_what_was_written_in_whatever_pieces(tmp_path, kind):
    rng = np.random.default_rng(0)
    pieces = [
        rng.integers(0, 9, n).astype(np.uint8)
        for n in (0, 1, CODE_CHUNK - 1, 3, 9 * CODE_CHUNK, 5 * CODE_CHUNK, 17)
    ]
    with h5py.File(tmp_path / "a.h5", "w") as file, CodeWriter(file, FILTERS[kind]) as writer:
        for piece in pieces:
            writer.write(piece)
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["frames"][:], np.concatenate(pieces))
        assert bool(file["frames"]._filters) == (kind is Codec.small)
    assert (tmp_path / "a.h5").stat().st_size < (0.6 if kind is Codec.small else 1.1) * sum(
        map(len, pieces)
    )
