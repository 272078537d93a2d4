"""What a program passes to a detector: wrong frames, state and thresholds are one clear error each."""

import numpy as np
import pytest
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import BackboneConfig, FpnConfig, HeadConfig, ModelConfig
from evspan.pipeline.inference.detect import WorkTimer, detect
from evspan.pipeline.inference.trained_detector import TrainedDetector
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.inputs import InputError
from evspan.pipeline.model.lstm import CellLSTM
from evspan.pipeline.model.state import DetectorState, StageState
from evspan.pipeline.weights import Weights

CHANNELS, HEIGHT, WIDTH = 4, 20, 40
MODEL = ModelConfig(
    backbone=BackboneConfig(embed_dim=8, dim_head=8, partition_split_32=1),
    fpn=FpnConfig(enable_small_object_attention=True),
    head=HeadConfig(num_classes=3),
)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    weights = Weights({}, MODEL, FrameConfig(bins=CHANNELS // 2), ["a", "b", "c"], 0)
    return TrainedDetector(weights).eval()


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def some_frames(*shape: int) -> torch.Tensor:
    shape = shape or (2, CHANNELS, HEIGHT, WIDTH)
    return torch.randint(0, 3, shape, dtype=torch.uint8)


WRONG_FRAMES = {
    "float": (some_frames().float(), "frames are float32; pass uint8"),
    "int64": (some_frames().long(), "frames are int64; pass uint8"),
    "bool": (some_frames().bool(), "frames are bool; pass uint8"),
    "numpy float": (some_frames().float().numpy(), "frames are float32; pass uint8"),
    "numpy objects": (np.full((2, 4, 20, 40), None), "frames are object; pass uint8"),
    "a list": ([[1]], "frames are of type list"),
    "nothing": (None, "frames are of type NoneType"),
    "channels": (some_frames(2, 6, HEIGHT, WIDTH), "6 channels, and the detector was trained on 4"),
    "one dim less": (some_frames(CHANNELS, HEIGHT, WIDTH), r"frames are \(4, 20, 40\)"),
    "one dim more": (some_frames(1, 2, CHANNELS, HEIGHT, WIDTH), r"frames are \(1, 2, 4, 20, 40\)"),
    "empty": (some_frames(2, CHANNELS, 0, WIDTH), "none of them empty"),
    "device": (some_frames().to("meta"), "frames are on meta, and the detector is on cpu"),
}


@pytest.mark.parametrize("kind", WRONG_FRAMES)
@pytest.mark.parametrize("method", ["step", "detect"])
def test_wrong_frames_are_one_error(detector, method, kind):
    frames, message = WRONG_FRAMES[kind]
    state = detector.initial_state(2, HEIGHT, WIDTH)
    with pytest.raises(InputError, match=message) as error:
        getattr(detector, method)(frames, state)
    assert isinstance(error.value, UserError)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)


WRONG_STATES = {
    "fewer lanes": (lambda d: d.initial_state(1, HEIGHT, WIDTH), "for other frames"),
    "more lanes": (lambda d: d.initial_state(3, HEIGHT, WIDTH), "for other frames"),
    "smaller": (lambda d: d.initial_state(2, HEIGHT, 32), "for other frames"),
    "larger": (lambda d: d.initial_state(2, 360, 640), "for other frames"),
    "transposed": (lambda d: d.initial_state(2, WIDTH, HEIGHT), "for other frames"),
    "float64": (
        lambda d: d.initial_state(2, HEIGHT, WIDTH, dtype=torch.float64),
        "the state is float64, and the detector computes in float32",
    ),
    "bfloat16": (
        lambda d: d.initial_state(2, HEIGHT, WIDTH, dtype=torch.bfloat16),
        "the state is bfloat16",
    ),
    "device": (lambda d: d.initial_state(2, HEIGHT, WIDTH, device="meta"), "the state is on meta"),
    "nothing": (lambda d: None, "the state is of type NoneType"),
    "a tuple": (lambda d: tuple(d.initial_state(2, HEIGHT, WIDTH)), "the state is of type tuple"),
    "without attention": (
        lambda d: d.initial_state(2, HEIGHT, WIDTH)._replace(previous=()),
        "it is of another detector",
    ),
    "three stages": (
        lambda d: DetectorState(d.initial_state(2, HEIGHT, WIDTH).stages[:3], ()),
        "it is of another detector",
    ),
}


@pytest.mark.parametrize("kind", WRONG_STATES)
def test_a_wrong_state_is_one_error(detector, kind):
    make, message = WRONG_STATES[kind]
    with pytest.raises(InputError, match=message) as error:
        detector.step(some_frames(), make(detector))
    if message != "it is of another detector":
        assert "detector.initial_state(2, 20, 40)" in str(error.value)
    with pytest.raises(InputError, match=message):  # chunks are checked, too
        detector(some_frames()[None], make(detector))


def test_a_detector_without_weights_checks_as_well():
    detector = Detector(MODEL, CHANNELS).eval()
    with pytest.raises(InputError, match="for other frames"):
        detector.step(some_frames(), detector.initial_state(1, HEIGHT, WIDTH))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 20, 40), "batch is 0"), ((1, -5, 40), "height is -5"), ((1, 20, 4.0), "width is 4.0")],
)
def test_impossible_sizes_are_refused(detector, sizes, message):
    with pytest.raises(InputError, match=message):
        detector.initial_state(*sizes)
    with pytest.raises(InputError):
        detector.frame_stream(*sizes)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None])
