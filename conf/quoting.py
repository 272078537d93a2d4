r"""Quotes the values of text keys, so that Hydra's grammar leaves them as they were typed.

Hydra reads 2024_11_28, 1e3 and true as a number or a boolean, and refuses `=`, `,`, `~` and
characters outside ASCII without quotes. For a key whose type is text (`str`), a list of texts or
optional text, the value is quoted first. Left to Hydra and OmegaConf are:

- a value that is quoted as a whole, 'a' or "a";
- an interpolation, ${key}, in a text that OmegaConf can read; \${ stands for ${;
- a call of one of Hydra's functions, such as choice(a,b);
- null, for keys that may have no value;
- in a sweep, commas outside of brackets and quotes: they separate the values of several runs.

In a list, quotes inside of an element keep its commas together too, as a shell would read them:
[export X="a,b",echo 'c, d'] has two elements. An apostrophe inside of a word is no quote.

In a list of mappings, [{root: a=b, weight: 2}], the same holds for the values of text keys, and a
key may be quoted too.

In a mapping, the keys may have quotes: {"backbone.*": 0.1}.

Keys of other types, groups and unknown keys stay as they are. README.md has examples.
"""

import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

from evspan.conf.keys import (
    is_mapping_list,
    is_optional,
    is_text,
    is_text_list,
    is_text_map,
    is_text_mapping,
    keys_of_schema,
)
from evspan.conf.text import escape_interpolations, quote_override

FUNCTIONS = (  # of Hydra's grammar
    "bool|choice|extend_list|float|glob|int|interval|json_str|range|shuffle|sort|str|tag"
)
_OVERRIDE = re.compile(r"(\+{0,2})([^=~+][^=]*)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_INSIDE_WORD = re.compile(r"[\w\\]")  # a quote after it is an apostrophe, or escaped
_CALL = re.compile(rf"({FUNCTIONS})\s*\((.*)\)", re.DOTALL)
_PLAIN = re.compile(r"(?:\.{1,2}/)?[A-Za-z_/][A-Za-z0-9_/.-]*")  # Hydra reads it as text
_ENTRY = re.compile(
    r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?:[^:\\]|\\.)*?)\s*:\s*(.*)""", re.DOTALL
)  # of a mapping: key and value
_NOT_IN_KEY = re.compile(r"[()\[\]{}:=, \t\\]")  # of a mapping, but after a backslash
_KEYWORDS = ("null", "true", "false", "inf", "nan")


def quote_text(schema: type, overrides: Sequence[str], *, sweep: bool) -> list[str]:
    """The overrides, with quoted values of the schema's text keys.

    Args:
        sweep: whether commas separate the values of several runs.
    """
    return [_quote_override(schema, override, sweep) for override in overrides]


def is_call(value: str) -> bool:
    """Whether a value is a call of one of Hydra's functions."""
    return bool(_CALL.fullmatch(value))


def has_several_values(value: str) -> bool:
    """Whether Hydra sweeps over a value: a comma outside of brackets and quotes, or a function."""
    if re.match(r"(choice|range|glob)\(", value):
        return True
    return len(split_values(value)) > 1


def split_list(content: str) -> list[str]:
    """The elements of a list, without its brackets, as commas outside of quotes separate them."""
    return split_values(content, in_list=True)


def split_values(value: str, *, in_list: bool = False) -> list[str]:
    """The values that commas outside of brackets and quotes separate, without spaces around.

    Args:
        in_list: quotes count also inside of a value, where they begin a word. Else they count at
            its start, and inside of brackets.
    """
    values = []
    start = 0
    position = 0
    depth = 0
    while position < len(value):
        quoted = _QUOTED.match(value, position)
        begins = not value[start:position].strip()
        if depth or in_list:
            begins = begins or not _INSIDE_WORD.fullmatch(value[position - 1])
        if quoted and begins:
            position = quoted.end()
            continue
        char = value[position]
        if char in "[{(":
            depth += 1
        elif char in "]})":
            depth = max(0, depth - 1)
        elif char == "," and depth == 0:
            values.append(value[start:position].strip(" \t"))
            start = position + 1
        position += 1
    values.append(value[start:].strip(" \t"))
    return values


def quoted_list(values: Sequence[str]) -> str:
    """[a,"b c"]: a list of texts in Hydra's grammar."""
    quoted = [_quote_value(value, optional=False, quote='"') for value in values]
    return f"[{','.join(quoted)}]"


