"""`evspan evaluate compare`: drawn recordings against pycocotools on copies of them; its results and refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.data.datasets import Dataset, RecordingData
from evspan.pipeline.engine.evaluator import write_results
from evspan.pipeline.evaluation.bootstrap import MEASURES, draws, measures
from evspan.pipeline.evaluation.compare import CompareOptions, compare, open_evaluation, table
from evspan.pipeline.evaluation.frames import FRAMES, load_frames
from evspan.pipeline.inference.streaming import RecordingResult, labelled, score
from support.evaluated_frames import as_detections, by_pycocotools, some_boxes
from support.small_shards import CLASSES, HEIGHT, WIDTH

ROOT = Path(__file__).parents[2]
FRAMES_EACH, RECORDINGS = 16, 6
CONFIG = EvaluationConfig(skip_first_ms=0)


def boxes_of(rng):
    """Of one recording: tracks 0-3 stand, 4-7 jump about; recordings differ in how many there are."""
    stands = some_boxes(rng, int(rng.integers(1, 5)))
    stands["track_id"] = np.arange(len(stands))
    frames = []
    for _ in range(FRAMES_EACH):
        others = some_boxes(rng, int(rng.integers(1, 5)))
        others["track_id"] = 4 + np.arange(len(others))
        frames.append(np.concatenate((stands, others)))
    return frames


def dataset(truth):
    recordings = []
    for i, frames in enumerate(truth):
        ends, start = (
            50_000 * np.arange(1, len(frames) + 1),
            np.concatenate(([0], np.cumsum([len(b) for b in frames]))),
        )
        every = np.concatenate(frames)
        recordings.append(
            RecordingData(
                f"r{i}",
                0,
                ends,
                np.ones(len(frames), bool),
                start,
                lambda which: np.zeros(0),
                lambda which, every=every: every[which],
            )
        )
    return Dataset(recordings, FrameConfig(), HEIGHT, WIDTH, CLASSES)


def results(truth, seed, jitter, still_fraction=0.7):
    """Detections of every moving box, of so many still ones, and of nothing."""
    rng, out = np.random.default_rng(seed), []
    for i, frames in enumerate(truth):
        result = RecordingResult(f"r{i}", list(range(len(frames))), frames)
        for boxes in frames:
            found = boxes[(boxes["track_id"] >= 4) | (rng.random(len(boxes)) < still_fraction)]
            nothing = as_detections(rng, some_boxes(rng, 3), 0)
            result.detections.append(np.concatenate((as_detections(rng, found, jitter), nothing)))
        out.append(result)
    return out


@pytest.fixture(scope="module")
def truth():
    rng = np.random.default_rng(3)
    return [boxes_of(rng) for _ in range(RECORDINGS)]


def write(folder, truth, found, **config):
    data, rules = dataset(truth), EvaluationConfig(skip_first_ms=0, **config)
    write_results(
        folder,
        score(found, data, rules),
        found,
        data,
        rules,
        {"checkpoint": f"runs/{folder.name}", "step": 7},
    )
    return folder


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory, truth):
    folder = tmp_path_factory.mktemp("evaluations")
    return (
        write(folder / "a", truth, results(truth, 1, 0.08, still_fraction=0.3)),
        write(folder / "b", truth, results(truth, 2, 0.04)),
    )


def test_frames_come_back_from_their_file(evaluations, truth):
    stored, given = (
        load_frames(evaluations[0] / FRAMES),
        labelled(results(truth, 1, 0.08, still_fraction=0.3), dataset(truth)),
    )
    assert stored.names == given.names
    for name in ("recording", "end_us", "boxes", "box_frame", "detections", "detection_frame"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(given, name))


# -- drawn recordings --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1, 1), (2, 0, 1, 3, 0, 0), (0, 0, 0, 0, 6, 0)])
def test_a_draw_scores_as_copies_of_its_recordings_do(truth, weights):
    found = results(truth, 1, 0.06)
    ours = {
        k: v[0]
        for k, v in measures(
            labelled(found, dataset(truth)), CLASSES, CONFIG, np.array([weights], float)
        ).items()
    }
    copies = [i for i, m in enumerate(weights) for _ in range(m)]
    boxes = [b for i in copies for b in truth[i]]
    rows = [d for i in copies for d in found[i].detections]
    theirs = by_pycocotools(boxes, rows, CLASSES)
    assert [ours["ap"], ours["ap50"]] == pytest.approx(theirs.stats[:2].tolist(), abs=1e-9)
    assert ours["ap_small"] == pytest.approx(
        theirs.stats[3] if theirs.stats[3] > -1 else np.nan, abs=1e-9, nan_ok=True
    )
    still = [
        (b["track_id"] < 4) & (i % FRAMES_EACH >= 10) for i, b in enumerate(boxes)
    ]  # at rest for 0.5 s
    for name, group in (("still", still), ("moving", [~g for g in still])):
        theirs = by_pycocotools(boxes, rows, CLASSES, counts=group)
        assert [ours[f"ap_{name}"], ours[f"recall_{name}"]] == pytest.approx(
            theirs.stats[[0, 8]].tolist(), abs=1e-9
        )
    assert 0.1 < ours["ap"] < 0.9
    assert ours.keys() == MEASURES.keys()


def test_draws_are_recordings_with_replacement():
    weights = draws(5, 4000, seed=1)
    assert weights.shape == (4001, 5)
    assert (weights[0] == 1).all()
    assert (weights.sum(1) == 5).all()
    np.testing.assert_allclose(weights[1:].mean(0), 1, atol=0.06)
    np.testing.assert_allclose(weights[1:].var(0), 0.8, atol=0.08)  # 5 draws of 1 in 5
    np.testing.assert_array_equal(weights, draws(5, 4000, seed=1))
    assert (weights != draws(5, 4000, seed=2)).any()


def test_frames_are_matched_in_any_portions(truth, monkeypatch):
    frames, weights = labelled(results(truth, 1, 0.06), dataset(truth)), draws(RECORDINGS, 20, 0)
    at_once = measures(frames, CLASSES, CONFIG, weights)
    monkeypatch.setattr("evspan.pipeline.evaluation.bootstrap.AT_ONCE", 7)
    for name, values in measures(frames, CLASSES, CONFIG, weights).items():
        np.testing.assert_array_equal(values, at_once[name])


@pytest.mark.slow
def test_a_draw_without_such_boxes_does_not_count(truth):
    large = [
        [b[b["w"] * b["h"] > 2000] for b in frames] if i else frames
        for i, frames in enumerate(truth)
    ]
    values = measures(
        labelled(results(large, 1, 0.06), dataset(large)),
        CLASSES,
        CONFIG,
        draws(RECORDINGS, 200, 0),
    )
    drawn = draws(RECORDINGS, 200, 0)[:, 0] > 0
    np.testing.assert_array_equal(np.isnan(values["ap_small"]), ~drawn)
    assert 0 < drawn.sum() < 201
    assert not np.isnan(values["ap"]).any()


# -- the comparison ----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_better_one_is_better_beyond_chance(evaluations):
    a, b = map(open_evaluation, evaluations)
    result = compare(a, b, CompareOptions(resamples=100, seed=0, confidence=0.95))
    for name, one in result["measures"].items():
        for side in ("a", "b", "difference"):
            assert one[side]["low"] <= one[side]["high"], name
        assert one["difference"]["value"] == pytest.approx(one["b"]["value"] - one["a"]["value"])
    for name, e in (("a", a), ("b", b)):
        assert result["measures"]["ap"][name]["value"] == pytest.approx(e.results["ap"], abs=1e-9)
        assert result["measures"]["ap_small"][name]["value"] == pytest.approx(
            e.results["ap_small"], abs=1e-9
        )
    gain = result["measures"]["recall_still"]["difference"]
    assert gain["low"] > 0.1
    assert gain["value"] == pytest.approx(0.4 * 0.5, abs=0.25)
    # Paired: the same recordings are drawn for both, so their difference is surer than each of them.
    ap = result["measures"]["ap"]
    assert ap["difference"]["high"] - ap["difference"]["low"] < sum(
        ap[s]["high"] - ap[s]["low"] for s in "ab"
    )
    again = compare(a, b, CompareOptions(resamples=100, seed=0, confidence=0.95))
    assert again == result != compare(a, b, CompareOptions(resamples=100, seed=1, confidence=0.95))
    narrow = compare(a, b, CompareOptions(resamples=100, seed=0, confidence=0.5))["measures"]["ap"][
        "a"
    ]
    assert ap["a"]["low"] < narrow["low"] <= narrow["high"] < ap["a"]["high"]
    lines = table(result, a, b).splitlines()
    assert lines[0].startswith("A  ")
    assert "step 7" in lines[0]
    assert lines[2].startswith("6 recordings, 96 labelled frames; 100 draws")
    assert next(line for line in lines if line.startswith("  recall still")).endswith("*")


def test_one_against_itself_differs_in_nothing(evaluations):
    a = open_evaluation(evaluations[0] / "metrics.json")
    result = compare(a, a, CompareOptions(resamples=50, seed=0, confidence=0.95))
    assert all(
        one["difference"] == {"value": 0, "low": 0, "high": 0}
        for one in result["measures"].values()
    )
    assert "*" not in table(result, a, a)


def test_few_recordings_are_told_of(tmp_path, truth):
    few = write(tmp_path / "few", truth[:2], results(truth[:2], 1, 0.06))
    a = open_evaluation(few)
    assert "so few recordings" in table(
        compare(a, a, CompareOptions(resamples=10, seed=0, confidence=0.95)), a, a
    )


def some(folder, truth, **config):
    return write(folder, truth, results(truth, 1, 0.1), **config)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda b, truth: some(b, truth, min_side=20.0),
            "scored by other rules: min_side is None and 20.0",
        ),
        (lambda b, truth: some(b, truth[:5]), "1 are in one alone (r5)"),
        (lambda b, truth: some(b, [frames[::-1] for frames in truth]), "other frames or boxes"),
        (
            lambda b, truth: some(b, truth, write_detections=False),
            "evaluation.write_detections=true",
        ),
        (
            lambda b, truth: (b.mkdir(), (b / "metrics.json").write_text('{"ap": 1}')),
            "is not what evspan evaluate writes",
        ),
        (lambda b, truth: None, "has no metrics.json"),
        (
            lambda b, truth: (some(b, truth) / FRAMES).write_bytes(b"PK\x03\x04 cut"),
            "holds no frames of an evaluation",
        ),
        (
            lambda b, truth: shutil.copy(
                write(b.parent / "c", truth, results(truth, 9, 0.02)) / FRAMES, some(b, truth)
            ),
            "they are of different evaluations",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, evaluations, truth, change, part):
    change(tmp_path / "b", truth)
    with pytest.raises(UserError) as raised:
        compare(
            open_evaluation(evaluations[0]),
            open_evaluation(tmp_path / "b"),
            CompareOptions(resamples=5, seed=0, confidence=0.95),
        )
    assert part in str(raised.value)


# -- the command -------------------------------------------------------------------------------------------------
def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "evspan.launch", "evaluate", "compare", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_command_tells_a_table_or_json(evaluations):
    shown = command(*evaluations, "--resamples", 50)
    assert shown.returncode == 0 and "AP 0.50:0.95" in shown.stdout and "B - A" in shown.stdout, (
        shown.stderr
    )
    output = json.loads(command(*evaluations, "--resamples", 50, "--seed", 3, "--json").stdout)
    assert (output["seed"], output["resamples"], output["recordings"]) == (3, 50, 6)
    assert output["measures"].keys() == MEASURES.keys()
    wrong = command(evaluations[0], ROOT / "conf")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "has no metrics.json" in wrong.stderr
    wrong = command(*evaluations, "--resamples", 0)
    assert wrong.returncode == 2
    assert "--resamples 0 must be 1 or more" in wrong.stderr
