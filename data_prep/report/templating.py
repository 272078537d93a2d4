"""The Jinja environment that the HTML reports share: page shell, tables, key figures, numbers.

A page is a template that extends `base.html` (blocks `style` and `body`) and imports what it needs
from `macros.html`. Every value is escaped; control characters become U+FFFD.
"""

from pathlib import Path
from typing import NamedTuple

from evspan.data_prep.report import number_format
from evspan.data_prep.report.markup import number_cell, printable
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


class Column(NamedTuple):
    """The head of a table's column. numeric: right-aligned, sorted by value."""

    title: str
    numeric: bool = True


class KeyFigure(NamedTuple):
    """A number at the top of a page with its name and, in small print, a note."""

    name: str
    value: str
    note: str = ""


def report_environment(templates: Path = TEMPLATES) -> Environment:
    """Creates an environment with the shared templates and those of the folder `templates`.

    Globals of the templates: `number_cell(value, format)`, and the formats of `number_format`:
    `count`, `decimals(digits)`, `duration`, `percent`, `short`.
    """
    environment = Environment(
        loader=FileSystemLoader([templates, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_without_control_characters,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        number_cell=number_cell,
        count=number_format.count,
        decimals=number_format.decimals,
        duration=number_format.duration,
        percent=number_format.percent,
        short=number_format.short,
    )
    return environment


def _without_control_characters(value: object) -> object:
    """Markup is passed on as it is: it was escaped where it was built."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value
