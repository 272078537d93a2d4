"""`evspan completion`: a script for bash or zsh that completes commands, options, keys and files.

The script contains all words, from the parsers, the config dataclasses and the files in conf/, so
that a key press starts no Python.
"""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from evspan.launch.cli.command import Parser
from evspan.launch.cli.config_keys import COMMANDS as CONFIG_COMMANDS
from evspan.launch.cli.config_keys import choices_of, keys_of, values_of
from evspan.launch.cli.evaluate import JSON_OPTION
from evspan.launch.cli.grammar import CONFIG_FLAGS, CONFIG_VALUE_OPTIONS, SUBCOMMANDS
from evspan.launch.cli.main import COMMANDS, options_of
from evspan.launch.cli.submit import AFTER, SMOKE_OPTION

DESCRIPTION = """Prints a script that completes commands, options, config keys and choices
(experiment=gen4/...), and files. Print it again after an update: it contains the words."""
EXAMPLES = """examples:
  evspan completion bash > ~/.local/share/bash-completion/completions/evspan
  evspan completion zsh > ~/.zfunc/_evspan      # with fpath+=~/.zfunc before compinit in ~/.zshrc
  source <(evspan completion bash)      # for this shell only"""

BASH = r"""
_evspan() {
    local line=${COMP_LINE:0:COMP_POINT}
    local current=${line##*[[:space:]]}
    local words candidates="" word key
    read -ra words <<< "${line%"$current"}"
    local count=${#words[@]} previous=${words[${#words[@]}-1]}
    if [[ $count -gt 1 && ${words[1]} == help ]]; then
        words=("${words[0]}" "${words[@]:2}")
        count=$((count - 1))
    fi
    local command=${words[1]:-}
    if [[ $count -gt 2 ]] && _evspan_words subcommands "$command" | grep -qxF -- "${words[2]}"; then
        command="$command ${words[2]}"
    fi
    local IFS=$'\n'
    COMPREPLY=()
    if [[ $count -eq 1 ]]; then
        COMPREPLY=($(compgen -W "$(_evspan_words commands)" -- "$current"))
    elif [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$(_evspan_words options "$command")" -- "$current"))
    elif [[ $previous == -* && -n $(_evspan_words values "$command" "$previous") ]]; then
        COMPREPLY=($(compgen -W "$(_evspan_words values "$command" "$previous")" -- "$current"))
    elif [[ $current == *=* ]]; then
        key=${current%%=*}
        candidates=$(_evspan_words values "$command" "$key")
        if [[ -n $candidates ]]; then
            COMPREPLY=($(compgen -W "$candidates" -- "${current#*=}"))
        else
            COMPREPLY=($(compgen -f -- "${current#*=}"))
            compopt -o filenames 2> /dev/null
        fi
        # Readline replaces what follows the `=` only, where that separates words.
        [[ $COMP_WORDBREAKS == *=* ]] || COMPREPLY=("${COMPREPLY[@]/#/$key=}")
    else
        [[ $count -eq 2 ]] && candidates=$(_evspan_words subcommands "$command")
        for word in $(_evspan_words keys "$command"); do
            [[ $word == "$current"* ]] || continue
            word=${word#"$current"}
            # One level at a time: `training.`, then `training.max_steps=`.
            [[ $word == *.* ]] && word=${word%%.*}.
            candidates+=$'\n'$current$word
        done
        COMPREPLY=($(compgen -W "$(sort -u <<< "$candidates")" -- "$current"))
        if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[.=] ]]; then
            compopt -o nospace 2> /dev/null
        fi
        if [[ -z $(_evspan_words keys "$command") || $command == evaluate ]]; then
            COMPREPLY+=($(compgen -f -- "$current"))
            compopt -o filenames 2> /dev/null
        fi
    fi
}
complete -F _evspan evspan
"""

