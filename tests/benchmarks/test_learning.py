"""The learning study: recordings, the plan, resuming, other detectors, statistics, scores, the page."""

import dataclasses
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.training import BackboneConfig, EvaluationConfig, FpnConfig, ModelConfig
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.simulator import SimulatorConfig, simulate
from evspan.data_prep.simulator.recording_set import SimulatedSet, is_complete, write_recording
from evspan.data_prep.simulator.scene import LENGTHS, make_scene
from evspan.launch.cli import simulate as cli_simulate
from evspan.pipeline.evaluation.bootstrap import draws
from evspan.pipeline.evaluation.breakdown import breakdown
from evspan.pipeline.evaluation.coco import coco_metrics
from evspan.pipeline.evaluation.frames import LabelledFrames, labelled_frames, scored
from evspan.pipeline.evaluation.motion import motion
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.neck import YOLOPAFPN
from learning import other_detectors, real_events, scores, study
from learning.curves import Line, Panel, write_svg
from learning.effects import effect, holm, paired_effect, seeds_needed, smallest_found
from learning.experiments import (
    ATTENTION,
    EXPERIMENTS,
    GENERALISATION,
    LENGTH,
    RATE,
    RESTS_LONG,
    SETS,
)
from learning.intervals import interval, paired, t_quantile, two_sided
from learning.jobs import Job, run_jobs
from learning.page import Key, Results, power_of, write_page
from learning.recordings import CONF, FULL, Recordings, recordings_in, stretch
from support.composed_configs import composed

ROOT = Path(__file__).parents[2]
TINY = Recordings("tiny", "train=1,val=1", 1)
ATTENTION_KEY = "enable_small_object_attention"


