"""Text keys keep the text that the shell passes: for every command, and in lists and sweeps."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from evspan.conf.compose import compose, expand_sweep, load_config, replace_override, save_config
from evspan.conf.errors import ConfigError
from evspan.conf.quoting import FUNCTIONS, quote_text
from evspan.conf.schema.benchmark import BenchConfig
from evspan.conf.schema.prep import DatasetKind, DatasetRoot, PrepConfig
from evspan.conf.schema.training import EvaluateConfig, TrainConfig
from evspan.launch.cli import evaluate, infer, submit
from evspan.launch.cli.grammar import correct, evaluate_overrides
from evspan.launch.cli.main import options_of
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

TEXTS = (
    *("2024_11_28", "1e3", "true", "NULL", "0x10", "1_000", "inf", ".5", "-1", "1:30"),
    *("a=b", "a,b", "~a", "~", "a b", " a ", "[a", "a]", "{a: 1}", "(a)", "a(b)", "x:y", "a;b&c|d"),
    *(
        "'a",
        "a'b'",
        '"',
        "'",
        "a\\",
        "\\",
        "a\\'",
        "C:\\x\\y",
        "日本",
        "Füße",
        "caf\udce9",
        "\u202e",
    ),
    *(
        "${",
        "a${b",
        "a'${b\\",
        "\\'\"${",
        "$",
        "$a",
        "#a",
        "a\nb",
        "a\tb",
        "@",
        "%",
        "?",
        "*",
        "!a",
        "..",
        "~/x",
        "",
    ),
)
# What a user means by these is not the text itself: see conf/quoting.py.
SPECIAL = re.compile(rf"""'.*'|".*"|\s*({FUNCTIONS})\s*\(.*\)|.*\$\{{.*|\?\?\?""", re.DOTALL)
TEXT = st.text(st.sampled_from("ab1_.,=~'\"\\[]{}()$ :\n") | st.characters(), max_size=12)
PARSER = OverridesParser.create()


def parsed(override: str) -> object:
    """The value of an override after Hydra and OmegaConf have read it."""
    value = PARSER.parse_override(override).value()
    return OmegaConf.create({"value": "" if value is None else value}).value


# -- the rule --------------------------------------------------------------------------------------
@settings(max_examples=300, deadline=None)
@given(TEXT.filter(lambda text: not SPECIAL.fullmatch(text)))
@example("a\\'b\\\\'\\")
@example("2024_11_28")
def test_any_text_arrives_unchanged(text):
    [override] = quote_text(TrainConfig, [f"run_dir={text}"], sweep=False)
    assert parsed(override) == text


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_a_resolved_text_is_passed_on_unchanged(text):
    """As `evspan sweep` does with the folder of a run."""
    [override] = replace_override(["run_dir=x"], "run_dir", text)
    assert parsed(override) == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("'a b'", "a b"),
        ('"a,b"', "a,b"),
        ("runs/${seed}", "runs/7"),
        (r"runs/\${seed}", "runs/${seed}"),
        ("${oc.env:EVSPAN_TEXT,'a b'}/x", "a b/x"),
        ("str(1e3)", "1000.0"),
    ],
)
def test_quotes_interpolations_and_functions_work(value, expected):
    assert compose(TrainConfig, [f"run_dir={value}", "seed=7"]).run_dir == expected


@pytest.mark.parametrize(
    ("content", "elements"),
    [
        (
            """module load cuda, export X="a,b", echo 'c, d'""",
            ["module load cuda", 'export X="a,b"', "echo 'c, d'"],
        ),
        ("""it's,don't""", ["it's", "don't"]),
        ("""a "b,c""", ['a "b', "c"]),
        (r"""a \"b,c\" """, [r"a \"b", r"c\""]),
        ("""export X="a]b",f(1,2)""", ['export X="a]b"', "f(1,2)"]),
        ("""'a,b',c""", ["a,b", "c"]),
        ("""A=$(printf "%s," x),B='1,2'""", ['A=$(printf "%s," x)', "B='1,2'"]),
    ],
)
@pytest.mark.parametrize("is_sweep", [False, True])
def test_quotes_inside_of_an_element_keep_its_commas(content, elements, is_sweep):
    override = f"cluster.setup=[{content}]"
    if is_sweep:
        ((quoted, _), _) = expand_sweep([override, "seed=1,2"]).combinations
        override = quoted
    assert compose(TrainConfig, [override]).cluster.setup == elements


