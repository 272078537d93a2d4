"""Values that no run publishes: the ranks' common secret, `cluster.environment`, `cluster.setup`.

Of `cluster.sbatch_args`, these are variables of `export`: export=ALL,TOKEN=x.

The batch script contains them, in a folder that only the user can read. Configs, overrides and
messages that are written anywhere else have the names of the variables, and `<hidden>` for values.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

RUN_SECRET = "EVSPAN_RUN_SECRET"  # environment variable of a rank; see pipeline.parallel.run_secret
HIDDEN = "<hidden>"
MARK = re.compile(r"<hidden( [0-9a-f]{4})?>")
# Keys whose values may be secrets, and their parents, which may be given as a whole: cluster={...}.
HIDDEN_KEYS = ("cluster.environment", "cluster.setup", "hydra.launcher.setup")
SBATCH_KEYS = ("cluster.sbatch_args", "hydra.launcher.additional_parameters")
EXPORT = re.compile(r"(\s*['\"]?-{0,2}export)=.*=.*", re.DOTALL)
QUOTES = "'\""
SHORTEST = 3  # of a value that is searched in messages
PARENTS = ("cluster", "")

Config = TypeVar("Config")


def new_secret() -> str:
    """A random secret, 64 characters."""
    return secrets.token_hex(32)


def without_secrets(config: Config) -> Config:
    """A config dataclass that may be published: NAME=<hidden> in `cluster.environment`."""
    cluster = getattr(config, "cluster", None)
    if cluster is None:
        return config
    hidden = replace(cluster, **hidden_settings(vars(cluster)))
    changed: Any = config  # any dataclass
    published: Config = replace(changed, cluster=hidden)
    return published


def hidden_settings(node: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of a node `cluster` or `hydra.launcher` that are hidden, as they are published.

    additional_parameters are arguments of sbatch by name.
    """
    settings: dict[str, Any] = {}
    if node.get("environment"):
        settings["environment"] = [_named(setting) for setting in node["environment"]]
    if node.get("setup"):
        settings["setup"] = [HIDDEN for _ in node["setup"]]
    if node.get("sbatch_args"):
        settings["sbatch_args"] = [_without_variables(text) for text in node["sbatch_args"]]
    parameters = node.get("additional_parameters")
    if parameters and "export" in parameters:
        settings["additional_parameters"] = {**parameters, "export": HIDDEN}
    return settings


def hidden_overrides(overrides: Iterable[str], *, distinct: bool = False) -> list[str]:
    """Overrides as they may be published.

    Args:
        distinct: two values stay different, as the runs of a sweep must: the mark has four digits
            of the value's digest.
    """
    return [_hidden(override, distinct=distinct) for override in overrides]


def hide_values(text: str, overrides: Sequence[str]) -> str:
    """A message in which values of these overrides are hidden."""
    for secret in sorted(_secrets(overrides), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def is_hidden_key(key: str) -> bool:
    """Whether values of this key, or of a part of it, may be secrets."""
    below = tuple(f"{hidden}." for hidden in HIDDEN_KEYS)
    return key in HIDDEN_KEYS or key.startswith(below)


def _hidden(override: str, *, distinct: bool) -> str:
    key, equals, value = override.partition("=")
    name = key.lstrip("+~").partition("@")[0]
    if not equals or not _may_be_secret(name, value):
        return override
    mark = HIDDEN
    if distinct:
        digits = hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()[:4]
        mark = f"<hidden {digits}>"
    hide_item = {HIDDEN_KEYS[0]: _named, SBATCH_KEYS[0]: _without_variables}.get(name)
    if hide_item is not None and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
        items = [hide_item(item, mark) for item in _items(value.strip()[1:-1])]
        return f"{key}=[{','.join(items)}]"
    return override if MARK.fullmatch(value) else f"{key}={mark}"


def _may_be_secret(name: str, value: str) -> bool:
    """Whether the value of a key has a part that is hidden."""
    if name in SBATCH_KEYS:
        return re.search(r"\bexport\b.*[=:].*[=:]", value, re.DOTALL) is not None
    return is_hidden_key(name) or (name in PARENTS and "{" in value)


def _without_variables(argument: str, mark: str = HIDDEN) -> str:
    """'export=ALL,TOKEN=x' -> 'export=<hidden>'; any other argument of sbatch as it is."""
    match = EXPORT.fullmatch(argument)
    return f"{match[1].strip().lstrip(QUOTES)}={mark}" if match else argument


def _named(setting: str, mark: str = HIDDEN) -> str:
    """'NAME=VALUE' -> 'NAME=<hidden>'."""
    name, equals, value = setting.strip().lstrip("'\"").partition("=")
    if MARK.fullmatch(value):
        return setting
    is_name = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
    return f"{name}={mark}" if equals and is_name else mark


def _items(text: str) -> list[str]:
    """The elements of a list in Hydra's grammar: commas in quotes do not separate."""
    parts = re.findall(r"(?:'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|[^,'\"])+|['\"].*", text)
    return [part for part in (part.strip() for part in parts) if part]


def _secrets(overrides: Sequence[str]) -> Iterator[str]:
    """The values in overrides that must not be published, whole and by element."""
    for override in overrides:
        if _hidden(override, distinct=False) == override:
            continue
        value = override.partition("=")[2]
        parts = [value, *_items(value.strip("[]{} "))]
        for part in parts:
            bare = part.strip(" '\"")
            for text in (part, bare, bare.partition("=")[2].strip(" '\"")):
                if len(text) >= SHORTEST:
                    yield text
