"""Reads a report page: its tables, images, charts and tags."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

Attributes = dict[str, str]


class Cell(NamedTuple):
    """A cell of a table. value: its data-value."""

    text: str
    value: str | None


def _values(attrs: list[tuple[str, str | None]]) -> Attributes:
    """Attributes by name; those without a value are empty."""
    return {name: value or "" for name, value in attrs}


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tables: by id, the head, the rows and the foot, each a list of cells.
        images: (alt, src) of each.
        titles: by section, the tooltips of its charts.
        tags: all tags with their attributes, in order.
        text: all text.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tables: dict[str, list[list[Cell]]] = {}
        self.images: list[tuple[str, str]] = []
        self.titles: dict[str, list[str]] = {}
        self.tags: list[tuple[str, Attributes]] = []
        self.text = ""
        self._section = ""
        self._table = ""
        self._cell: Cell | None = None
        self._title: str | None = None
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens an element."""
        values = _values(attrs)
        self.tags.append((tag, values))
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag == "section":
            self._section = values["id"]
        elif tag == "table":
            self._table = values["id"]
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self._cell = Cell("", values.get("data-value"))
        elif tag == "title":
            self._title = ""
        elif tag == "img":
            self.images.append((values["alt"], values["src"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Records an element without content."""
        self.tags.append((tag, _values(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Closes an element."""
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            assert self._cell is not None
            self.tables[self._table][-1].append(self._cell)
            self._cell = None
        elif tag == "title":
            assert self._title is not None
            self.titles.setdefault(self._section, []).append(self._title)
            self._title = None

    def handle_data(self, data: str) -> None:
        """Adds text to the open title or cell."""
        if self._title is not None:
            self._title += data
        elif self._cell is not None:
            self._cell = self._cell._replace(text=self._cell.text + data)
        self.text += data

    def rows(self, table: str) -> dict[str, dict[str, str]]:
        """Rows by their first cell: of each column the data-value, or else the text."""
        head, *body = self.tables[table]
        rows = {}
        for cells in body:
            row = {}
            for column, cell in zip(head, cells, strict=True):
                row[column.text] = cell.text if cell.value is None else cell.value
            rows[cells[0].text] = row
        return rows

    def charts(self) -> list[ElementTree.Element]:
        """The SVG elements."""
        svgs = re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)
        return [ElementTree.fromstring(svg) for svg in svgs]
