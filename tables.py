"""Tables on the console that never cut a number, however narrow the console is."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_MIN_TEXT = 12


def print_table(console: Console, table: Table) -> None:
    """Print a table whose right-aligned columns hold numbers, which never wrap; other columns fold.

    If the numbers do not fit beside text of 12 characters, print each row as a list of its cells.
    """
    for column in table.columns:
        column.no_wrap, column.overflow = column.justify == "right", "fold"
    if _width(console, table) > console.width:
        for column in table.columns:
            column.header = str(column.header).replace(" ", "\n") if column.no_wrap else column.header
    if _width(console, table) > console.width:
        _print_rows(console, table)
    else:
        console.print(table)


def _width(console: Console, table: Table) -> int:
    """Return the least width of the table: a border, and for each column its cells, two blanks and a border."""
    width = 1
    for column in table.columns:
        most = max(Measurement.get(console, console.options, cell).maximum for cell in (column.header, *column.cells))
        width += 3 + (most if column.no_wrap else min(most, _MIN_TEXT))
    return width


def _print_rows(console: Console, table: Table) -> None:
    if table.title:
        console.print(table.title, style="bold", highlight=False)
    headers = [_text(console, str(column.header).replace("\n", " ")) for column in table.columns]
    indent = 4 + max(header.cell_len for header in headers[1:])
    for row in zip(*(column.cells for column in table.columns), strict=True):
        console.print(_text(console, row[0]), highlight=False)
        for header, cell in zip(headers[1:], row[1:], strict=True):
            if text := _text(console, cell):
                line = Text("  ") + header
                line.pad_right(indent - line.cell_len)
                console.print(line + text, highlight=False)


def _text(console: Console, cell: object) -> Text:
    return cell if isinstance(cell, Text) else console.render_str(str(cell), highlight=False)
