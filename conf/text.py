"""Words for messages."""


def plural(number: int, noun: str) -> str:
    """'1 recording', '2 recordings'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