# -- the set ---------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_set_is_created_once_and_refused_when_it_has_changed(tmp_path, capfd):
    (tmp_path / "a" / ".set.writing" / "raw").mkdir(
        parents=True
    )  # of a killed attempt, as this folder without a table is
    (tmp_path / "a" / "set").mkdir()
    recordings = recordings_in(tmp_path / "a", TINY)
    assert recordings.original  # as far as is known
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "set",
        "set.json",
    ]
    capfd.readouterr()
    assert recordings_in(
        tmp_path / "a", dataclasses.replace(TINY, digest=recordings.digest)
    ) == dataclasses.replace(recordings, original=True)
    assert capfd.readouterr().out == ""  # nothing ran

    shard = recordings.shards / "val" / "00000.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises(UserError, match=r"val/00000.h5 was changed or damaged \(1 of"):
        recordings_in(tmp_path / "a", TINY)
    shard.unlink()
    with pytest.raises(UserError, match="val/00000.h5 is missing"):
        recordings_in(tmp_path / "a", TINY)
    shard.write_bytes(whole)
    (recordings.shards / "val" / "00001.h5").touch()
    with pytest.raises(UserError, match="val/00001.h5 does not belong there"):
        recordings_in(tmp_path / "a", TINY)
    with pytest.raises(UserError, match="another recipe"):
        recordings_in(tmp_path / "a", dataclasses.replace(TINY, seconds=2))
    (tmp_path / "a" / "set.json").write_text('{"recipe":')
    with pytest.raises(UserError, match="set.json is damaged"):
        recordings_in(tmp_path / "a", TINY)


@pytest.mark.slow
def test_the_set_has_many_small_crossing_and_stopping_objects(tmp_path):
    """Of a recording as the set has them, in pixels of its frames."""
    args = cli_simulate._parser().parse_args([str(tmp_path), *FULL.recipe()["simulate"]])
    recording_set = cli_simulate.options_from(args).recording_set
    config = recording_set.recordings()[0].config
    report = simulate(tmp_path / "a_td.raw", seconds=6, seed=recording_set.seed, config=config)
    rows = np.load(report.boxes_path)
    area = rows["w"] * rows["h"] / 4
    assert 0.6 < (area < 32**2).mean() < 0.99  # and medium ones to compare with
    assert rows.size / np.unique(rows["t"]).size > 4
    tracks = [rows[rows["track_id"] == i] for i in np.unique(rows["track_id"])]
    still = sum(((np.diff(mine["x"]) == 0) & (np.diff(mine["y"]) == 0)).sum() for mine in tracks)
    assert 0.2 < still / rows.size < 0.7


def test_scales_change_sizes_alone_and_the_default_nothing(tmp_path):
    def scene(**values):
        return make_scene(200_000_000, np.random.default_rng(3), SimulatorConfig(**values))

    usual, half = scene(), scene(min_scale=0.5, max_scale=0.5)
    assert half.tracks
    assert half.background.shape == usual.background.shape
    first = {t.track_id: t for t in usual.tracks}[0], {t.track_id: t for t in half.tracks}[0]
    assert first[1].shape[1] == pytest.approx(first[0].shape[1] / 2)
    assert first[1].area == pytest.approx(first[0].area / 4)
    drawn = scene(min_scale=0.5, max_scale=2).tracks
    for kind, (low, high) in enumerate(LENGTHS):
        lengths = [2 * t.shape[1] for t in drawn if t.class_id == kind]
        assert 0.5 * low <= min(lengths) < low
        assert high < max(lengths) <= 2 * high
    small = SimulatorConfig(height=160, width=160)
    planned = SimulatedSet(tmp_path, {"val": 1}, seconds=0.1, config=small).recordings()[0]
    write_recording(planned)
    note = json.loads(planned.parameters_path.read_text())
    del (
        note["parameters"]["min_scale"],
        note["parameters"]["max_scale"],
    )  # written before there were scales
    planned.parameters_path.write_text(json.dumps(note))
    assert is_complete(planned)


def test_recordings_rest_as_long_as_they_are_told(tmp_path):
    def rests(**values):
        scene = make_scene(300_000_000, np.random.default_rng(3), SimulatorConfig(**values))
        return [track.stopped_us / 1e6 for track in scene.tracks if track.stopped_us]

    usual, long = rests(stop_fraction=1), rests(stop_fraction=1, min_rest_s=3, max_rest_s=10)
    assert 1 <= min(usual) < 1.3
    assert 1.9 < max(usual) <= 2.2
    assert 3 <= min(long) < 4
    assert 9 < max(long) <= 10
    args = cli_simulate._parser().parse_args(
        [str(tmp_path), *SETS["rests-v1"].recipe()["simulate"]]
    )
    config = cli_simulate.options_from(args).recording_set.recordings()[0].config
    assert (config.min_rest_s, config.max_rest_s) == (3, 10)


def test_a_stretched_recording_runs_slower(tmp_path):
    path = tmp_path / "a_td.raw"
    simulate(path, seconds=0.2, seed=1, config=SimulatorConfig(height=160, width=160))
    events = [chunk for chunk in open_recording(path).chunks()]
    boxes = np.load(tmp_path / "a_bbox.npy")
    stretch(path, 5)
    slower = [chunk for chunk in open_recording(path).chunks()]
    for name in "txyp":
        ours, theirs = (
            np.concatenate([getattr(c, name) for c in part]) for part in (slower, events)
        )
        np.testing.assert_array_equal(ours, theirs * (5 if name == "t" else 1))
    np.testing.assert_array_equal(np.load(tmp_path / "a_bbox.npy")["t"], 5 * boxes["t"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_bbox.npy", "a_td.raw"]


# -- the plan --------------------------------------------------------------------------------------
def options_of(*words: str, folder: Path = Path("bench")) -> study.Options:
    args = study._parser().parse_intermixed_args([*words, "--folder", str(folder)])
    return study.options_from(args)


def study_in(folder: Path, *words: str) -> study.Study:
    return study.Study(options_of("--device", "cpu", *words, folder=folder))


ALL = [
    (experiment, variant) for experiment in EXPERIMENTS.values() for variant in experiment.variants
]


def overrides_of(experiment, variant) -> dict[str, str]:
    words = study_in(Path("bench")).train_words(study.Run(experiment, variant, 3))[3:]
    pairs = [word.partition("=")[::2] for word in words]
    assert len(dict(pairs)) == len(pairs)  # nothing is given twice
    return {key: value.strip("'") for key, value in pairs}


def test_the_experiments_are_whole():
    """Names refer to what there is; held-out sets are large enough, also for an interval."""
    for experiment in EXPERIMENTS.values():
        names = [variant.name for variant in experiment.variants]
        assert len(set(names)) == len(names)
        assert set(experiment.pilot) <= set(names)
        pilot = (experiment.pilot[1], experiment.pilot[0])
        assert pilot in experiment.families[0].pairs or experiment.name == "generalisation"
        for variant in experiment.variants:
            assert set(variant.trained_on) <= SETS.keys()
            assert not variant.starts_from or experiment.variant(variant.starts_from).once
        for family in experiment.families:
            assert {name for pair in family.pairs for name in pair} <= set(names)
            assert family.on in experiment.scored_on
        for name in (*experiment.scored_on, *experiment.last_scored_on):
            assert int(SETS[name].counts.rpartition("val=")[2]) >= 12


@pytest.mark.parametrize(("experiment", "variant"), ALL, ids=lambda item: item.name)
def test_a_variant_sees_as_many_frames_as_its_experiment_says(experiment, variant):
    run = overrides_of(experiment, variant)
    frames = int(run["training.sequence_length"]) if "training.sequence_length" in run else 5
    assert frames * int(run["training.batch_size"]) == experiment.frames_of(variant)
    assert frames % int(run["parallel.ranks"]) == 0
    assert run["parallel.sequence"] == run["parallel.ranks"] == str(variant.ranks)
    assert int(run["training.max_steps"]) == (variant.steps or experiment.steps)
    scored = experiment.scored_steps(variant, 1.0)
    assert all(step % int(run["checkpoint.every"]) == 0 for step in scored[:-1])
    # A run that is stopped a few times has a checkpoint more for each stop.
    before_the_last = int(run["checkpoint.every"]) * (int(run["checkpoint.keep"]) - 4)
    assert len(scored) == 1 or before_the_last >= scored[-1]


def test_the_pilot_comes_before_anything_else_and_seeds_one_after_the_other(tmp_path):
    names = [run.name for run in study_in(tmp_path, "--pilot").runs(ATTENTION)]
    variants = [
        f"attention/{variant}-{seed}"
        for variant in ("continued", "fast_gates")
        for seed in range(3)
    ]
    assert names == ["attention/base-0", *variants]
    whole = study_in(tmp_path, "--seeds", "5").runs(ATTENTION)
    assert [run.seed for run in whole] == sorted(run.seed for run in whole)
    assert len(whole) == 1 + 5 * (len(ATTENTION.variants) - 1)
    order = [job.name.partition("/")[0] for job in study_in(tmp_path).jobs()]
    assert list(dict.fromkeys(order)) == ["attention", "length", "generalisation", "rate"]
    assert RESTS_LONG in study_in(tmp_path).jobs()[-1].name


def test_attention_and_length_fit_six_hours_of_two_cores(tmp_path):
    lines = study.plan_table(study_in(tmp_path, "--only", "attention,length")).splitlines()
    assert float(lines[-1].split()[0]) < 6


CHANGES = {  # variant of the branches -> how its model differs from the continued baseline's
    "identity": {ATTENTION_KEY: True},
    "fast_gates": {ATTENTION_KEY: True},
    "published": {ATTENTION_KEY: True, "identity_init": False},
    "size_aware": {"size_aware_loss": True},
    "size_aware_fast_gates": {"size_aware_loss": True, ATTENTION_KEY: True},
    "before_pyramid": {ATTENTION_KEY: True},
    "temporal_difference": {ATTENTION_KEY: True, "attention_spatial": False},
    "spatial": {ATTENTION_KEY: True, "attention_temporal": False},
    "temporal": {ATTENTION_KEY: True, "attention_spatial": False},
    "channel": {ATTENTION_KEY: True, "attention_spatial": False, "attention_temporal": False},
    "published_start": {ATTENTION_KEY: True, "identity_init": False},
}
PUBLISHED_START = {"training.max_steps": "1", "optimizer.lr": "1e-12", "checkpoint.every": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_branch_changes_what_it_says_and_nothing_else(name):
    def model_of(variant):
        words = study_in(Path("bench")).train_words(study.Run(ATTENTION, variant, 0))[3:]
        config = composed("train", *words, f"hydra.searchpath=[file://{CONF}]")[0]
        return {
            key: value
            for part in ("backbone", "fpn", "head")
            for key, value in vars(getattr(config.model, part)).items()
        }

    base, model = model_of(ATTENTION.variant("continued")), model_of(ATTENTION.variant(name))
    assert {key: value for key, value in model.items() if base[key] != value} == CHANGES[name]
    ours, theirs = (
        overrides_of(ATTENTION, ATTENTION.variant(variant)) for variant in (name, "continued")
    )
    rest = {k: v for k, v in ours.items() if theirs.get(k) != v and not k.startswith("model.")}
    del rest["run_dir"]
    rest.pop("checkpoint.every", None)
    rest.pop("checkpoint.keep", None)
    gates = {"optimizer.gate_lr_multiplier": "10"} if "gate_lr" in "".join(ours) else {}
    start = (
        {"training.max_steps": "1", "optimizer.lr": "1e-12"} if name == "published_start" else {}
    )
    assert rest == gates | start


def test_domains_and_rates_are_trained_on_what_they_say():
    strong, random = (
        overrides_of(GENERALISATION, GENERALISATION.variant(n))
        for n in ("night_strong", "random_none")
    )
    assert strong["augmentation"] == "strong"
    assert strong["dataset.root"].endswith("domain-night-v1/set")
    assert random["dataset.root"].endswith("domain-random-v1/set")
    rates = overrides_of(RATE, RATE.variant("all_rates"))
    assert rates["dataset.roots"].count("root:") == 3
    assert "rate-10-train-v1" in rates["dataset.roots"]
    assert SETS["rate-10-train-v1"].stretch == 5
    assert "frames.window_ms=10" in SETS["rate-10-v1"].prepare


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--only", "atention"], "no experiment 'atention'"),
        (["--seeds", "-1"], "--seeds is -1"),
        (["--scale", "0"], "--scale is 0"),
        (["--hours", "-1"], "--hours is -1"),
        (["seed=3"], "seed is set by the study"),
        (["fast"], "not KEY=VALUE"),
    ],
)
def test_what_makes_no_sense_is_refused(words, part):
    with pytest.raises(UserError, match=re.escape(part)):
        options_of("--device", "cpu", *words)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    study_in(tmp_path).check_settings()
    study_in(tmp_path, "--seeds", "9", "--only", "rate").check_settings()  # adds runs
    with pytest.raises(UserError, match=r"has scale 1.0; give the same"):
        study_in(tmp_path, "--scale", "2").check_settings()


# -- running ---------------------------------------------------------------------------------------
FAKE = """import json, os, pathlib, sys
words = sys.argv[1:]
values = {w.partition("=")[0]: w.partition("=")[2].strip("'") for w in words if "=" in w}
root = pathlib.Path(os.environ["FAKE_ROOT"])
with (root / "calls").open("a") as file:
    file.write(" ".join(words[:1] + [pathlib.Path(values.get("run_dir", "")).name]) + "\\n")
broken = root / "broken"
if broken.exists() and broken.read_text() in values.get("run_dir", "-"):
    sys.exit("no such thing")
if words[0] == "train":
    step = int(values["training.max_steps"])
    folder = pathlib.Path(values["run_dir"], "checkpoints", f"step-{step:08d}")
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
else:
    import numpy as np
    output = pathlib.Path(words[2])
    output.mkdir(parents=True)
    ap = np.full((1, 401), 0.25, np.float32)
    values = {"names": np.array(["ap"]), "points": ap[:, 0], "samples": ap[:, 1:]}
    np.savez(output / "score.npz", version=%d, recordings=12, **values)
"""


def test_a_study_continues_with_what_is_missing(tmp_path, monkeypatch, capfd):
    """With fake programs: a run fails, the same command does what is left, then nothing."""
    (tmp_path / "run_score.py").write_text(FAKE % scores.VERSION)
    monkeypatch.setenv("FAKE_ROOT", str(tmp_path))
    monkeypatch.setattr(study, "PROGRAMS", tmp_path)
    monkeypatch.setattr(
        study.other_detectors,
        "command",
        lambda name: [sys.executable, str(tmp_path / "run_score.py")],
    )
    made = []
    monkeypatch.setattr(study.Study, "make_set", lambda self, name: made.append(name))
    (tmp_path / "broken").write_text("all_rates-0")
    options = options_of(
        "--device", "cpu", "--jobs", "2", "--only", "rate", "--seeds", "1", folder=tmp_path / "out"
    )
    assert study.run_study(options) == 1
    output = capfd.readouterr().out
    assert "rate/all_rates-0: exit code 1" in output
    assert "no such thing" in output
    assert "4 of 8 jobs are not done: 4 failed" in output
    assert {"rate-50-v1", "rate-25-train-v1", "rate-10-train-v1"} <= set(made)
    first = (tmp_path / "calls").read_text().splitlines()
    assert sorted(first)[-2:] == ["train all_rates-0", "train one_rate-0"]
    (tmp_path / "broken").unlink()
    (tmp_path / "calls").unlink()
    assert study.run_study(options) == 0
    second = (tmp_path / "calls").read_text().splitlines()
    assert second[0] == "train all_rates-0"
    assert len(second) == 4
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| 50 ms | 1 | 25.0 |" in page
    (tmp_path / "calls").unlink()
    assert study.run_study(options) == 0
    assert not (tmp_path / "calls").exists()
    # Scores alone, as they are kept beside a page: a run whose score is lost is trained again.
    for checkpoints in (tmp_path / "out" / "runs").glob("*/*/checkpoints"):
        shutil.rmtree(checkpoints)
    assert study.run_study(options) == 0
    assert not (tmp_path / "calls").exists()
    for kept in (tmp_path / "out/runs/rate/one_rate-0/scores").glob("rate-10-*"):
        shutil.rmtree(kept)
    assert study.run_study(options) == 0
    assert (tmp_path / "calls").read_text().splitlines()[0] == "train one_rate-0"
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def job(tmp_path, name, code, *needs, cores=1):
    done = tmp_path / name
    text = f"import time, pathlib; {code}; pathlib.Path({str(done)!r}).touch()"
    return Job(
        name, [sys.executable, "-c", text], done.exists, tmp_path / f"{name}.log", needs, cores
    )


def test_jobs_run_in_order_and_a_failure_leaves_out_what_needs_it(tmp_path):
    bad = job(tmp_path, "bad", "raise SystemExit('broken')")
    after = job(tmp_path, "after", "0", bad)
    later = job(tmp_path, "later", "0", after)
    wide = job(tmp_path, "wide", "0", cores=4)  # more than there are: alone
    done = job(tmp_path, "done", "raise SystemExit(3)")
    (tmp_path / "done").touch()
    seen = []
    outcome = run_jobs([done, bad, after, later, wide], 2, after=lambda name, s: seen.append(name))
    assert outcome.failed == ["bad", "after", "later"]
    assert seen == ["bad", "wide"]
    assert not outcome.stopped


@pytest.mark.slow
def test_at_the_deadline_running_commands_are_asked_to_save(tmp_path):
    saving = (
        "import signal, sys; "
        f"signal.signal(signal.SIGTERM, lambda *a: (pathlib.Path({str(tmp_path)!r}, 'saved').touch(), "
        f"sys.exit(75))); pathlib.Path({str(tmp_path)!r}, 'ready').touch(); time.sleep(60)"
    )
    slow, next_one = job(tmp_path, "slow", saving), job(tmp_path, "next", "0")
    outcome = run_jobs([slow, next_one], 1, hours=3 / 3600)
    assert outcome.stopped
    assert outcome.failed == []
    assert not (tmp_path / "next").exists()
    assert (tmp_path / "saved").exists() == (tmp_path / "ready").exists()


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_quick_trains_scores_and_continues(tmp_path):
    words = ["--quick", "--only", "rate", "--device", "cpu", "--folder", str(tmp_path)]
    command = [sys.executable, "tests/benchmarks/learn.py", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "report.md").read_text() in ran.stdout
    assert "missing" not in ran.stdout.partition("## ")[2].replace("comparisons missing", "")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert again.returncode == 0
    assert again.stdout.startswith("\n# The learning study: results")


# -- other detectors -------------------------------------------------------------------------------
FPN = {"in_stages": (2, 3, 4), "in_channels": (8, 16, 32), "enable_small_object_attention": True}


def opened(module: torch.nn.Module, gate: float) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(gate)
    return module.eval()


def detector_of(name: str, gate: float, seed: int = 0) -> Detector:
    other_detectors.use(name)
    try:
        torch.manual_seed(seed)
        model = ModelConfig(
            backbone=BackboneConfig(
                embed_dim=8, dim_head=8, partition_split_32=1, ls_init_value=1.0
            ),
            fpn=FpnConfig(enable_small_object_attention=True),
        )
        detector = Detector(model, 2)
    finally:
        other_detectors.use("")
    opened(detector, gate)
    return detector


@pytest.mark.parametrize("name", other_detectors.DETECTORS)
def test_another_detector_starts_as_the_baseline_and_carries_its_state(name):
    """Closed gates: the plain detector. Open ones: another, the same frame by frame as in a chunk."""
    frames = torch.randint(0, 5, (4, 2, 2, 64, 64), dtype=torch.uint8)
    labelled = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 1]], dtype=torch.bool)
    with torch.no_grad():
        plain, closed, gated = (detector_of(n, g) for n, g in (("", 0), (name, 0), (name, 0.7)))
        start = plain.initial_state(2, 64, 64)
        expected, _ = plain(frames, start)
        torch.testing.assert_close(closed(frames, start)[0], expected, rtol=1e-5, atol=1e-5)
        out, _ = gated(frames, start)
        assert not torch.allclose(out, expected, atol=1e-4)
        torch.testing.assert_close(
            gated(frames, start, labelled=labelled)[0],
            out[labelled.flatten()],
            rtol=1e-4,
            atol=1e-5,
        )
        state, parts = start, []
        for t in range(4):
            raw, state = gated(frames[t : t + 1], state)
            parts.append(raw)
        torch.testing.assert_close(torch.cat(parts), out, rtol=1e-4, atol=1e-5)
    assert type(detector_of("", 0).fpn) is YOLOPAFPN


