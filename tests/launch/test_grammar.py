"""One command-line grammar: input in another form ends in an error with the corrected command line."""

import re
import shlex

import pytest
from evspan.conf.quoting import has_several_values
from evspan.launch.cli import grammar, labels, prep
from evspan.launch.cli.command import parser_of
from evspan.launch.cli.config_arguments import parse_config_arguments
from evspan.launch.cli.config_keys import COMMANDS as CONFIG_COMMANDS
from evspan.launch.cli.config_keys import choices_of, keys_of
from evspan.launch.cli.grammar import Options, correct, evaluate_overrides
from evspan.launch.cli.main import COMMANDS, main, options_of

CORRECTIONS = [
    # the checkpoint is positional
    ("infer drive.raw --checkpoint runs/tiny", "infer runs/tiny drive.raw"),
    ("infer drive.raw --checkpoint=runs/tiny --nms 0.5", "infer runs/tiny drive.raw --nms 0.5"),
    ("infer --checkpoint runs/tiny a.raw b.raw", "infer runs/tiny a.raw b.raw"),
    ("infer drive.raw checkpoint=runs/tiny", "infer runs/tiny drive.raw"),
    ("infer drive_td.dat runs/tiny --output out", "infer runs/tiny drive_td.dat --output out"),
    ("infer a.raw b.raw runs/tiny", "infer runs/tiny a.raw b.raw"),
    ("infer drive.raw", "infer RUN drive.raw"),
    ("infer drive.raw --output out", "infer RUN drive.raw --output out"),
    ("evaluate checkpoint=runs/tiny dataset.root=s", "evaluate runs/tiny dataset.root=s"),
    ("evaluate dataset.root=s checkpoint='runs/a b'", "evaluate 'runs/a b' dataset.root=s"),
    ("evaluate --checkpoint runs/tiny dataset.root=s", "evaluate runs/tiny dataset.root=s"),
    ("evaluate dataset.root=s --checkpoint=runs/tiny", "evaluate runs/tiny dataset.root=s"),
    ("evaluate -m checkpoint=a,b", "evaluate a,b -m"),
    ("export --checkpoint runs/tiny tiny.onnx", "export runs/tiny tiny.onnx"),
    ("export checkpoint=runs/tiny tiny.onnx", "export runs/tiny tiny.onnx"),
    ("export tiny.onnx --checkpoint runs/tiny", "export runs/tiny tiny.onnx"),
    ("convert --checkpoint rvt.ckpt out.safetensors", "convert rvt.ckpt out.safetensors"),
    # commands with a config: positional words
    ("prep raw out", "prep source=raw output=out"),
    ("prep raw output=out", "prep source=raw output=out"),
    ("prep output=out raw", "prep output=out source=raw"),
    ("prep raw out dataset=gen4", "prep source=raw output=out dataset=gen4"),
    ("train shards runs/tiny", "train dataset.root=shards run_dir=runs/tiny"),
    ("train experiment gen4/small", "train experiment=gen4/small"),
    ("train optimizer.lr 3e-4 seed=1", "train optimizer.lr=3e-4 seed=1"),
    ("evaluate runs/tiny shards", "evaluate runs/tiny dataset.root=shards"),
    ("evaluate checkpoint=runs/tiny shards", "evaluate runs/tiny dataset.root=shards"),
    ("prep inof drive.raw", "prep info drive.raw"),
    ("submit evaluat runs/a", "submit evaluate runs/a"),
    # commands with a config: options
    ("train --lr 3", "train optimizer.lr=3"),
    ("train --lr=3", "train optimizer.lr=3"),
    ("train --lr", "train optimizer.lr=VALUE"),
    ("train --optimizer.lr 3", "train optimizer.lr=3"),
    ("train --optimizer-lr 3", "train optimizer.lr=3"),
    ("train --max-steps 7 --ranks 2", "train training.max_steps=7 parallel.ranks=2"),
    ("train --batch-size 4", "train training.batch_size=4"),
    ("evaluate runs/x --batch-size 4", "evaluate runs/x evaluation.batch_size=4"),
    ("prep --source raw --output out", "prep source=raw output=out"),
    ("prep raw --output out --bins 5", "prep source=raw output=out frames.bins=5"),
    ("train --experiment gen4/small", "train experiment=gen4/small"),
    ("train --compile", "train training.compile=true"),
    ("train --compile false", "train training.compile=false"),
    ("train --no-compile seed=3", "train training.compile=false seed=3"),
    ("submit --partition gpu --dry-run", "submit cluster.partition=gpu cluster.dry_run=true"),
    # resuming and starting weights
    ("train --resume", "train"),
    ("train run_dir=runs/a --resume", "train run_dir=runs/a"),
    ("train --resume runs/a", "train run_dir=runs/a"),
    ("train --resume=runs/a/checkpoints/step-00001000", "train run_dir=runs/a"),
    ("submit run_dir=runs/a --resume runs/b", "submit run_dir=runs/a"),
    ("train --no-resume", "train checkpoint.resume=false"),
    ("train --checkpoint runs/a", "train checkpoint.init_from=runs/a"),
    ("train checkpoint=runs/a", "train checkpoint.init_from=runs/a"),
    # several values
    ("train optimizer.lr=1e-3,2e-3", "sweep optimizer.lr=1e-3,2e-3"),
    ("train --lr 1e-3,2e-3", "sweep optimizer.lr=1e-3,2e-3"),
    ("submit seed=range(3) run_dir=runs/a", "sweep 'seed=range(3)' run_dir=runs/a"),
    ("train experiment=gen4/base,gen4/small", "sweep experiment=gen4/base,gen4/small"),
    ("train model.fpn.in_stages=2,3,4", "train 'model.fpn.in_stages=[2,3,4]'"),
    # commands with options
    ("simulate out=raw seconds=3", "simulate raw --seconds 3"),
    ("simulate out seed=1", "simulate out --seed 1"),
    ("simulate raw --seed 1 noise_hz=2", "simulate raw --seed 1 --noise-hz 2"),
    (
        "infer runs/a a.raw confidence=0.3 no_video=true",
        "infer runs/a a.raw --confidence 0.3 --no-video",
    ),
    ("infer runs/a a.raw no_video=false", "infer runs/a a.raw"),
    ("smoke ranks=2", "smoke --ranks 2"),
    ("prep status shards source=raw", "prep status shards --source raw"),
    ("export runs/a a.onnx batch=3", "export runs/a a.onnx --batch 3"),
]


