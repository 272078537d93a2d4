"""The learning study: recordings, equal budgets, changes by variant, statistics, a small run."""

import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from evspan.conf.errors import UserError
from evspan.data_prep.simulator import SimulatorConfig, simulate
from evspan.data_prep.simulator.recording_set import SimulatedSet, is_complete, write_recording
from evspan.data_prep.simulator.scene import LENGTHS, make_scene
from evspan.launch.cli import simulate as cli_simulate
from evspan.launch.sweep.registry import read_runs
from evspan.pipeline.history import append
from evspan.pipeline.tensorboard.writer import TensorBoardWriter
from learning import plan as plans
from learning import study
from learning.curves import Line, Panel, write_svg
from learning.intervals import interval, paired, t_quantile
from learning.recordings import FULL, QUICK, Recordings, RecordingSet, recordings_in
from learning.report import mean_curve, write_report
from support.composed_configs import composed

ROOT = Path(__file__).parents[2]
TINY = Recordings("tiny", 1, 1, 1, "")
EXTRA = ("parallel.threads=1",)


def plan_of(*words: str, folder: Path = Path("bench")) -> plans.Plan:
    args = study._parser().parse_intermixed_args([*words, "--folder", str(folder)])
    return study.options_from(args).plan


# -- the whole -------------------------------------------------------------------------------------
def run_study(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tests/benchmarks/learn.py", "--folder", str(folder), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.soak
@pytest.mark.timeout(420)
def test_quick_trains_two_variants_reports_them_and_continues(tmp_path):
    words = [
        "--quick",
        "--steps",
        "2",
        "--seeds",
        "1",
        "--frames",
        "10",
        "--evaluations",
        "1",
        "--lengths",
        "none",
        "--variants",
        "baseline,attention",
        *EXTRA,
    ]
    ran = run_study(tmp_path, *words)
    assert ran.returncode == 0, ran.stderr
    folder = tmp_path / "learn-v2-quick"
    summary = json.loads((folder / "report.json").read_text())
    assert summary["variants"].keys() == {"baseline", "attention"}
    assert summary["steps"] == 2
    for number, name in enumerate(summary["variants"]):
        metrics = json.loads(
            (folder / "runs" / str(number) / "evaluation" / "metrics.json").read_text()
        )
        assert summary["variants"][name]["ap"] == {
            "seeds": {"0": metrics["ap"]},
            "mean": metrics["ap"],
            "half": None,
        }
        assert {"ap_still", "ap_moving", "recall_still"} <= summary["variants"][name].keys()
        config = json.loads((folder / "runs" / str(number) / "config.json").read_text())
        assert config["model"]["fpn"]["enable_small_object_attention"] is (name == "attention")
    assert (folder / "report.md").read_text() in ran.stdout
    assert "Not finished" not in ran.stdout
    assert ("not bit-identical" in ran.stdout) == (summary["digest"] != QUICK.digest)
    assert (
        len(ElementTree.parse(folder / "curves.svg").getroot().findall(".//{*}polyline"))
        == 2 * 2 * 3
    )  # variants, thin and thick

    again = run_study(tmp_path, *words)
    assert again.returncode == 0
    assert again.stdout.count("done already") == 2
    assert "step " not in again.stdout.split("#")[0]


# -- the set ---------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_set_is_created_once_and_refused_when_it_has_changed(tmp_path, capfd):
    (tmp_path / "a" / ".set.writing" / "raw").mkdir(
        parents=True
    )  # of a killed attempt, as this folder without a table is
    (tmp_path / "a" / "set").mkdir()
    recordings = recordings_in(tmp_path / "a", TINY)
    assert not recordings.original
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


# -- plans -----------------------------------------------------------------------------------------
def test_every_run_has_the_same_budget_and_every_seed_all_runs():
    plan = plan_of("--seeds", "2", "optimizer.lr=0.001")
    assert plan.variants == plans.DEFAULT_VARIANTS
    assert plan.lengths == plan.bptt_lengths == plans.LENGTHS
    runs = [dict(o.split("=") for o in overrides) for overrides in plan.all_runs()]
    assert len(runs) == 2 * (6 + 5 + 4)
    assert all(run["optimizer.lr"] == "0.001" for run in runs)
    for run in runs:
        assert (
            int(run["training.sequence_length"]) * int(run["training.batch_size"])
            == plan.frames
            == 40
        )
        assert run["training.max_steps"] == "600"
        assert run["training.evaluate_every"] == "150"
    assert [run["seed"] for run in runs] == ["0"] * 15 + ["1"] * 15
    assert [
        int(run["training.sequence_length"]) for run in runs if run["experiment"] == "bench/length"
    ] == [*plans.LENGTHS, 40, 40, 40, 40] * 2
    cut = [run for run in runs if "training.bptt_frames" in run]
    assert [run["training.bptt_frames"] for run in cut] == [
        "2",
        "5",
        "10",
        "20",
    ] * 2  # 40 is the length of 40
    assert plan.bptt(40, 1) == plan.length(40, 1) in plan.all_runs()
    assert len({tuple(run.items()) for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--variants", "baseline,atention"], "unknown variant 'atention'"),
        (["--lengths", "2,x"], "'x' is not a number"),
        (["--lengths", "3"], "--frames 40"),
        (["--frames", "12", "--lengths", "2"], "chunks of 5 frames"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--variants", "none", "--lengths", "none", "--bptt", "none"], "nothing to run"),
        (["--bptt", "50"], "50 is more than the 40 frames"),
        (["training.bptt_frames=3"], "use --bptt"),
        (["seed=3"], "use --seeds"),
        (["training.batch_size=2"], "use --frames"),
        (["fast"], "not KEY=VALUE"),
    ],
)
def test_what_makes_no_sense_is_refused(words, part):
    with pytest.raises(UserError, match=re.escape(part)):
        plan_of(*words)


ATTENTION, TEMPORAL, SPATIAL = (
    "enable_small_object_attention",
    "attention_temporal",
    "attention_spatial",
)
CHANGES = {  # variant -> how its model differs from the baseline's
    "baseline": {},
    "size_aware": {"size_aware_loss": True},
    "attention": {ATTENTION: True},
    "size_aware_attention": {"size_aware_loss": True, ATTENTION: True},
    "attention_published": {ATTENTION: True, "identity_init": False},
    "size_aware_attention_published": {
        "size_aware_loss": True,
        ATTENTION: True,
        "identity_init": False,
    },
    "spatial": {ATTENTION: True, TEMPORAL: False},
    "temporal": {ATTENTION: True, SPATIAL: False},
    "channel": {ATTENTION: True, SPATIAL: False, TEMPORAL: False},
    "spatial_published": {ATTENTION: True, TEMPORAL: False, "identity_init": False},
    "temporal_published": {ATTENTION: True, SPATIAL: False, "identity_init": False},
    "attention_mixed": {ATTENTION: True},  # the mixing is in mixed_lanes.py
    "attention_published_mixed": {ATTENTION: True, "identity_init": False},
    "attention_fast_gates": {ATTENTION: True},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", plans.VARIANTS)
def test_a_variant_changes_what_it_says_and_nothing_else(variant):
    def flat(name):
        config = composed(
            "train", f"experiment=bench/{name}", f"hydra.searchpath=[file://{plans.CONF}]"
        )[0]
        model = {
            key: value
            for part in ("backbone", "fpn", "head")
            for key, value in vars(getattr(config.model, part)).items()
            if key != "name"
        }
        return model, dataclasses.replace(config, model=composed("train")[0].model)

    (model, rest), (base, base_rest) = flat(variant), flat("baseline")
    assert {key: value for key, value in model.items() if base[key] != value} == CHANGES[variant]
    changed = {"attention_fast_gates": {"gate_lr_multiplier": 10.0}}.get(variant, {})
    assert rest == dataclasses.replace(
        base_rest, optimizer=dataclasses.replace(base_rest.optimizer, **changed)
    )


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


def test_intervals_by_their_definition_and_they_cover_as_often_as_they_say():
    sample = [0.31, 0.28, 0.35]
    result = interval(sample)
    assert result.mean == pytest.approx(statistics.mean(sample))
    assert result.half == pytest.approx(4.303 * statistics.stdev(sample) / math.sqrt(3), rel=1e-3)
    assert interval([0.2]).half is None
    assert interval([0.2]).points() == "20.0"
    assert not interval([0.2]).excludes_zero
    assert interval([0.1, 0.1]).points(signed=True) == "+10.0 ± 0.0"
    rng = np.random.default_rng(0)
    inside = [
        abs(i.mean - 0.3) <= i.half
        for i in (interval(rng.normal(0.3, 0.02, 3).tolist()) for _ in range(2000))
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_differences_are_taken_seed_by_seed():
    ours, theirs = {0: 0.30, 1: 0.208, 2: 0.419}, {2: 0.40, 1: 0.19, 0: 0.28, 7: 0.9}
    difference = paired(ours, theirs)
    assert difference.values == pytest.approx((0.02, 0.018, 0.019))
    assert difference.excludes_zero
    assert paired(ours, {5: 0.1}) is None


# -- the report ------------------------------------------------------------------------------------
def fake_results(plan: plans.Plan, ap: dict[str, list[float]], **more: float) -> None:
    """Writes finished runs with these AP, by variant or length and seed, as the trainer does."""
    table = []
    keys = plan.keys()
    for number, overrides in enumerate(plan.all_runs()):
        values = dict(o.split("=") for o in overrides)
        name = values["experiment"].removeprefix("bench/")
        name = name.replace("length", values["training.sequence_length"])
        if "training.bptt_frames" in values:
            name = f"{values['training.bptt_frames']} of {name}"
        run = plan.folder / "runs" / str(number)
        table.append(
            {
                "folder": str(number),
                "overrides": [o for o in overrides if o.split("=")[0] in keys],
                "error": None,
            }
        )
        if int(values["seed"]) >= len(ap[name]):
            continue
        value = ap[name][int(values["seed"])]
        append(run, "start", step=0, of=plan.steps, attempt=1, host="n1", job="", pid=os.getpid())
        writer = TensorBoardWriter(run, enabled=True)
        for step in range(0, plan.steps + 1, plan.steps // 2):
            writer.write_scalars(
                {
                    "loss/total": 5 - value * step / plan.steps,
                    "evaluation/ap": value * step / plan.steps,
                },
                step,
            )
        writer.close()
        append(run, "done", step=plan.steps)
        (run / "evaluation").mkdir()
        metrics = {"ap": value, "ap50": 2 * value, "ap_small": None, "step": plan.steps, **more}
        (run / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    (plan.folder / "runs" / "sweep.json").write_text(json.dumps({"runs": table}))


def report_cells(plan: plans.Plan) -> list[list[str]]:
    """The cells of the report's lines."""
    text = write_report(
        plan, RecordingSet(Path("set"), "abc", True), read_runs(plan.folder / "runs").runs
    )
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_report_has_means_intervals_and_paired_differences(tmp_path):
    plan = plan_of(
        "--seeds",
        "3",
        "--variants",
        "baseline,attention",
        "--lengths",
        "2,10",
        "--bptt",
        "5,40",
        "--steps",
        "100",
        folder=tmp_path,
    )
    fake_results(
        plan,
        {
            "baseline": [0.30, 0.20, 0.40],
            "attention": [0.32, 0.221, 0.42],
            "2": [0.1, 0.2, 0.3],
            "10": [0.3, 0.1],
            "5 of 40": [0.1],
            "40": [0.4],
        },
    )
    variants, _, base, attention, lengths, _, two, ten, bptt, _, five, forty = report_cells(plan)
    assert bptt[0] == "frames"
    assert five[:3] == ["5", "1", "10.0"]
    assert forty[:3] == ["40", "1", "40.0"]
    assert variants == [
        "variant",
        "seeds",
        "AP",
        "AP50",
        "AP less baseline's",
    ]  # no small boxes: no column
    assert base == ["baseline", "3", "30.0 ± 24.8", "60.0 ± 49.7", ""]
    assert attention[0] == "attention: + attention"
    assert attention[-1] == "**+2.0 ± 0.1**"
    assert two[:3] == ["2", "3", "20.0 ± 24.8"]
    assert ten[:3] == ["10", "2", "20.0 ± 127.1"]
    assert lengths[-1] == "AP less 2's"
    assert ten[-1] == "+5.0 ± 190.6"
    assert "length sequence_length=10 seed=2 (waiting)" in (plan.folder / "report.md").read_text()
    summary = json.loads((plan.folder / "report.json").read_text())
    assert summary["variants"]["baseline"]["ap"]["seeds"] == {"0": 0.3, "1": 0.2, "2": 0.4}
    drawn = ElementTree.parse(plan.folder / "curves.svg").getroot()
    words = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"loss by step", "AP by step", "AP by length", "AP by BPTT length", "attention"} <= set(
        words
    )


def test_still_and_moving_objects_appear_when_an_evaluation_has_them(tmp_path):
    plan = plan_of(
        "--seeds",
        "2",
        "--variants",
        "none",
        "--lengths",
        "2,10",
        "--bptt",
        "none",
        "--steps",
        "100",
        folder=tmp_path,
    )
    fake_results(plan, {"2": [0.1, 0.2], "10": [0.3, 0.1]}, ap_still=0.05, ap_moving=0.25)
    heads, _, two, _ = report_cells(plan)
    assert heads[4:] == ["AP still", "AP moving", "AP less 2's", "AP still less 2's"]
    assert two[4:6] == ["5.0 ± 0.0", "25.0 ± 0.0"]
    assert "AP still and AP moving by length" in (plan.folder / "curves.svg").read_text()
    for run, step in (
        (0, 100),
        (1, 99),
    ):  # in the form of `evspan evaluate`; the second of an older checkpoint
        groups = {
            "still": {"ap": 0.4, "recall": 0.6, "boxes": 7},
            "moving": {"ap": None, "recall": 0.7, "boxes": 9},
        }
        (plan.folder / "runs" / str(run) / "evaluation-val").mkdir()
        (plan.folder / "runs" / str(run) / "evaluation-val" / "metrics.json").write_text(
            json.dumps({"step": step, "breakdown": {"stillness": groups}})
        )
    heads, _, two, ten = report_cells(plan)
    assert heads[4:8] == ["AP still", "AP moving", "recall still", "recall moving"]
    assert two[4:8] == ["22.5 ± 222.4", "25.0", "60.0", "70.0"]
    assert ten[4:8] == [
        "5.0 ± 0.0",
        "25.0 ± 0.0",
        "",
        "",
    ]


def test_runs_of_another_budget_are_not_mixed_in(tmp_path):
    plan = plan_of(
        "--seeds",
        "1",
        "--variants",
        "baseline",
        "--lengths",
        "none",
        "--bptt",
        "none",
        "--steps",
        "100",
        folder=tmp_path,
    )
    fake_results(plan, {"baseline": [0.3]})
    assert report_cells(plan)[2][1:3] == ["1", "30.0"]
    assert report_cells(dataclasses.replace(plan, steps=200))[2][1:3] == ["0"]
    assert report_cells(dataclasses.replace(plan, extra=("optimizer.lr=0.1",)))[2][1:3] == ["0"]


def test_a_mean_curve_is_of_the_steps_that_all_have():
    assert mean_curve([[(1, 2.0), (2, 4.0), (3, 1.0)], [(1, 4.0), (3, 3.0)]]) == [
        (1, 3.0),
        (3, 2.0),
    ]
    assert mean_curve([]) == []


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
        study.main(["--folder", str(tmp_path), "--quick", "--report", "--variants", "soze_aware"])
    output = capsys.readouterr().err
    assert ended.value.code == 2
    assert output.startswith("error: --variants")
    assert output.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        study.main(["--folder", str(tmp_path), "--report"])
    assert ended.value.code == 2
    assert "no runs to report" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_explains_the_variants(capsys):
    with pytest.raises(SystemExit):
        study.main(["--help"])
    output = capsys.readouterr().out
    assert all(name in output for name in plans.VARIANTS)
    assert max(map(len, output.splitlines())) < 140
