"""Text of messages and overrides."""

import re

# What a terminal executes or reorders by: C0, DEL, C1, the bidirectional marks, embeddings,
# overrides and isolates, the line and paragraph separators, and bytes of a name that is not UTF-8,
# which Python holds as lone surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_UNPRINTABLE_IN_LINES = re.compile(_UNPRINTABLE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def plural(number: int, noun: str) -> str:
    """'1 recording', '2 recordings'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quote_override(text: str, quote: str = "'") -> str:
    """A string as a value in Hydra's grammar of overrides: 'a, b'.

    Args:
        quote: ' or ". The second one is easier to read within the shell's single quotes.
    """
    # Hydra reads a backslash as an escape only in front of the quote, or of another such one.
    escaped = re.sub(rf"(\\*)({quote}|\Z)", _escaped_quote, text)
    return f"{quote}{escaped}{quote}"


def escape_interpolations(text: str) -> str:
    r"""A text that OmegaConf reads as it is, with \${ in place of ${."""
    # The backslashes in front of it must be escaped too.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _escaped_quote(match: re.Match[str]) -> str:
    backslashes, quote = match.groups()
    escape = "\\" if quote else ""
    return f"{2 * backslashes}{escape}{quote}"


def printable(text: str) -> str:
    r"""A name or a line from a file, for a terminal: control characters are escaped, as in \x1b.

    Newlines and tabs are control characters too. A byte that was not UTF-8 (`os.fsdecode`) is
    written as that byte, \xe9.
    """
    return _UNPRINTABLE.sub(_escaped, text)


def printable_lines(text: str) -> str:
    """As `printable`, for a text of several lines: newlines and tabs stay."""
    return _UNPRINTABLE_IN_LINES.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # the byte that os.fsdecode could not decode
        code -= 0xDC00
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"


def one_line(error: BaseException) -> str:
    """The message of an error in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
