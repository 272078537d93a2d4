"""The only module that uses private names of OmegaConf. Verified against omegaconf 2.3.1."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import GrammarParseError

VERIFIED_VERSION = "2.3.1"


def root_of(node: Any) -> Any:
    """The config that contains a node: the node itself where nothing contains it."""
    return node._get_root()


@contextmanager
def maps_replaced(names: Collection[str]) -> Iterator[None]:
    """Inside, a mapping that is merged into one of these names replaces it as a whole.

    OmegaConf has such a mode for lists alone: it merges mappings key by key.
    """
    merge = BaseContainer._map_merge

    def replace(dest: DictConfig, src: DictConfig) -> None:
        is_mapping = not (src._is_none() or src._is_interpolation() or src._is_missing())
        if dest._key() not in names or not is_mapping:
            merge(dest, src)
            return
        with open_dict(dest):  # else keys that the present map lacks are refused
            if isinstance(dest._value(), dict):
                dest.clear()
            merge(dest, src)

    BaseContainer._map_merge = staticmethod(replace)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        BaseContainer._map_merge = staticmethod(merge)  # type: ignore[method-assign]


def is_readable(text: str) -> bool:
    """Whether OmegaConf can read the interpolations of a text."""
    try:
        OmegaConf.create({"text": text})
    except GrammarParseError:
        return False
    return True