def test_thresholds_lie_between_0_and_1(detector, value):
    state = detector.initial_state(2, HEIGHT, WIDTH)
    for name in ("confidence_threshold", "nms_threshold"):
        if value is not None:  # the model config's
            with pytest.raises(InputError, match=f"{name} is .*; pass a number from 0 to 1"):
                detector.detect(some_frames(), state, **{name: value})
            with pytest.raises(InputError, match=name):
                detector.frame_stream(2, HEIGHT, WIDTH, **{name: value})
    with pytest.raises(InputError, match="confidence_threshold"):
        next(run_detect(detector, confidence=value))


def run_detect(detector, channels=CHANNELS, confidence=0.5, frames_per_call=1):
    frame = np.zeros((channels, HEIGHT, WIDTH), np.uint8)
    return detect(
        detector,
        [(0, frame)],
        confidence=confidence,
        nms=0.5,
        frames_per_call=frames_per_call,
        downsample=1,
        sensor=(HEIGHT, WIDTH),
        clock=WorkTimer(),
    )


def test_frames_of_a_recording_are_checked(detector):
    with pytest.raises(InputError, match="6 channels"):
        next(run_detect(detector, channels=6))


def test_numpy_frames_give_what_tensors_give(detector):
    frames = some_frames()
    state = detector.initial_state(2, HEIGHT, WIDTH)
    expected, _ = detector.step(frames, state)
    read_only = frames.numpy().copy()
    read_only.flags.writeable = False
    flipped = frames.flip(3).numpy()[..., ::-1]  # negative strides
    for array in (frames.numpy(), read_only, flipped):
        actual, _ = detector.step(array, state)
        assert torch.equal(actual, expected)
    stream = detector.frame_stream(2, HEIGHT, WIDTH, confidence_threshold=0.0)
    rows, _ = detector.detect(frames.numpy(), state, confidence_threshold=0.0)
    for one, other in zip(stream.detect(frames.numpy()), rows, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, CHANNELS, HEIGHT, WIDTH), "frames are of 1 lane"),
        ((2, CHANNELS, HEIGHT, WIDTH + 1), "20 x 41 pixels, and the stream is of 2 lanes, 20 x 40"),
        ((2, CHANNELS + 2, HEIGHT, WIDTH), "6 channels"),
    ],
)
def test_a_stream_takes_its_own_frames_only(detector, shape, message):
    stream = detector.frame_stream(2, HEIGHT, WIDTH)
    with pytest.raises(InputError, match=message):
        stream.detect(some_frames(*shape))
    with pytest.raises(InputError, match="pass uint8"):
        stream.detect(some_frames().float())
    with pytest.raises(InputError, match="on meta"):
        stream.detect(some_frames().to("meta"))


@pytest.mark.parametrize("frames", [[[1]], None, some_frames(CHANNELS, HEIGHT, WIDTH)])
def test_a_stream_refuses_what_is_no_frame_of_each_lane(detector, frames):
    stream = detector.frame_stream(2, HEIGHT, WIDTH)
    with pytest.raises(InputError, match=r"frames are of type|pass \(lanes, channels, H, W\)"):
        stream.detect(frames)


@pytest.mark.parametrize("frames_per_call", [0, -1])
def test_frames_per_call_of_a_recording_are_checked(detector, frames_per_call):
    with pytest.raises(InputError, match="frames_per_call is"):
        next(run_detect(detector, frames_per_call=frames_per_call))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("starts", torch.ones(3, dtype=torch.bool)),
        ("starts", torch.ones(2)),
        ("labelled", torch.ones(1, 3, dtype=torch.bool)),
        ("labelled", torch.ones(2, dtype=torch.bool)),
    ],
)
def test_selections_of_another_shape_are_refused(detector, name, value):
    state = detector.initial_state(2, HEIGHT, WIDTH)
    with pytest.raises(InputError, match=f"{name} is"):
        detector(some_frames()[None], state, **{name: value})


@pytest.mark.parametrize("dws_conv", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (2, 8, 4, 3), (2, 8, 2, 4), (2, 4, 4, 4)])
def test_the_recurrence_refuses_a_state_that_its_kernel_would_read_beyond(dws_conv, shape):
    lstm = CellLSTM(8, dws_conv=dws_conv)
    state = StageState(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match="it must be"):
        lstm(torch.zeros(3, 2, 4, 4, 8), state)