@pytest.mark.parametrize(
    ("override", "elements"),
    [
        ("cluster.environment=A=1", ["A=1"]),
        ("cluster.setup=export A='b, c'", ["export A='b, c'"]),
        ('cluster.setup=["a', ['"a']),
    ],
)
def test_the_suggested_quotes_of_a_list_can_be_composed(override, elements):
    with pytest.raises(ConfigError, match="cannot be read; a value with special") as refused:
        compose(TrainConfig, [override])
    (suggestion,) = shlex.split(str(refused.value).partition("shell too: ")[2])
    cluster = compose(TrainConfig, [suggestion]).cluster
    assert elements in (cluster.environment, cluster.setup)


@pytest.mark.parametrize(
    "override", ["optimizer.lr=1e-3", "seed=1_0", "~seed", "experiment=demo", "quux=1e3"]
)
def test_other_keys_are_left_to_hydra(override):
    assert quote_text(TrainConfig, [override], sweep=False) == [override]


# -- lists of mappings -----------------------------------------------------------------------------
def test_the_texts_in_a_list_of_mappings_are_kept(tmp_path):
    override = (
        "dataset.roots=[{root: 2024_11_28, weight: 2, class_map: {car: 1e3, 'a, b: c': null}}, "
        "{root: '/ü, x', kind: rvt_tree, classes: [true, 'c, d']}, {root: a=b~c [1]}]"
    )
    config = compose(TrainConfig, [override])
    expected = [
        DatasetRoot(root="2024_11_28", weight=2, class_map={"car": "1e3", "a, b: c": None}),
        DatasetRoot(root="/ü, x", kind=DatasetKind.rvt_tree, classes=["true", "c, d"]),
        DatasetRoot(root="a=b~c [1]"),
    ]
    assert config.dataset.roots == expected
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml").dataset.roots == expected
    assert correct(["train", override], options_of) is None


def test_a_sweep_over_lists_of_mappings():
    words = ["dataset.roots=[{root: 1e3}, {root: b}],[{root: c, weight: 2}]", "seed=1,2"]
    configs = [compose(TrainConfig, words) for words in expand_sweep(words).combinations]
    roots = [[source.root for source in config.dataset.roots] for config in configs]
    assert roots == [["1e3", "b"], ["1e3", "b"], ["c"], ["c"]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "[{root: a, wight: 1}]",
            "dataset.roots: an entry has no key 'wight'; did you mean weight?",
        ),
        ("[a,b]", r"give a list of mappings, 'dataset.roots=\[\{root: A\}"),
        ("[{weight: 2}]", "an entry without a folder"),
        ("[{root: a, weight: x}]", "weight is 'x'; give a number"),
    ],
)
def test_wrong_lists_of_mappings_are_explained(value, message):
    with pytest.raises(ConfigError, match=message):
        compose(TrainConfig, [f"dataset.roots={value}"])


# -- the commands ----------------------------------------------------------------------------------
def batches(keys: int) -> list[tuple[str, ...]]:
    return [TEXTS[i : i + keys] for i in range(0, len(TEXTS), keys)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "schema", "keys"),
    [
        ("train", TrainConfig, ("run_dir", "dataset.root", "checkpoint.init_from", "dataset.name")),
        ("prep", PrepConfig, ("source", "output", "dataset.root", "dataset.name")),
        ("evaluate", EvaluateConfig, ("checkpoint", "output", "dataset.root", "dataset.name")),
        ("bench", BenchConfig, ("bench.output", "dataset.root", "dataset.name", "run_dir")),
    ],
)
def test_the_config_of_a_command_has_the_texts(command, schema, keys, tmp_path):
    for texts in batches(4)[:: 1 if command == "train" else 3]:
        words = [f"{key}={text}" for key, text in zip(keys, texts)]
        if command != "evaluate":  # its checkpoint becomes positional
            assert correct([command, *words], options_of) is None
        config = compose(schema, words)
        if command == "train":
            save_config(config, tmp_path / "config.yaml")
            config = load_config(schema, tmp_path / "config.yaml")
        for key, text in zip(keys, texts):
            value = config
            for name in key.split("."):
                value = getattr(value, name)
            assert value == text


