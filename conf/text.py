"""Text of messages and overrides."""


def plural(number: int, noun: str) -> str:
    """'1 recording', '2 recordings'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quote_override(text: str) -> str:
    """A string as a value in Hydra's grammar of overrides: 'a, b'."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
