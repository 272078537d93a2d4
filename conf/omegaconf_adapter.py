"""The only module that uses private names of OmegaConf. Verified against omegaconf 2.3.1."""

from typing import Any

VERIFIED_VERSION = "2.3.1"


def root_of(node: Any) -> Any:
    """The config that contains a node: the node itself where nothing contains it."""
    return node._get_root()
