"""Reads XML of others: bounded size, depth and number of elements; no DTD, so no entities."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NoReturn
from xml.parsers import expat

from evspan.conf.text import printable
from evspan.data_prep.labels.interchange.annotations import LabelsError, read_bytes

MOST_BYTES = 256 << 20
MOST_DEPTH = 32
MOST_ELEMENTS = 4_000_000
Element = ElementTree.Element


def read_xml(path: Path) -> Element:
    """The root element of an XML file.

    Raises:
        LabelsError: it is no such file, exceeds a limit, or declares a document type.
        OSError: it cannot be read.
    """
    data = read_bytes(path, MOST_BYTES)
    reader = _Reader(path)
    try:
        reader.parser.Parse(data, True)
    except expat.ExpatError as error:
        raise LabelsError(f"{path} is no XML: {error}. Export it again") from error
    except (ValueError, LookupError) as error:  # an encoding that Python does not know
        reason = printable(str(error))[:100]
        raise LabelsError(f"{path} is no XML: {reason}. Export it again, in UTF-8") from error
    return reader.builder.close()


class _Reader:
    """A parser that builds elements and refuses what exceeds the limits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.builder = ElementTree.TreeBuilder()
        self.depth = 0
        self.elements = 0
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self.builder.data
        self.parser.StartDoctypeDeclHandler = self._refuse_doctype
        self.parser.EntityDeclHandler = self._refuse_doctype

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        self.elements += 1
        if self.depth > MOST_DEPTH:
            raise LabelsError(f"{self.path} is nested deeper than {MOST_DEPTH} elements")
        if self.elements > MOST_ELEMENTS:
            raise LabelsError(f"{self.path} has more than {MOST_ELEMENTS} elements. Split it")
        self.builder.start(name, attributes)

    def _end(self, name: str) -> None:
        self.depth -= 1
        self.builder.end(name)

    def _refuse_doctype(self, *_: Any) -> NoReturn:
        raise LabelsError(
            f"{self.path} declares a document type (<!DOCTYPE ...>), which files of labels do not "
            "need and which is not read. Remove the declaration"
        )


def text_of(element: Element | None, tag: str) -> str:
    """The text of the first child of this name; empty without one."""
    child = None if element is None else element.find(tag)
    if child is None or child.text is None:
        return ""
    return child.text.strip()


def write_xml(path: Path, root: Element) -> None:
    """Writes the element as a file with one element a line."""
    ElementTree.indent(root)
    data = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    path.write_bytes(data + b"\n")