@pytest.mark.parametrize(("line", "corrected"), CORRECTIONS, ids=[c[0] for c in CORRECTIONS])
def test_another_form_is_corrected_to_a_whole_command_line(line, corrected):
    correction = correct(shlex.split(line), options_of)
    assert correction is not None
    assert shlex.join(correction.argv) == corrected
    assert correction.message.endswith(f". Use: evspan {corrected}")
    assert "\n" not in correction.message
    assert correct(correction.argv, options_of) is None


RIGHT = [
    "",
    "train",
    "train --help",
    "train --lr 3 --help",
    "train experiment=gen4/small dataset.root=shards run_dir=runs/a 'training.profile=[5,9]'",
    "train --cfg job training.max_steps=7",
    "train -m optimizer.lr=1e-3,2e-3",
    "train --config-dir mine experiment=mine",
    "train +quux=3",
    "train --quux",
    "train training.max_steps",
    "train dataset.labels.class_map={0:0,3:1} 'run_dir=\"a,b\"'",
    "sweep run_dir=sweeps/a optimizer.lr=1e-3,2e-3",
    "prep source=raw output=out",
    "prep info drive.raw",
    "prep status shards --source raw",
    "evaluate runs/tiny dataset.root=shards",
    "evaluate dataset.root=shards runs/tiny",
    "evaluate -m a,b parallel.ranks=2",
    "evaluate compare a b --json",
    "infer runs/tiny drive.raw --output out",
    "infer weights.safetensors a.raw b.dat",
    "infer runs/lr=1e-3 drive.raw",
    "infer runs/tiny ./output=3.raw",
    "export runs/tiny tiny.onnx",
    "convert rvt.ckpt out.safetensors --classes a,b",
    "simulate raw --recordings train=8,val=2",
    # plain words that are also the name of a positional, an option or a flag
    "simulate out --recordings train=8,val=2",
    "simulate seed --recordings train=8,val=2",
    "simulate overwrite --recordings train=8,val=2",
    "infer runs/a recording --split=val",
    "prep preview source a.png --split=val",
    "labels pseudo runs/a source pseudo --split=train",
    "status runs",
    "completion bash",
]


@pytest.mark.parametrize("line", RIGHT)
def test_the_right_form_is_left_alone(line):
    assert correct(shlex.split(line), options_of) is None


def test_the_command_reports_the_correction(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "optimizer.lr=1e-3,2e-3"])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: optimizer.lr has several values, a run for each: that is a sweep. "
        "Use: evspan sweep optimizer.lr=1e-3,2e-3\n"
    )


def test_several_mistakes_are_corrected_at_once():
    correction = correct(shlex.split("train shards --lr 3 --max-steps 5 --resume"), options_of)
    assert correction.message == (
        "evspan train takes key=value; evspan train takes key=value, where --lr has no dashes; "
        "evspan train takes key=value, where --max-steps has no dashes; "
        "a run resumes by itself from the newest checkpoint in its run_dir, without --resume. "
        "Use: evspan train dataset.root=shards optimizer.lr=3 training.max_steps=5"
    )