def test_attention_before_the_pyramid_by_its_definition():
    torch.manual_seed(0)
    neck = opened(other_detectors.AttentionBeforePyramid(**FPN, attention_temporal=False), 0.6)
    features = [torch.randn(3, c, 16 // s, 16 // s) for c, s in ((8, 1), (16, 2), (32, 4))]
    attended = []
    for i, x in enumerate(features):
        if i < 2:
            x = neck.small_object_attention_modules[f"scale_{i}"](x)
        attended.append(neck.scale_aware_attention_modules[f"scale_{i}"](x))
    expected = neck.pyramid(attended)
    out = neck(features, lambda packed: [(x, None) for x in packed])
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_temporal_attention_on_the_difference_by_its_definition():
    torch.manual_seed(0)
    block = other_detectors.DifferenceTemporalAttention(4, 3)
    opened(block, 0.8)
    x, previous = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 4, 5, 6)
    window = torch.cat((previous, x[:, None]), dim=1).transpose(1, 2)
    temporal = block.temporal_conv(window)[:, :, 0]
    motion = torch.sigmoid(block.motion_conv(torch.cat((x, previous[:, -1]), 1)))
    weights = torch.sigmoid(block.temporal_fc(temporal.mean((2, 3))))[..., None, None]
    expected = x + (x - previous[:, -1]) * motion * weights * 0.8
    torch.testing.assert_close(block(x, previous), expected)
    still = x[:, None].expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(block(x, still), x)  # nothing moves: nothing is added


# -- statistics ------------------------------------------------------------------------------------
def fraction_below(t: float, freedom: int) -> float:
    """Student's density, summed up in small steps."""
    x = np.linspace(0, t, 20_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    scale = math.gamma((freedom + 1) / 2) / (math.gamma(freedom / 2) * math.sqrt(freedom * math.pi))
    return 0.5 + scale * float(np.trapezoid(density, x))


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)],
)
def test_quantiles_are_students(freedom, published):
    assert t_quantile(0.975, freedom) == pytest.approx(published, abs=5e-4)
    for fraction in (0.6, 0.9, 0.995):
        assert fraction_below(t_quantile(fraction, freedom), freedom) == pytest.approx(
            fraction, abs=1e-5
        )
    for t in (0.0, 0.7, -2.3):
        expected = 2 * (1 - fraction_below(abs(t), freedom))
        assert two_sided(t, freedom) == pytest.approx(expected, abs=1e-5)


