"""Checks the grammar of a command line, and computes the corrected one.

Commands that have a config take key=value: prep, train, evaluate, submit, sweep, bench. The others
take options with dashes. The checkpoint is a positional argument everywhere: `evspan evaluate RUN`,
`evspan infer RUN RECORDING...`, `evspan export RUN OUT`.
"""

import difflib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

from evspan.conf.keys import is_list, is_text, is_text_list
from evspan.conf.quoting import has_several_values, is_call, quoted_list, split_list
from evspan.conf.text import escape_interpolations, quote_override
from evspan.launch.cli.config_arguments import CFG_OPTIONS, CONFIG_DIR_OPTIONS, FLAGS
from evspan.launch.cli.config_keys import COMMANDS as CONFIG_COMMANDS
from evspan.launch.cli.config_keys import choices_of, keys_of

# First words after a command that make it another one, whose arguments are options.
SUBCOMMANDS = {
    "prep": ("decode", "info", "preview", "export-rvt", "report", "status", "verify"),
    "evaluate": ("compare",),
    "labels": ("import", "export", "pseudo"),
}
# Commands that `evspan submit COMMAND ...` runs in a job.
SUBMITTED_COMMANDS = ("prep", "evaluate", "report")
# What the positional words of a command with a config most likely mean.
POSITIONAL_KEYS = {
    "prep": ("source", "output"),
    "train": ("dataset.root", "run_dir"),
    "submit": ("dataset.root", "run_dir"),
    "sweep": ("dataset.root", "run_dir"),
    "evaluate": ("checkpoint", "dataset.root"),
    "bench": ("dataset.root",),
}
# Where several keys end in the same name, the first of these groups that has it is meant.
PREFERRED_GROUPS = (
    "",
    "training",
    "evaluation",
    "frames",
    "optimizer",
    "parallel",
    "checkpoint",
    "cluster",
)
TAKE_CHECKPOINT = {"infer": "checkpoint", "export": "checkpoint", "convert": "source"}
RECORDING_SUFFIXES = (".raw", ".dat", ".h5", ".hdf5", ".aedat4", ".csv", ".txt", ".npz")
# Options of the commands with a config.
CONFIG_FLAGS = set(FLAGS)
CONFIG_VALUE_OPTIONS = {*CFG_OPTIONS, *CONFIG_DIR_OPTIONS}
MULTIRUN = {"-m", "--multirun"}


class Correction(NamedTuple):
    """What is wrong with a command line, and the correct arguments of `evspan`."""

    problem: str
    argv: list[str]

    @property
    def message(self) -> str:
        """One line with the whole command."""
        return f"{self.problem}. Use: {shlex.join(['evspan', *self.argv])}"


class Options(NamedTuple):
    """The arguments that the parser of a command accepts."""

    positionals: dict[str, list[str]]  # name -> the choices, empty for any value
    options: dict[str, list[str]]  # with a value: `--format` -> the choices, empty for any value
    flags: list[str]  # options without a value


def correct(
    argv: Sequence[str], options_of: Callable[[Sequence[str]], Options]
) -> Correction | None:
    """The correction of a command line; None where its grammar is right.

    Only the form is checked. Unknown keys and options, and wrong values, are left to the command.

    Args:
        argv: the arguments of `evspan`, the command first.
        options_of: returns the options of a command, or of a subcommand such as ("prep", "info").
    """
    if not argv or {"-h", "--help"} & set(argv):
        return None
    command, *words = argv
    if command == "submit" and words and words[0] in SUBMITTED_COMMANDS:
        return _correct_submitted(words, options_of)
    subcommands = SUBCOMMANDS.get(command, ())
    if words and words[0] in subcommands:
        return _correct_options([command, words[0]], words[1:], options_of)
    if command not in CONFIG_COMMANDS:
        return _correct_options([command], words, options_of)
    second_words = {"prep": subcommands, "submit": SUBMITTED_COMMANDS}.get(command, ())
    if words and "=" not in words[0]:
        near = difflib.get_close_matches(words[0], second_words, 1, cutoff=0.7)
        if near:
            problem = f"there is no '{command} {words[0]}'"
            return Correction(problem, [command, near[0], *words[1:]])
    return _ConfigCommand(command).correct(words)


def is_submission(word: str) -> bool:
    """Whether a word of `evspan submit COMMAND ...` is for the job, not for the command in it."""
    return word.startswith(("cluster=", "cluster.", "after="))


def _correct_submitted(
    words: Sequence[str], options_of: Callable[[Sequence[str]], Options]
) -> Correction | None:
    """The correction of a command that runs in a job."""
    correction = correct([word for word in words if not is_submission(word)], options_of)
    if correction is None:
        return None
    submission = [word for word in words if is_submission(word)]
    return Correction(correction.problem, ["submit", *correction.argv, *submission])


