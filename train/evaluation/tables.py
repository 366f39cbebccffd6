"""Print an evaluation report as tables."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...tables import print_table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _texts(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("Texts", "file", "bytes", "tokens", "bytes/token", "nats/token", "perplexity", "bits/byte")
    for name, row in rows.items():
        if name == "all":
            table.add_section()
        figures = (f"{row[key]:,.4f}" for key in ("bytes_per_token", "nats_per_token", "perplexity", "bits_per_byte"))
        table.add_row(escape(name), f"{row['bytes']:,}", f"{row['tokens']:,}", *figures)
    return table


def _tasks(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("Multiple choice", "task", "items", "acc", "acc_norm", "acc_bytes", "stderr", "cut")
    for name, row in rows.items():
        figures = (f"{row[key]:.4f}" for key in ("acc", "acc_norm", "acc_bytes"))
        stderr = "n/a" if row["acc_stderr"] is None else f"{row['acc_stderr']:.4f}"
        table.add_row(escape(name), f"{row['items']:,}", *figures, stderr, f"{row['cut']:,}")
    return table


def _core(core: Mapping[str, Any]) -> Table:
    table = _table("CORE", "task", "shots", "items", "accuracy", "guessing", "centered", "cut")
    for name, row in core["tasks"].items():
        figures = (f"{row[key]:.4f}" for key in ("accuracy", "baseline", "centred"))
        table.add_row(escape(name), str(row["num_fewshot"]), f"{row['items']:,}", *figures, f"{row['cut']:,}")
    table.add_section()
    table.add_row("CORE", "", "", "", "", f"{core['core']:.4f}", "")
    return table


def _harness(rows: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table("lm-eval", "task", "metric", "value")
    for name, row in rows.items():
        for metric, value in row.items():
            table.add_row(escape(name), escape(metric), f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    return table


def print_report(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    console = Console()
    head = f"{report['model']}: {report['dtype']} on {report['device']}, context {report['context_length']:,}"
    console.print(head, markup=False, highlight=False, soft_wrap=True)
    for part, table in (("text", _texts), ("tasks", _tasks), ("core", _core), ("harness", _harness)):
        if part in report:
            console.print()
            print_table(console, table(report[part]))