def test_student_by_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 5, 17):
        assert t_quantile(0.99, freedom) == pytest.approx(stats.t.ppf(0.99, freedom))
        assert two_sided(1.7, freedom) == pytest.approx(2 * stats.t.sf(1.7, freedom))


def test_intervals_by_their_definition():
    sample = [0.31, 0.28, 0.35]
    result = interval(sample)
    assert result.mean == pytest.approx(statistics.mean(sample))
    assert result.half == pytest.approx(4.303 * statistics.stdev(sample) / math.sqrt(3), rel=1e-3)
    assert interval([0.2]).half is None
    assert interval([0.2]).points() == "20.0"
    assert not interval([0.2]).excludes_zero
    assert interval([0.1, 0.1]).points(signed=True) == "+10.0 ± 0.0"


def test_differences_are_taken_seed_by_seed():
    ours, theirs = {0: 0.30, 1: 0.208, 2: 0.419}, {2: 0.40, 1: 0.19, 0: 0.28, 7: 0.9}
    difference = paired(ours, theirs)
    assert difference.values == pytest.approx((0.02, 0.018, 0.019))
    assert difference.excludes_zero
    assert paired(ours, {5: 0.1}) is None


def simulated_values(rng, seeds, recordings, spreads, samples=400):
    """(seeds, 1 + samples) means over recordings, with spreads of seeds, recordings and both."""
    of_seeds, of_recordings, of_both = spreads
    table = rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_recordings, (1, recordings))
    table = table + rng.normal(0, of_both, (seeds, recordings))
    weights = draws(recordings, samples, int(rng.integers(1 << 30))) / recordings
    return table, table @ weights.T


