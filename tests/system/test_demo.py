"""The demo's records, table and last line, and that its commands are valid."""

import json
import re
from pathlib import Path

import evspan.launch.cli.infer
import evspan.launch.cli.simulate
import pytest
from evspan.conf.compose import save_config
from evspan.launch import demo
from evspan.launch.cli import demo as cli
from evspan.launch.cli.grammar import evaluate_overrides
from evspan.launch.cli.run_defaults import with_run_config
from support.composed_configs import composed

pytestmark = pytest.mark.slow

METRICS = {"ap": 0.41249, "ap50": 0.7125, "ap_small": 0.2, "ap_medium": 0.55, "ap_large": None}
TIMES = {"simulate": 30.06, "prep": 20.0, "train": 200.5, "evaluate": 9.0, "infer": 12.0}


def small_parts(folder):
    """Real commands that take a second each; the third fails."""
    raw, shards = folder / "raw", folder / "shards"
    return [
        demo.Part(
            "simulate",
            [
                "simulate",
                str(raw),
                "--recordings",
                "val=1",
                "--seconds",
                "0.2",
                "--width",
                "160",
                "--height",
                "160",
            ],
            raw,
        ),
        demo.Part(
            "prep", ["prep", f"source={raw}", f"output={shards}", "frames.downsample=4"], shards
        ),
        demo.Part(
            "evaluate",
            ["evaluate", str(folder / "run"), f"dataset.root={shards}"],
            folder / "evaluation",
        ),
    ]


def test_commands_are_accepted(tmp_path):
    simulate, prep, train, evaluate, infer = demo.demo_parts(tmp_path, demo.CPU_RANKS)
    simulate_args = evspan.launch.cli.simulate._parser().parse_args(simulate.arguments[1:])
    assert simulate_args.recordings["train"] >= 8
    assert simulate_args.recordings["val"] >= 2
    assert simulate_args.format == "raw"
    config, _ = composed("prep", *prep.arguments[1:])
    assert config.frames.downsample == 4
    assert config.source == str(simulate_args.out)
    config, choices = composed("train", *train.arguments[1:])
    assert choices["experiment"] == "demo"
    assert choices["size"] == "micro"
    assert config.parallel.ranks == 2
    assert config.training.batch_size == demo.LANES
    assert config.model.fpn.enable_small_object_attention
    assert config.model.head.size_aware_loss
    save_config(config, Path(config.run_dir) / "config.yaml")  # as the training does
    overrides = evaluate_overrides(evaluate.arguments[1:])
    scored = with_run_config(composed("evaluate", *overrides)[0], overrides)
    assert scored.checkpoint == config.run_dir
    assert scored.evaluation.split == "val"
    assert scored.dataset.root == config.dataset.root
    assert scored.dataset.classes == config.dataset.classes
    infer_args = evspan.launch.cli.infer._parser().parse_args(infer.arguments[1:])
    assert [path.parent for path in infer_args.recording] == [simulate_args.out / "val"]
    assert str(infer_args.checkpoint) == config.run_dir


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (3, 2), (4, 4), (8, 4)])
def test_a_rank_for_each_gpu(tmp_path, gpus, ranks):
    assert demo.demo_ranks(gpus) == ranks
    _, _, train, evaluate, _ = demo.demo_parts(tmp_path, ranks)
    for part in (train, evaluate):
        assert f"parallel.ranks={ranks}" in part.arguments
    composed("train", *train.arguments[1:])  # refuses what does not divide


@pytest.mark.timeout(240)
def test_a_failed_part_is_named_and_the_demo_continues_from_there(tmp_path):
    folder = tmp_path / "demo"
    parts = small_parts(folder)
    with pytest.raises(demo.PartFailedError) as failed:
        demo.run_parts(parts, folder, keep=False)
    output = str(failed.value)
    assert failed.value.exit_code == 2
    assert "part evaluate" in output
    assert str(parts[2]) in output
    assert "--continue" in output
    recording = folder / "raw" / "val" / "val_000_td.raw"
    written, times = recording.stat().st_mtime_ns, json.loads((folder / demo.TIMES).read_text())
    assert times.keys() == {"simulate", "prep"}
    assert all(seconds > 0 for seconds in times.values())

    assert (
        demo.run_parts(parts[:2], folder, keep=True) == times
    )  # nothing ran, and the times are the recorded ones
    assert recording.stat().st_mtime_ns == written
    again = demo.run_parts(parts[:1], folder, keep=False)
    assert again.keys() == {"simulate"}
    assert recording.stat().st_mtime_ns > written


def test_a_part_that_runs_again_makes_later_ones_run_again(tmp_path):
    (tmp_path / demo.TIMES).write_text(json.dumps({"prep": 1.0}))
    simulate, prep, _ = small_parts(tmp_path)
    times = demo.run_parts([simulate, prep], tmp_path, keep=True)
    assert times.keys() == {"simulate", "prep"}
    assert times["prep"] != 1.0


def test_foreign_folders_are_kept(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert (tmp_path / "raw").is_dir()


def test_table(tmp_path):
    (tmp_path / "detections").mkdir()
    (tmp_path / "detections" / "val_000_overlay.gif").touch()
    text = "\n".join(cli.result_lines(demo.DemoResult(tmp_path, METRICS, TIMES)))
    rows = dict(re.findall(r"^  (\S.*?)\s{2,}(\S.*)$", text, re.MULTILINE))
    assert rows["AP 0.50:0.95"] == "0.412"
    assert rows["AP50"] == "0.713"
    assert rows["AP large"] == "-"
    assert rows["train"] == "200.5 s"
    assert rows["total"] == "271.6 s"
    assert rows["overlay"].endswith("val_000_overlay.gif")
    assert rows["TensorBoard"] == str(tmp_path / "run" / "tensorboard")
    assert rows["to open it"].endswith(f"--logdir {tmp_path / 'run' / 'tensorboard'}")


def test_closing_line():
    def line(metrics):
        return cli.last_line(demo.DemoResult(Path("demo"), metrics, TIMES))

    assert line(METRICS) == "demo: ap=0.412 ap50=0.713 seconds=272"
    assert line(dict(METRICS, ap=None, ap50=None)) == "demo: ap=0.000 ap50=0.000 seconds=272"


@pytest.mark.parametrize(("ap50", "code"), [(0.62, 0), (0.49, 1), (None, 1)])
def test_too_low_an_ap_fails(tmp_path, capsys, ap50, code):
    for part in demo.demo_parts(tmp_path, demo.CPU_RANKS):
        part.output.mkdir(parents=True)
    (tmp_path / demo.TIMES).write_text(json.dumps(TIMES))
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(dict(METRICS, ap50=ap50)))
    with pytest.raises(SystemExit) as ended:
        cli.main([str(tmp_path), "--continue"])
    output = capsys.readouterr()
    assert ended.value.code == code
    assert ("below 0.50" in output.err) == bool(code)
    result = demo.DemoResult(tmp_path, dict(METRICS, ap50=ap50), TIMES)
    assert output.out.splitlines()[-1] == cli.last_line(result)