def evaluate_overrides(argv: Sequence[str]) -> list[str]:
    """The arguments of `evspan evaluate` for Hydra: its positional word is `checkpoint=...`."""
    overrides = []
    several = bool(MULTIRUN & set(argv))
    has_checkpoint = False
    for word, is_value in _with_option_values(argv):
        if not has_checkpoint and not is_value and _is_positional(word):
            has_checkpoint = True
            value = word if several else quote_override(escape_interpolations(word))
            word = f"checkpoint={value}"
        overrides.append(word)
    return overrides


def _is_positional(word: str) -> bool:
    return "=" not in word and not word.startswith("-")


def _with_option_values(words: Sequence[str]) -> list[tuple[str, bool]]:
    """Each word, and whether it is the value of the option before it."""
    before = ["", *words]
    return [(word, option in CONFIG_VALUE_OPTIONS) for option, word in zip(before, words)]


# -- commands with a config ----------------------------------------------------------------------
@dataclass
class _ConfigCommand:
    """Corrects the words of a command that takes key=value."""

    command: str
    problems: list[str] = field(default_factory=list)
    result: list[str] = field(default_factory=list)
    checkpoint: str = ""  # of evaluate: becomes the first word

    def correct(self, words: Sequence[str]) -> Correction | None:
        self.multirun = bool(MULTIRUN & set(words))
        self.set_keys = {word.split("=")[0].lstrip("+~-") for word in words if "=" in word}
        self.positional_keys = list(POSITIONAL_KEYS[self.command])
        if self.command == "evaluate" and _names_checkpoint(words):
            self.positional_keys.remove("checkpoint")
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word in CONFIG_VALUE_OPTIONS and rest:
                self.result += [word, rest.pop(0)]
            elif word in CONFIG_FLAGS or word in CONFIG_VALUE_OPTIONS:
                self.result.append(word)
            elif word.startswith("--"):
                self._option(word, rest)
            elif "=" in word:
                self._override(word)
            else:
                self._positional(word, rest)
        if not self.problems:
            return None
        first = [self.checkpoint] if self.checkpoint else []
        problem = "; ".join(dict.fromkeys(self.problems))
        return Correction(problem, [self.command, *first, *self.result])

    def _option(self, word: str, rest: list[str]) -> None:
        name, has_value, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        takes_next = not has_value and bool(rest) and _is_positional(rest[0])
        if name == "resume" and "training" in _groups_of(self.command):
            self._resume(value or (rest.pop(0) if takes_next else ""))
            return
        if name == "checkpoint" and (has_value or takes_next):
            self._checkpoint(value or rest.pop(0))
            return
        key = find_key(self.command, name)
        negated = find_key(self.command, name.removeprefix("no_")) or ""
        if key is None and keys_of(self.command).get(negated) is bool:
            self._replace(word, f"{negated}=false")
        elif key is None:  # unknown: the command reports it
            self.result += [word, rest.pop(0)] if takes_next else [word]
        elif has_value:
            self._replace(word, f"{key}={value}")
        elif keys_of(self.command).get(key) is bool and not (
            takes_next and rest[0] in ("true", "false")
        ):
            self._replace(word, f"{key}=true")
        else:
            value = rest.pop(0) if takes_next else "VALUE"
            self._replace(word, f"{key}={value}")

    def _replace(self, word: str, override: str) -> None:
        name = word.split("=")[0]
        self.problems.append(f"evspan {self.command} takes key=value, where {name} has no dashes")
        self._override(override)

    def _resume(self, value: str) -> None:
        self.problems.append(
            "a run resumes by itself from the newest checkpoint in its run_dir, without --resume"
        )
        run = value.split("/checkpoints")[0]
        if run and run not in ("true", "1") and "run_dir" not in self.set_keys:
            self.result.append(f"run_dir={run}")

    def _checkpoint(self, value: str) -> None:
        if self.command == "evaluate":
            self.problems.append("the checkpoint is the first argument of evspan evaluate")
            self.checkpoint = value
        else:
            self.problems.append("the weights to start from are checkpoint.init_from")
            self.result.append(f"checkpoint.init_from={value}")

    def _override(self, word: str) -> None:
        key, _, value = word.partition("=")
        name = key.lstrip("+~")
        if name == "checkpoint" and self.command != "prep":
            self._checkpoint(value.strip("'\""))
            return
        type_ = keys_of(self.command).get(name)
        sweeps = self.multirun or self.command == "sweep"
        if not sweeps and _lacks_brackets(type_, value):
            self.problems.append(f"{name} is a list, and a list needs brackets")
            self.result.append(f"{key}={_as_list(type_, value)}")
            return
        is_one_text = is_text(type_) and not is_call(value)  # commas belong to it
        if self.multirun or is_one_text or not has_several_values(value):
            self.result.append(word)
            return
        if self.command in ("train", "submit"):
            self.problems.append(f"{name} has several values, a run for each: that is a sweep")
            self.command = "sweep"
        self.result.append(word)

    def _positional(self, word: str, rest: list[str]) -> None:
        if self.command == "evaluate" and self.positional_keys[:1] == ["checkpoint"]:
            self.positional_keys.pop(0)
            self.result.append(word)
            return
        key = find_key(self.command, word)
        if key is not None:
            if rest and _is_positional(rest[0]):
                self.problems.append(f"keys and values are joined by '=': {key}={rest[0]}")
                self._override(f"{key}={rest.pop(0)}")
            else:
                self.result.append(word)  # the command reports that the value is missing
            return
        free = [key for key in self.positional_keys if key not in self.set_keys]
        if not free or not word.strip("="):
            self.result.append(word)
            return
        self.positional_keys.remove(free[0])
        self.problems.append(f"evspan {self.command} takes key=value")
        self.result.append(f"{free[0]}={word}")