def test_an_effect_is_a_hierarchical_bootstrap_by_its_plain_definition():
    """A loop that draws recordings and then seeds, one sample after the other."""
    rng = np.random.default_rng(3)
    n, recordings = 6, 12
    table, values = simulated_values(rng, n, recordings, (1.0, 1.5, 1.0), samples=4000)
    ours = effect(values, recordings)
    means = []
    for _ in range(4000):
        columns = rng.integers(recordings, size=recordings)
        rows = rng.integers(n, size=n)
        by_recordings = table[:, columns].mean()
        by_seeds = table[np.ix_(rows, columns)].mean() - by_recordings
        factor = math.sqrt(recordings / (recordings - 1))
        means.append(factor * (by_recordings - table.mean()) + math.sqrt(n / (n - 1)) * by_seeds)
    error = statistics.pstdev(means)
    assert ours.value == pytest.approx(table.mean())
    assert ours.between_seeds == pytest.approx(table.mean(1).std(ddof=1))
    assert ours.by_recordings == pytest.approx(
        table.mean(0).std(ddof=1) / math.sqrt(recordings), rel=0.05
    )
    variances = (error**2 - ours.by_recordings**2, ours.by_recordings**2)
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 5 + variances[1] ** 2 / 11)
    assert ours.half == pytest.approx(t_quantile(0.975, math.floor(freedom)) * error, rel=0.08)
    assert ours.p == pytest.approx(two_sided(ours.value / error, math.floor(freedom)), abs=0.02)


@pytest.mark.parametrize("spreads", [(1, 0, 0), (0.2, 2, 0.5), (1, 1, 1)])
def test_intervals_cover_as_often_as_they_say(spreads):
    rng = np.random.default_rng(0)
    effects = [
        effect(simulated_values(rng, 5, 12, spreads, samples=200)[1], 12) for _ in range(300)
    ]
    assert 0.92 <= np.mean([abs(e.value) <= e.half for e in effects]) <= 0.995
    assert np.mean([e.p < 0.05 for e in effects]) == np.mean([e.excludes_zero for e in effects])


def test_effects_of_few_seeds_and_missing_values():
    values = np.array([[0.1, 0.1, 0.2], [np.nan, 0.2, 0.2]])
    single = effect(values, 12)
    assert (single.value, single.half, single.p, single.seeds) == (0.1, None, None, 1)
    assert effect(values[1:], 12) is None
    assert paired_effect({1: values[0]}, {2: values[0]}, 12) is None
    same = effect(np.full((3, 5), 0.5), 12)
    assert (same.half, same.p, same.excludes_zero) == (0.0, 0.0, True)


