"""Text of messages: what a terminal would execute is escaped."""

import os

import pytest
from evspan.conf.text import printable, printable_lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Füße 日本 🚗", "Füße 日本 🚗"),
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("\x9b31m", r"\x9b31m"),
        ("a\r\tb\x7f", r"a\x0d\x09b\x7f"),
        ("two\nlines", r"two\x0alines"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        (os.fsdecode(b"caf\xe9.raw"), r"caf\xe9.raw"),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_lines_keep_newlines_and_tabs() -> None:
    assert printable_lines("a\tb\nc\r\n\x1b[31m") == "a\tb\nc\\x0d\n\\x1b[31m"


def test_every_character_of_the_result_is_printable_or_a_space() -> None:
    text = printable("".join(map(chr, range(0x3000))) + "\ud800\udfff")
    assert not [c for c in text if ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0]
    text.encode()  # no lone surrogate is left