@pytest.mark.slow
def test_the_positional_checkpoint_of_evaluate_is_a_text(monkeypatch):
    checkpoints = []
    monkeypatch.setattr(
        "evspan.launch.local.run.run_evaluation",
        lambda config: checkpoints.append(config.checkpoint) or 0,
    )
    texts = [text for text in TEXTS[::4] if re.match(r"[^-=]+$", text)]
    for text in texts:
        evaluate.main([text])
    assert checkpoints == texts
    assert evaluate_overrides(["a,b"]) == ["checkpoint='a,b'"]


def test_submit_takes_a_text_with_a_comma_as_one_run(monkeypatch):
    planned = []
    monkeypatch.setattr("evspan.launch.sweep.plan.check_run", lambda config: None)
    monkeypatch.setattr(
        "evspan.launch.sweep.submit.submit_planned",
        lambda runs, cluster, folder, *, smoke: planned.extend(run.folder for run in runs) or 0,
    )
    submit.main(["run_dir=a,b=1"])
    assert planned == [Path("a,b=1")]


def test_options_of_infer_take_any_text(tmp_path):
    for text in ("a=b", "threshold=3", "checkpoint=a", "日本", "a,b", "~"):
        words = ["infer", f"./{text}", "a.raw", "--output", text]
        assert correct(words, options_of) is None
        assert str(infer._parser().parse_args(words[1:]).output) == text


# -- lists -----------------------------------------------------------------------------------------
def test_elements_of_a_list_of_texts_are_texts():
    cluster = compose(
        TrainConfig,
        [
            "cluster.setup=[module load a/1.0, x=1,'b,c',true,1e3,f(1,2)]",
            "cluster.environment=[A=1,B=x y]",
            "dataset.classes=[2024_11,Füße,null]",
        ],
    )
    assert cluster.cluster.setup == ["module load a/1.0", "x=1", "b,c", "true", "1e3", "f(1,2)"]
    assert cluster.cluster.environment == ["A=1", "B=x y"]
    assert cluster.dataset.classes == ["2024_11", "Füße", "null"]


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [
        ("cluster.setup=module load a", "setup", ["module load a"]),
        ("cluster.setup=module load a,x=$Y 'z'", "setup", ["module load a", "x=$Y 'z'"]),
        ("cluster.sbatch_args=mail-type=END,1e3", "sbatch_args", None),
        ("cluster.mounts=/a b:/c,'/d,e'", "mounts", ["/a b:/c", "/d,e"]),
    ],
)
def test_the_suggested_list_composes_when_it_is_pasted_into_bash(word, key, expected):
    correction = correct(["train", word], options_of)
    assert correction is not None
    command = correction.message.split("Use: evspan ")[1]
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True
    )
    words = [os.fsdecode(item) for item in printed.stdout.split(b"\0")[1:-1]]
    if expected is None:  # sbatch has no option 1e3, which the config refuses as that text
        with pytest.raises(ConfigError, match="cluster.sbatch_args has '1e3'"):
            compose(TrainConfig, words)
        return
    assert getattr(compose(TrainConfig, words).cluster, key) == expected


@pytest.mark.parametrize("override", ["optimizer.lr='1", "seed=1,2", "training.profile=[1,'a]"])
def test_a_suggestion_of_hydras_errors_can_be_pasted(override):
    with pytest.raises(ConfigError) as raised:
        compose(TrainConfig, [override])
    suggested = re.search(r"(?:too: |brackets, )(.*?)(?:; evspan|$)", str(raised.value))
    assert suggested
    [word] = shlex.split(suggested[1])
    PARSER.parse_override(word)


# -- sweeps ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_commas_of_a_text_separate_runs_in_a_sweep_only():
    words = ["dataset.root=2024_11_28, a=b ,'c,d',x[1,2]", "dataset.name=choice(1e3,true)"]
    combinations = expand_sweep(words).combinations
    configs = [compose(TrainConfig, overrides) for overrides in combinations]
    roots = [config.dataset.root for config in configs]
    assert roots[::2] == ["2024_11_28", "a=b", "c,d", "x[1,2]"]
    assert [config.dataset.name for config in configs[:2]] == ["1e3", "true"]
    assert len(configs) == 8
    assert expand_sweep(words[:1], text=False).combinations == [
        ["dataset.root='2024_11_28, a=b ,\\'c,d\\',x[1,2]'"]
    ]


def test_a_function_on_a_text_key_of_train_is_a_sweep():
    correction = correct(["train", "dataset.name=choice(a,b)"], options_of)
    assert correction is not None
    assert correction.argv[0] == "sweep"