def test_holm_by_its_definition():
    """Reject the smallest while p <= 0.05 / (those that are left); stop at the first that is not."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        p = (rng.random(6) ** 3).tolist()
        rejected = set()
        for rank, i in enumerate(sorted(range(6), key=p.__getitem__)):
            if p[i] > 0.05 / (6 - rank):
                break
            rejected.add(i)
        assert {i for i, value in enumerate(holm(p)) if value <= 0.05} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_the_number_of_seeds_finds_the_effect_as_often_as_it_says():
    n = seeds_needed(0.01, 0.012, 0.0, 1)
    rng = np.random.default_rng(2)

    def power(seeds):
        samples = rng.normal(0.01, 0.012, (4000, seeds))
        error = samples.std(1, ddof=1) / math.sqrt(seeds)
        return np.mean(samples.mean(1) / error > t_quantile(0.975, seeds - 1))

    assert 0.78 < power(n) < 0.9
    assert smallest_found(n, 0.012, 0.0, 1) <= 0.01 < smallest_found(n - 1, 0.012, 0.0, 1)
    assert seeds_needed(0.01, 0.012, 0.0, 10) > n
    assert seeds_needed(0.01, 0.012, 0.009, 1) is None  # the recordings are too few


# -- scores ----------------------------------------------------------------------------------------
def random_frames(seed: int = 0, recordings: int = 3, number: int = 120) -> LabelledFrames:
    """Objects that move and rest for some seconds; detections near them, with misses and others."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype([(n, "f4") for n in ("x", "y", "w", "h", "class_id", "track_id")])
    names, ends, boxes, found = [], [], [], []
    for r in range(recordings):
        names.append(f"r{r}")
        ends.append(np.arange(1, number + 1) * 50_000)
        rest_at = rng.integers(5, 20, 3)
        in_frames, detections = [], []
        for t in range(number):
            rows = np.zeros(3, dtype)
            for k in range(3):
                moved = min(t, rest_at[k]) * (k + 1)
                rows[k] = (10 + moved, 20 + 30 * k, 14 + 12 * k, 16 + 10 * k, k % 2, k)
            in_frames.append(rows)
            kept = rows[rng.random(3) < 0.7]
            hits = np.array(
                [
                    (
                        b["x"] + rng.normal(0, 2),
                        b["y"],
                        b["x"] + b["w"],
                        b["y"] + b["h"],
                        rng.random(),
                        rng.random(),
                        b["class_id"],
                    )
                    for b in kept
                ],
                np.float32,
            ).reshape(-1, 7)
            others = [
                (x, 80, x + 10, 95, rng.random(), 0.5 * rng.random(), k)
                for k, x in ((0, 90), (1, 200), (0, 230))
            ]
            detections.append(np.concatenate((hits, np.array(others, np.float32))))
        boxes.append(in_frames)
        found.append(detections)
    return labelled_frames(names, ends, boxes, found)


def test_scores_are_those_of_an_evaluation():
    """All groups as `evspan evaluate` breaks them down; a sample: its recordings evaluated alone."""
    frames, classes = random_frames(), ["a", "b"]
    config = EvaluationConfig(rest_bins_s=list(scores.RESTS), speed_bins=list(scores.SPEEDS))
    weights = np.array([[1.0, 1, 1], [0, 1, 0]])
    values = scores.measures(frames, classes, config, weights)
    whole = breakdown(frames, classes, config)
    metrics = coco_metrics(scored(frames, config)[0], classes)
    assert values["ap"][0] == pytest.approx(metrics.ap, abs=1e-6)
    assert values["ap_small"][0] == pytest.approx(metrics.ap_small, abs=1e-6)
    assert values["ap/class/b"][0] == pytest.approx(metrics.per_class["b"], abs=1e-6)
    tested = 0
    for name, rows, edges in (
        ("rest", whole.by_rest, scores.RESTS),
        ("speed", whole.by_speed, scores.SPEEDS),
    ):
        for bin_name, row in zip(scores.bin_names(edges), rows, strict=True):
            if not row["boxes"]:
                assert f"ap/{name}/{bin_name}" not in values
                continue
            tested += 1
            assert values[f"ap/{name}/{bin_name}"][0] == pytest.approx(row["ap"], abs=1e-6)
    assert tested >= 6
    one = whole.per_recording["r1"]
    assert values["ap"][1] == pytest.approx(one["ap"], abs=1e-6)
    assert values["ap/since/0-5"][0] != values["ap/since/5-10"][0]


def test_boxes_that_are_found_by_the_definition():
    """Every confidence is tried; a detection is right if it covers a box of its class by half."""
    frames, classes = random_frames(), ["a", "b"]
    config = EvaluationConfig()
    values = scores.measures(frames, classes, config, np.array([[1.0, 1, 1], [0, 2, 1]]))
    chosen, kept = scored(frames, config)
    rest = motion(frames, config.still_speed).rest_s[kept]
    x1, y1, x2, y2, objectness, class_score, of_class = chosen.detections.T
    confidence = objectness * class_score
    boxes = chosen.boxes
    left = np.maximum(x1[:, None], boxes["x"])
    right = np.minimum(x2[:, None], boxes["x"] + boxes["w"])
    top = np.maximum(y1[:, None], boxes["y"])
    bottom = np.minimum(y2[:, None], boxes["y"] + boxes["h"])
    overlap = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
    union = ((x2 - x1) * (y2 - y1))[:, None] + boxes["w"] * boxes["h"] - overlap
    hits = overlap >= 0.5 * union
    hits &= of_class[:, None] == boxes["class_id"]
    hits &= chosen.detection_frame[:, None] == chosen.box_frame
    assert hits.sum(0).max() == hits.sum(1).max() == 1
    precise = [c for c in confidence if hits[confidence >= c].any(1).mean() >= 0.5]
    assert 0 < min(precise) < max(confidence)
    found = hits[confidence >= min(precise)].any(0)
    assert 0 < found.mean() < hits.any(0).mean()
    recording = chosen.recording[chosen.box_frame]
    for name, group in (("0.5-1", (rest >= 0.5) & (rest < 1)), ("long", rest >= 4)):
        assert values[f"found/rest/{name}"][0] == pytest.approx(found[group].mean())
        again = np.array([0, 2, 1])[recording[group]]
        expected = np.average(found[group], weights=again)
        assert values[f"found/rest/{name}"][1] == pytest.approx(expected)
    assert scores.confidence_of_half([]) == np.inf


