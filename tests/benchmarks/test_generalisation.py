"""The study of generalisation: its report, and what it refuses."""

import json
import statistics

import generalisation
import pytest
from evspan.conf.errors import UserError
from learning.intervals import t_quantile

AP = {
    ("none", "default"): [0.30, 0.34, 0.32],
    ("none", "night"): [0.10, 0.16, 0.10],
    ("strong", "default"): [0.31, 0.35, 0.33],
    ("strong", "night"): [0.20, 0.21],  # the third seed is not finished
}


def study_in(folder, *words):
    parser = generalisation._parser()
    options = ["--folder", str(folder), "--presets", "none,strong", "--domains", "night", *words]
    return generalisation.study_from(parser.parse_intermixed_args(options))


def test_the_report_has_means_intervals_and_paired_differences(tmp_path):
    study = study_in(tmp_path)
    for (preset, domain), values in AP.items():
        for seed, value in enumerate(values):
            folder = generalisation._results(study.run(preset, seed), domain)
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({"ap": value, "ap50": 2 * value}))
    text = generalisation.write_report(study)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.count("|") > 2}
    assert list(rows) == ["AP", "---", "none", "strong", "strong less none, paired", "AP50"]
    assert "for 600 steps, 2 of 3 seeds finished, some cells with more; held-out" in text
    half = t_quantile(0.975, 2) * statistics.stdev(AP["none", "night"]) / 3**0.5
    ap = text.partition("| AP50")[0]
    assert f"| none | 32.0 ± {100 * t_quantile(0.975, 2) * 0.02 / 3**0.5:.1f} | 12.0 ±" in ap
    assert f"12.0 ± {100 * half:.1f}" in ap
    half = t_quantile(0.975, 1) * statistics.stdev([0.10, 0.05]) / 2**0.5
    assert f"| strong less none, paired | +1.0 ± 0.0 | +7.5 ± {100 * half:.1f} |" in ap
    assert json.loads((tmp_path / "report.json").read_text())["values"]["ap"][
        "strong on night"
    ] == {
        "0": 0.20,
        "1": 0.21,
    }


def test_another_setting_in_the_same_folder_is_refused(tmp_path):
    generalisation._check_setting(study_in(tmp_path))
    generalisation._check_setting(study_in(tmp_path, "--seeds", "5", "--presets", "none,light"))
    with pytest.raises(UserError, match="has steps 600; give the same"):
        generalisation._check_setting(study_in(tmp_path, "--steps", "9"))
    with pytest.raises(UserError, match="unknown domains"):
        study_in(tmp_path, "--domains", "noon")


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_small_study_trains_evaluates_and_continues(tmp_path, capsys):
    words = ["--folder", str(tmp_path), "--presets", "none", "--domains", "fast", "--seeds", "1"]
    words += ["--steps", "2", "--train", "1", "--val", "1", "--seconds", "1", "parallel.threads=1"]
    generalisation.main(words)
    assert (tmp_path / "runs" / "none-0" / "on-fast" / "metrics.json").exists()
    before = capsys.readouterr().out
    generalisation.main(words)
    again = capsys.readouterr().out
    assert "== evspan train" in before
    assert "== evspan train" not in again