def _quote_override(schema: type, override: str, sweep: bool) -> str:
    match = _OVERRIDE.fullmatch(override)
    if not match:
        return override
    prefix, key, value = match.groups()
    type_ = keys_of_schema(schema).get(key)
    if is_text(type_):
        value = _quote_text(value, optional=is_optional(type_), sweep=sweep)
    elif is_text_list(type_):
        values = split_values(value) if sweep else [value]
        value = ",".join(map(_quote_list, values))
    elif is_mapping_list(type_):
        (schema_of_item,) = typing.get_args(type_)
        values = split_values(value) if sweep else [value]
        value = ",".join(_quote_mappings(part, schema_of_item) for part in values)
    elif is_text_map(type_):
        values = split_values(value) if sweep else [value]
        value = ",".join(map(_escape_map, values))
    return f"{prefix}{key}={value}"


def _quote_text(value: str, *, optional: bool, sweep: bool) -> str:
    call = _CALL.fullmatch(value)
    if call and call[1] == "choice":
        choices = split_values(call[2])
        return f"choice({','.join(_quote_value(choice, optional=optional) for choice in choices)})"
    if call:
        return value
    if not sweep:
        return _quote_value(value, optional=optional)
    return ",".join(_quote_value(part, optional=optional) for part in split_values(value))


def _quote_list(value: str) -> str:
    """A list with quoted elements; any other value as it is, which Hydra or the schema reports."""
    if not (value.startswith("[") and value.endswith("]")):
        return value
    content = value[1:-1]
    return quoted_list(split_list(content)) if content.strip() else value


def _quote_mappings(value: str, schema: type) -> str:
    """A list of mappings, each with the keys of `schema`; any other value as it is."""
    if not (value.startswith("[") and value.endswith("]")):
        return value
    types = typing.get_type_hints(schema)

    def quote(key: str, item: str) -> str:
        type_ = types.get(key)
        if is_text(type_):
            return _quote_value(item, optional=is_optional(type_), quote='"')
        if is_text_list(type_):
            return _quote_list(item)
        if is_text_mapping(type_):
            return _quote_mapping(item, lambda _, text: _quote_item(text, type_))
        return item

    items = [_quote_mapping(item, quote) for item in split_list(value[1:-1])]
    return f"[{','.join(items)}]"


def _quote_item(text: str, mapping_type: Any) -> str:
    item_type = typing.get_args(mapping_type)[1]
    return _quote_value(text, optional=is_optional(item_type), quote='"')


def _quote_mapping(value: str, quote: Callable[[str, str], str]) -> str:
    """{a: b, c: d} with quoted values; any other value as it is.

    Args:
        quote: key and value -> the quoted value.
    """
    content = value[1:-1]
    if not (value.startswith("{") and value.endswith("}") and content.strip()):
        return value
    entries = []
    for entry in split_list(content):
        match = _ENTRY.fullmatch(entry)
        if not match:
            return value
        key, item = match.groups()
        if _QUOTED.fullmatch(key):  # Hydra's grammar has no quoted keys
            key = re.sub(r"\\(.)", r"\1", key[1:-1])
            escaped = re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", key)
            entries.append(f"{escaped}:{quote(key, item)}")
        else:
            entries.append(f"{key}:{quote(key, item)}")
    return f"{{{','.join(entries)}}}"


def _escape_map(value: str) -> str:
    """A mapping whose keys are texts: Hydra's grammar has no quotes there, but escapes.

    Any other value stays as it is, which Hydra or the schema reports.
    """
    if not (value.startswith("{") and value.endswith("}")):
        return value
    items = []
    for item in split_list(value[1:-1]):
        key, colon, number = item.rpartition(":")
        key = key.strip()
        if _QUOTED.fullmatch(key):
            key = key[1:-1]
        items.append(_NOT_IN_KEY.sub(r"\\\g<0>", key) + colon + number)
    return f"{{{','.join(items)}}}"


def _quote_value(value: str, *, optional: bool, quote: str = "'") -> str:
    if not value or _QUOTED.fullmatch(value) or (optional and value.lower() == "null"):
        return value
    if _PLAIN.fullmatch(value) and value.lower() not in _KEYWORDS:
        return value
    if "${" in value and not _is_readable(value):
        return quote_override(escape_interpolations(value), quote)
    if quote in value and "${" in value:
        # Hydra keeps the override in its own config, where OmegaConf reads interpolations too: an
        # escaped quote would be an error there.
        quote = "'\"".replace(quote, "")
    return quote_override(value, quote)


def _is_readable(value: str) -> bool:
    # Not imported by the grammar check of a command line.
    from evspan.conf.omegaconf_adapter import is_readable

    return is_readable(value)