def test_scores_are_kept_and_damaged_ones_are_not(tmp_path):
    score = scores.Score(12, {"ap": np.array([0.5, np.nan]), "ap/rest/8+": np.array([0.25, 1.0])})
    assert scores.read_score(tmp_path) is None
    scores.write_score(tmp_path, score)
    read = scores.read_score(tmp_path)
    assert read.recordings == 12
    assert list(read.values) == ["ap", "ap/rest/8+"]
    np.testing.assert_array_equal(read.values["ap"], score.values["ap"])
    path = tmp_path / scores.SCORE
    path.write_bytes(path.read_bytes()[:-40])
    assert scores.read_score(tmp_path) is None


# -- the page --------------------------------------------------------------------------------------
def fake_scores(experiment, values, seeds=5, recordings=12, steps=None):
    """Scores of variants: value, plus a spread by seed and by recording; the seed of 0 of what is `once`."""
    rng = np.random.default_rng(0)
    found = {}
    shared = rng.normal(0, 0.01, 401)
    shared[0] = 0
    for (variant, measure), value in values.items():
        for seed in range(1 if experiment.variant(variant).once else seeds):
            of_seed = value + np.random.default_rng([seed, 7]).normal(0, 0.03)
            of_variant = np.random.default_rng([seed, len(variant)]).normal(0, 0.002)
            for on in experiment.scored_on:
                key = Key(
                    experiment.name,
                    variant,
                    seed,
                    on,
                    experiment.steps_of(experiment.variant(variant), 1),
                )
                score = found.setdefault(key, scores.Score(recordings, {}))
                score.values[measure] = of_seed + of_variant + shared
    return found


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_has_differences_their_correction_and_what_is_missing(tmp_path):
    values = {
        ("continued", "ap_small"): 0.30,
        ("identity", "ap_small"): 0.301,
        ("fast_gates", "ap_small"): 0.33,
        ("continued", "ap"): 0.25,
        ("fast_gates", "ap"): 0.28,
    }
    results = Results(fake_scores(ATTENTION, values), planned={"attention": 8})
    text = write_page(tmp_path, [ATTENTION], results)
    assert text == (tmp_path / "report.md").read_text()
    rows = rows_of(text.partition("Small objects:")[2].partition("All objects:")[0])
    by_variant = {row[0]: row for row in rows}
    expected = results.difference(ATTENTION, ("fast_gates", "continued"), "ap_small", "learn-v3")
    fast = by_variant["attention, gates ten times as fast"]
    assert fast[1] == "5"
    assert fast[3] == "baseline continued"
    assert fast[4] == f"**{expected.points(signed=True)}**"
    small = fast[5] == "< 0.001"
    assert 10 * expected.p == pytest.approx(0 if small else float(fast[5]), abs=1e-3)
    assert by_variant["attention, identity start"][4].startswith("+")
    assert by_variant["spatial part, fast gates"][2:5:2] == ["missing", "missing"]
    assert "8 comparisons missing" in text
    assert "n = 0 to 5 seeds each of 8 planned, 12 recordings" in text
    assert "gates ten times as fast is above baseline continued by" in text
    assert "gains above" in text
    captions = re.findall(r"\*(?:Table|Figure) \d+\..*?\*\n", text)
    assert len(captions) >= 6
    assert all("n = " in c or "seeds" in c for c in captions)
    drawn = ElementTree.parse(tmp_path / "attention-effects.svg").getroot()
    words = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("missing") == 8 + 9 + 2  # in each panel; what it does not ask is left out
    assert len(drawn.findall(".//{*}circle")) == 3 + 1  # and one form against another


def test_the_pilot_is_stated_once(tmp_path, monkeypatch):
    """A later pilot of the same folder does not change what was stated."""
    values = {("one_rate", "ap"): 0.2, ("all_rates", "ap"): 0.25}
    ours = study_in(tmp_path, "--only", "rate", "--pilot")
    results = Results(fake_scores(RATE, values, seeds=study.PILOT_SEEDS))
    monkeypatch.setattr(study.Study, "results", lambda self: results)
    study._write_pilot(ours)
    stated = json.loads((tmp_path / study.PILOT).read_text())
    families = stated["rate"]["families"]
    assert families["At 10 ms"] == dataclasses.asdict(power_of(RATE, results)["At 10 ms"])
    results = Results(fake_scores(RATE, values, seeds=2))
    study._write_pilot(ours)
    assert json.loads((tmp_path / study.PILOT).read_text()) == stated
    text = write_page(tmp_path, [RATE], dataclasses.replace(results, pilot=stated))
    assert f"stated on {stated['rate']['date']}, before the other runs, from a pilot of 3" in text


def test_comparisons_on_several_sets_are_corrected_together(tmp_path):
    values = {("one_rate", "ap"): 0.2, ("all_rates", "ap"): 0.2}
    found = fake_scores(RATE, values, seeds=4)
    for key, score in found.items():
        if key.variant == "all_rates" and key.on == "rate-10-v1":
            score.values["ap"] = score.values["ap"] + 0.008 * (1 + key.seed % 2)
    results = Results(found)
    text = write_page(tmp_path, [RATE], results)
    pair = ("all_rates", "one_rate")
    plain = [results.difference(RATE, pair, "ap", f"rate-{ms}-v1").p for ms in (50, 25, 10)]
    shown = [float(row[5]) for row in rows_of(text) if row[0] == "50, 25 and 10 ms"]
    assert shown == pytest.approx(holm(plain), abs=6e-4)
    assert text.count("p of 3 comparisons") == 3