ZSH = r"""
_evspan() {
    local current=${words[CURRENT]} previous=${words[CURRENT-1]} position=$CURRENT word
    local -a before=("${words[@]:0:$((CURRENT - 1))}") candidates keys
    if [[ $position -gt 2 && ${before[2]} == help ]]; then
        before=("${before[1]}" "${before[@]:2}")
        position=$((position - 1))
    fi
    local command=${before[2]}
    local -a subcommands=(${(f)"$(_evspan_words subcommands "$command")"})
    if [[ $position -gt 3 ]] && (( ${subcommands[(Ie)${before[3]}]} )); then
        command="$command ${before[3]}"
        subcommands=()
    fi
    if [[ $position -eq 2 ]]; then
        compadd -- ${(f)"$(_evspan_words commands)"}
    elif [[ $current == -* ]]; then
        compadd -- ${(f)"$(_evspan_words options "$command")"}
    elif [[ $previous == -* && -n $(_evspan_words values "$command" "$previous") ]]; then
        compadd -- ${(f)"$(_evspan_words values "$command" "$previous")"}
    elif [[ $current == *=* ]]; then
        candidates=(${(f)"$(_evspan_words values "$command" "${current%%=*}")"})
        compset -P 1 '*='
        if (( $#candidates )); then
            compadd -- $candidates
        else
            _files
        fi
    else
        keys=(${(f)"$(_evspan_words keys "$command")"})
        for word in $keys; do
            [[ $word == "$current"* ]] || continue
            word=${word#"$current"}
            # One level at a time: `training.`, then `training.max_steps=`.
            [[ $word == *.* ]] && word=${word%%.*}.
            candidates+=("$current$word")
        done
        [[ $position -eq 3 ]] && compadd -- $subcommands
        compadd -S '' -- ${(u)candidates}
        if (( ! $#keys )) || [[ $command == evaluate ]]; then
            _files
        fi
    fi
}
if [[ ${funcstack[1]} == _evspan ]]; then
    _evspan "$@"
else
    compdef _evspan evspan
fi
"""


class Completion(NamedTuple):
    """The words that may follow at one place of a command line.

    kind: commands, subcommands, options, values or keys. name: of the option or key with values.
    """

    kind: str
    command: str
    name: str
    words: Sequence[str]


def script(shell: str) -> str:
    """The completion script for `bash` or `zsh`."""
    lines = ["#compdef evspan"] if shell == "zsh" else ["# Completion of evspan in bash"]
    lines += [
        "# Prints words, one a line: _evspan_words KIND [COMMAND [NAME]]",
        "_evspan_words() {",
        '    case "$1:${2-}:${3-}" in',
        *(_branch(completion) for completion in _completions()),
        "    esac",
        "}",
    ]
    return "\n".join(lines) + (ZSH if shell == "zsh" else BASH)


def _branch(completion: Completion) -> str:
    """A branch of the script's `case`."""
    pattern = shlex.quote(f"{completion.kind}:{completion.command}:{completion.name}")
    return f"    {pattern}) printf '%s\\n' {shlex.join(completion.words)} ;;"


def _completions() -> Iterator[Completion]:
    yield Completion("commands", "", "", [*COMMANDS, "help"])
    for command in COMMANDS:
        if command in CONFIG_COMMANDS:
            yield from _config_completions(command)
        else:
            yield from _option_completions(command)
    for command, subcommands in SUBCOMMANDS.items():
        yield Completion("subcommands", command, "", subcommands)
        for subcommand in subcommands:
            yield from _option_completions(command, subcommand)


def _config_completions(command: str) -> Iterator[Completion]:
    keys = keys_of(command)
    groups = choices_of(command)
    words = CONFIG_FLAGS | CONFIG_VALUE_OPTIONS
    if command == "evaluate":
        words |= {JSON_OPTION}
    if command == "submit":
        words |= {SMOKE_OPTION}
    names = {f"{name}=" for name in {*keys, *groups}}
    if command in ("submit", "sweep"):
        names.add(AFTER)
    yield Completion("options", command, "", sorted(words))
    yield Completion("keys", command, "", sorted(names))
    for key, type_ in keys.items():
        values = values_of(type_)
        if values:
            yield Completion("values", command, key, values)
    for group, options in groups.items():
        yield Completion("values", command, group, options)


def _option_completions(*command: str) -> Iterator[Completion]:
    known = options_of(command)
    name = " ".join(command)
    yield Completion("options", name, "", sorted([*known.options, *known.flags]))
    for choices in list(known.positionals.values())[:1]:
        if choices:
            yield Completion("subcommands", name, "", choices)
    for option, choices in known.options.items():
        if choices:
            yield Completion("values", name, option, choices)


def main(argv: list[str] | None = None) -> None:
    """Runs `evspan completion`."""
    parser = Parser(
        "evspan completion",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=["bash", "zsh"])
    print(script(parser.parse_args(argv).shell), end="")
