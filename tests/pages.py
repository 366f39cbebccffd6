"""Reads the tables and code cells of the documentation, so that tests run what a page shows."""

import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent.parent / "docs"


class Section(NamedTuple):
    """A section of a page: its heading, its Python cells, and the cells of its table rows, without the header."""

    heading: str
    code: str
    rows: list[list[str]]


def read_sections(page: str) -> list[Section]:
    """Return the sections of a page of `docs/`, split at its headings."""
    sections = []
    for part in re.split(r"(?m)^#+ ", (DOCS / page).read_text())[1:]:
        heading = part.partition("\n")[0]
        code = "\n".join(re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL))
        text = re.sub(r"```.*?```", "", part, flags=re.DOTALL)
        tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
        rows = [line.strip("| ").split(" | ") for table in tables for line in table.splitlines()[2:]]
        sections.append(Section(heading, code, rows))
    return sections


def code_spans(cell: str) -> list[str]:
    """Return the inline code of a table cell."""
    return re.findall(r"`([^`]+)`", cell)