def test_the_cost_of_the_published_start_is_stated(tmp_path):
    values = {
        ("base", "ap"): 0.3,
        ("published_start", "ap"): 0.1,
        ("continued", "ap"): 0.31,
        ("published", "ap"): 0.29,
    }
    results = Results(fake_scores(ATTENTION, values, seeds=3))
    text = write_page(tmp_path, [ATTENTION], results)
    line = next(line for line in text.splitlines() if line.startswith("Right after the branch"))
    base = results.by_seed(ATTENTION, "base", "ap", "learn-v3")[0][0]
    starts = results.by_seed(ATTENTION, "published_start", "ap", "learn-v3").values()
    cost = 100 * (statistics.mean(values[0] for values in starts) - base)
    assert f"changes the baseline's AP by {cost:+.1f} ± " in line
    assert "points (3 seeds); after the last step it is -2.0 ± " in line


def test_detections_on_recordings_without_boxes_are_counted(tmp_path, monkeypatch):
    asked = []

    def infer(words):
        asked.append(Path(words[2]).name)
        lines = [{"detections": [{}] * k} for k in range(len(asked) + 1)]
        Path(words[words.index("--json") + 1]).write_text("\n".join(map(json.dumps, lines)))
        sys.exit(0)

    monkeypatch.setattr(real_events, "evspan", infer)
    for name in ("a.raw", "b.dat", "README.md"):
        (tmp_path / name).touch()
    out = tmp_path / "out"
    assert real_events.detections_per_frame(out) is None
    real_events.main("run", str(tmp_path), str(out), "cpu")
    assert asked == ["a.raw", "b.dat"]
    assert real_events.detections_per_frame(out) == pytest.approx((0 + 1 + 0 + 1 + 2) / 5)


def test_the_page_states_the_power_of_the_pilot(tmp_path):
    values = {(variant, m): 0.3 for variant in ATTENTION.pilot for m in ("ap", "ap_small")}
    results = Results(fake_scores(ATTENTION, values, seeds=3))
    powers = power_of(ATTENTION, results)
    power = powers["Small objects"]
    difference = results.difference(ATTENTION, ("fast_gates", "continued"), "ap_small", "learn-v3")
    assert power.between_seeds == difference.between_seeds
    assert power.needed == seeds_needed(
        0.01, difference.between_seeds, difference.by_recordings, 10
    )
    assert "(there was no pilot): 3 seeds" in write_page(tmp_path, [ATTENTION], results)
    families = {name: dataclasses.asdict(power) for name, power in powers.items()}
    pilot = {"attention": {"date": "2026-01-02", "families": families}}
    text = write_page(tmp_path, [ATTENTION], dataclasses.replace(results, pilot=pilot))
    assert "stated on 2026-01-02, before the other runs, from a pilot of 3 seeds" in text
    assert f"| Small objects | 1.0 | {100 * power.between_seeds:.2f} |" in text


def test_the_curve_over_time_at_rest_is_drawn(tmp_path):
    values = {}
    for bias in (0, 2):
        for i, frames in enumerate((5, 20, 80)):
            variant = f"frames_{frames}_bias_{bias}"
            values[variant, "found/rest/long"] = 0.1 + 0.1 * i
            for name in scores.bin_names(scores.RESTS)[: 6 - bias]:
                values[variant, f"found/rest/{name}"] = 0.1 + 0.1 * i
    text = write_page(tmp_path, [LENGTH], Results(fake_scores(LENGTH, values, seeds=3)))
    assert "T = 80, forget bias 0 is above T = 5, forget bias 0 by +20." in text
    assert "Longer sequences than trained (`rests-long-v1`): missing" in text
    drawn = ElementTree.parse(tmp_path / "length-rest.svg").getroot()
    words = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"T = 5", "T = 20", "T = 80", "8+", "seconds at rest"} <= set(words)
    lines = [line for line in drawn.findall(".//{*}polyline") if line.find("{*}title") is not None]
    assert [len(line.get("points", "").split()) for line in lines[:6]] == [6, 6, 6, 4, 4, 4]


def test_an_empty_page_and_one_of_every_experiment(tmp_path):
    text = write_page(tmp_path, list(EXPERIMENTS.values()), Results({}))
    assert text.count("Nothing is scored yet.") == 4
    found = {}
    for experiment in EXPERIMENTS.values():
        found |= fake_scores(
            experiment, {(variant.name, "ap"): 0.2 for variant in experiment.variants}, seeds=2
        )
    real = {("default_none", 0): 3.0, ("default_none", 1): 5.0}
    text = write_page(tmp_path, list(EXPERIMENTS.values()), Results(found, real=real))
    assert "| default | 2 | 4.00 ± 12.71 |" in text
    assert "![rate](rate.svg)" in text
    for path in tmp_path.glob("*.svg"):
        ElementTree.parse(path)
    for name in re.findall(r"\]\((.*?\.svg)\)", text):
        assert (tmp_path / name).exists()


def test_points_are_drawn_where_they_belong(tmp_path):
    line = Line("a < b", [(0, 0.0), (100, 0.5)], halves=[None, 0.1])
    write_svg(tmp_path / "a.svg", [[Panel("AP by step", "step", "AP", [line])]], "foot")
    mean, bar = (
        [tuple(map(float, p.split(","))) for p in e.get("points").split()]
        for e in ElementTree.parse(tmp_path / "a.svg").getroot().findall(".//{*}polyline")
    )
    assert mean[0][0] < mean[1][0]
    assert mean[0][1] > mean[1][1]
    height = mean[0][1] - mean[1][1]
    assert [abs(y - mean[1][1]) for _, y in bar] == pytest.approx([height / 5] * 2, abs=0.2)


def test_a_mistake_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        study.main(["--folder", str(tmp_path), "--device", "cpu", "--only", "soze"])
    output = capsys.readouterr().err
    assert ended.value.code == 2
    assert output.startswith("error: --only")
    assert output.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        study.main(["--folder", str(tmp_path), "--device", "cpu", "--report"])
    assert ended.value.code == 2
    assert "no runs to report" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_and_plan_explain_the_experiments(capsys):
    with pytest.raises(SystemExit):
        study.main(["--help"])
    output = capsys.readouterr().out
    assert all(name in output for name in EXPERIMENTS)
    assert max(map(len, output.splitlines())) < 140