def _lacks_brackets(type_: Any, value: str) -> bool:
    """Whether a value for a list is one without brackets, or several."""
    if not is_list(type_) or is_call(value):
        return False
    if has_several_values(value):
        return True
    is_word = bool(value) and value[0] not in "[$" and value.lower() != "null"
    return is_text_list(type_) and is_word


def _as_list(type_: Any, value: str) -> str:
    return quoted_list(split_list(value)) if is_text_list(type_) else f"[{value}]"


def _names_checkpoint(words: Sequence[str]) -> bool:
    """Whether the checkpoint of evaluate is written in an old form."""
    return any(re.match(r"(--)?checkpoint(=|$)", word) for word in words)


def _groups_of(command: str) -> set[str]:
    return {key.split(".")[0] for key in keys_of(command)}


def find_key(command: str, name: str) -> str | None:
    """The key or group of a command's config that a name of an option means, if there is one.

    Args:
        command: that has a config.
        name: `max_steps`, `training.max_steps`, `training_max_steps` or `experiment`.
    """
    keys = keys_of(command)
    if name in keys or name in choices_of(command):
        return name
    joined = [key for key in keys if key.replace(".", "_") == name.replace(".", "_")]
    if joined:
        return joined[0]
    for group in PREFERRED_GROUPS:
        if group and f"{group}.{name}" in keys:
            return f"{group}.{name}"
    ending = [key for key in keys if key.endswith(f".{name}")]
    return ending[0] if len(ending) == 1 else None


# -- commands with options -----------------------------------------------------------------------
def _correct_options(
    command: list[str], words: Sequence[str], options_of: Callable[[Sequence[str]], Options]
) -> Correction | None:
    rest = list(words)
    problems: list[str] = []
    if command[0] in TAKE_CHECKPOINT:
        rest = _checkpoint_first(command[0], rest, problems)
    if any(re.match(r"[A-Za-z_-]+=", word) for word in rest):
        rest = _with_dashes(command, rest, options_of(command), problems)
    if not problems:
        return None
    return Correction("; ".join(dict.fromkeys(problems)), [*command, *rest])


def _checkpoint_first(command: str, words: list[str], problems: list[str]) -> list[str]:
    """The words with the checkpoint as the first."""
    for index, word in enumerate(words):
        previous = words[index - 1] if index else ""
        if previous.startswith("--") and "=" not in previous:  # the word is its value
            continue
        match = re.fullmatch(r"(?:--checkpoint|checkpoint)=(.+)", word)
        if match or (word == "--checkpoint" and index + 1 < len(words)):
            checkpoint = match[1] if match else words[index + 1]
            others = words[:index] + words[index + (1 if match else 2) :]
            problems.append(f"the checkpoint is the first argument of evspan {command}")
            return [checkpoint, *others]
    if command == "infer" and words and words[0].endswith(RECORDING_SUFFIXES):
        problems.append(f"evspan infer takes the checkpoint before the recording, {words[0]}")
        index = _first_folder(words)
        checkpoint = words[index] if index else "RUN"
        others = words[:index] + words[index + 1 :] if index else words
        return [checkpoint, *others]
    return words


def _first_folder(words: list[str]) -> int:
    """Index of the first word, before any option, that has no recording's suffix; 0: none."""
    for index, word in enumerate(words):
        if word.startswith("-"):
            break
        if PurePath(word).suffix not in RECORDING_SUFFIXES:
            return index
    return 0


def _with_dashes(
    command: list[str], words: list[str], known: Options, problems: list[str]
) -> list[str]:
    """The words with `key=value` written as `--key value` where the command has that option."""
    name = " ".join(command)
    positionals: list[str] = []
    others: list[str] = []
    before = ["", *words]
    for previous, word in zip(before, words):
        key, has_value, value = word.partition("=")
        option = f"--{key.replace('_', '-')}"
        is_option_value = previous in known.options  # which may be any text
        if is_option_value or not has_value:
            others.append(word)
            continue
        if key in known.positionals:
            positionals.append(value)
        elif option in known.options:
            others += [option, value]
        elif option in known.flags:
            others += [option] if value.lower() in ("true", "1", "yes") else []
        else:
            others.append(word)
            continue
        problems.append(f"evspan {name} takes options with dashes")
    first_option = next((i for i, word in enumerate(others) if word[:1] == "-"), len(others))
    return [*others[:first_option], *positionals, *others[first_option:]]
