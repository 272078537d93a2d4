"""Parses the arguments of commands that have a config: `key=value`, and a few options."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError

FLAGS = {  # option -> field of ConfigArguments
    "-h": "help",
    "--help": "help",
    "--hydra-help": "overrides_help",
    "-m": "multirun",
    "--multirun": "multirun",
}
# `training.batch_size=auto` is 0 in the config, whose key is a number.
AUTO_BATCH_SIZE = re.compile(r"^(\+{0,2}training\.batch_size=)auto$")
CONFIG_DIR_OPTIONS = ("--config-dir", "-cd")
CFG_OPTIONS = ("--cfg", "-c")
OVERRIDES_HELP = """Overrides of a config, in Hydra's grammar

  key=value                  sets a key; nested keys have dots: training.max_steps=1000
  group=option               chooses a file of a config group: size=small, experiment=gen4/tiny
  run_dir=2024_11_28         text keys keep the text: numbers, =, commas and spaces need no quotes
                             but those of the shell
  'run_dir="a, b"'           text in quotes, which a sweep needs around a comma
  key=[1,2]                  a list
  'key={0: 0, 3: 1}'         a mapping
  key=null                   no value, where the key allows it
  key=${other.key}           the value of another key; quote it for the shell

  --cfg job                  prints the config that the arguments make, and starts nothing
  --config-dir FOLDER        searches FOLDER for group options too, such as
                             FOLDER/experiment/mine.yaml

  Later overrides win. Unknown keys are refused. evspan sweep key=a,b starts a run for each value.
  https://hydra.cc/docs/advanced/override_grammar/basic/ describes the whole grammar."""


@dataclass(frozen=True)
class ConfigArguments:
    """Parsed arguments.

    argv: what `evspan.conf.compose.compose` takes: overrides, and --config-dir with its folder.
    """

    argv: tuple[str, ...]
    help: bool = False
    overrides_help: bool = False
    show_config: bool = False
    multirun: bool = False


def parse_config_arguments(argv: Sequence[str], prog: str) -> ConfigArguments:
    """Separate the options from the overrides.

    Raises:
        UserError: an option is unknown or lacks its value; the message has the correct form.
    """
    words: list[str] = []
    flags: dict[str, bool] = {}
    remaining = iter(_with_separate_values(argv))
    for word in remaining:
        if word in FLAGS:
            flags[FLAGS[word]] = True
        elif word in CONFIG_DIR_OPTIONS:
            folder = next(remaining, "")
            if not folder:
                raise UserError(f"{word} needs a folder; {prog} --help shows how")
            words += ["--config-dir", str(Path(folder).absolute())]
        elif word in CFG_OPTIONS:
            kind = next(remaining, "")
            if kind != "job":
                raise UserError(
                    f"{word} {kind}: choose from job, which prints the config; "
                    f"{prog} --help shows how"
                )
            flags["show_config"] = True
        elif word.startswith("-"):
            raise UserError(_unknown_option(word, prog))
        else:
            words.append(AUTO_BATCH_SIZE.sub(r"\g<1>0", word))
    return ConfigArguments(tuple(words), **flags)


def config_information(arguments: ConfigArguments, schema: type, help_text: str) -> str | None:
    """The text that --help, --hydra-help or --cfg job asks for; None where a command is to run.

    Raises:
        ConfigError: --cfg job, with arguments that cannot be composed.
    """
    if arguments.help:
        return help_text.strip()
    if arguments.overrides_help:
        return OVERRIDES_HELP
    if arguments.show_config:
        from evspan.conf.compose import composed_yaml

        return composed_yaml(schema, arguments.argv).rstrip("\n")
    return None


def _with_separate_values(argv: Sequence[str]) -> list[str]:
    """--cfg=job -> --cfg job."""
    words = []
    for word in argv:
        option, separator, value = word.partition("=")
        if separator and option in (*CONFIG_DIR_OPTIONS, *CFG_OPTIONS):
            words += [option, value]
        else:
            words.append(word)
    return words


def _unknown_option(word: str, prog: str) -> str:
    name = word.lstrip("-")
    form = name if "=" in name else f"{name}=VALUE"
    return f"{word} is no option; keys have no dashes: {form}; {prog} --help shows how"
