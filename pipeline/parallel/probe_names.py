"""Names in the result of `probe`. Reading them needs no torch."""

IN_NODE = "in a node"
BETWEEN_NODES = "between nodes"