def test_the_checkpoint_of_evaluate_becomes_an_override():
    assert evaluate_overrides(["runs/a", "seed=1"]) == ["checkpoint='runs/a'", "seed=1"]
    assert evaluate_overrides(["seed=1", "it's"]) == ["seed=1", "checkpoint='it\\'s'"]
    assert evaluate_overrides(["--cfg", "job", "seed=1"]) == ["--cfg", "job", "seed=1"]
    assert evaluate_overrides(["-m", "a,b"]) == ["-m", "checkpoint=a,b"]
    assert evaluate_overrides(["seed=1"]) == ["seed=1"]


@pytest.mark.parametrize(
    ("value", "several"),
    [
        ("1", False),
        ("1,2", True),
        ("[1,2]", False),
        ("[1,2],[3]", True),
        ("{0:0,3:1}", False),
        ("'a,b'", False),
        ("'a,b',c", True),
        ("range(1,4)", True),
        ("choice(a,b)", True),
        ("", False),
    ],
)
def test_values_of_a_sweep_are_recognised(value, several):
    assert has_several_values(value) is several


def test_the_tables_name_the_subcommands_and_keys_that_exist():
    assert set(grammar.SUBCOMMANDS["prep"]) == set(prep.TOOLS)
    assert set(grammar.SUBCOMMANDS["labels"]) == set(labels.TOOLS)
    for command, names in grammar.POSITIONAL_KEYS.items():
        assert set(names) <= set(keys_of(command))
    assert set(grammar.TAKE_CHECKPOINT) <= set(COMMANDS)


def test_keys_and_choices_are_those_of_the_config():
    keys = keys_of("train")
    assert keys["training.max_steps"] is int
    assert keys["run_dir"] is str
    assert "training" not in keys
    assert "checkpoint" in keys_of("evaluate")
    assert "gen4/small" in choices_of("train")["experiment"]
    assert "maxvit_yolox/default" in choices_of("train")["model"]
    assert set(choices_of("evaluate")) == {"dataset"}


def test_commands_with_a_config_take_the_options_that_the_grammar_lets_pass():
    values = {"--cfg": "job", "-c": "job"}
    for option in grammar.CONFIG_FLAGS:
        parse_config_arguments([option], "evspan train")
    for option in grammar.CONFIG_VALUE_OPTIONS:
        parse_config_arguments([option, values.get(option, "folder")], "evspan train")


def test_options_come_from_the_parser_of_a_command():
    options = options_of(["simulate"])
    assert isinstance(options, Options)
    assert options.positionals == {"out": []}
    assert options.options["--format"] == ["dat", "h5", "raw"]
    assert options.options["--seed"] == []
    assert "--overwrite" in options.flags
    assert options_of(["prep", "status"]).positionals


# -- examples in the helps -----------------------------------------------------------------------
def examples(text: str) -> list[list[str]]:
    """The arguments of `evspan` in the examples of a help text."""
    found = []
    section = text.partition("\nexample")[2].partition("\n\n")[0]
    for line in re.sub(r" *\\\n *", " ", section).splitlines():
        command = re.sub(r"\s+#.*| {3,}.*| \| .*| > .*", "", line.strip())
        command = command.removeprefix("CUDA_VISIBLE_DEVICES= ")
        if command.startswith("evspan "):
            found.append([word for word in shlex.split(command)[1:] if word != "..."])
    return found


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_examples_of_the_help_are_accepted(command, capsys):
    try:
        main([command, "--help"] if command else ["--help"])
    except SystemExit as end:
        assert end.code == 0
    lines = examples(capsys.readouterr().out.replace("\n  example", "\nexample"))
    assert lines
    for words in lines:
        assert correct(words, options_of) is None, words
        if words[0] in CONFIG_COMMANDS and words[1] not in grammar.SUBCOMMANDS.get(words[0], ()):
            check_overrides(words[0], words[1:])
        else:
            subcommand = words[1:2] if words[0] in grammar.SUBCOMMANDS else []
            parser = parser_of(COMMANDS[words[0]].load(), subcommand)
            parser.parse_args(words[1 + len(subcommand) :])


def check_overrides(command: str, words: list[str]) -> None:
    """Every key exists, and every choice of a group."""
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            assert command == "evaluate" or word.startswith("-"), word
            continue
        if key == "after" and command in ("submit", "sweep"):  # short for cluster.after=[...]
            continue
        choices = choices_of(command)
        assert key in keys_of(command) or key in choices, word
        for option in value.split(","):
            assert key not in choices or option in choices[key], word
