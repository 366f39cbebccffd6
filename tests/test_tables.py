import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from tilewright.bench.run import _show
from tilewright.model.accounting.report import account
from tilewright.model.accounting.tables import print_report
from tilewright.model.accounting_options import AccountConfig
from tilewright.tables import print_table
from tilewright.train.evaluation import tables as evaluation


def rendered(width, show):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show(console)
    return console.file.getvalue()


def numbers(text):
    return set(re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?%?", text))


def account_report(console):
    print_report(account("gpt2-xl", AccountConfig(gpu="h200", memory="80GB")), console)


def bench_rows(console):
    row = {
        "p50_ms": 1234.5678,
        "p20_ms": 1200.25,
        "p80_ms": 1300.75,
        "count": 1234,
        "tokens_per_second": 123456.7,
        "peak_gb": 79.9,
    }
    _show(console, "training", [{"case": f"a long name of a case {i}", "variant": "tilewright", **row} for i in range(2)])


def evaluated_texts(console):
    row = {"bytes": 123_456_789, "tokens": 23_456_789, "bytes_per_token": 4.1234, "nats_per_token": 3.4567}
    row |= {"perplexity": 12345.6789, "bits_per_byte": 0.9876}
    print_table(console, evaluation._texts({"a/long/path/of/a/text.txt": row, "all": row}))


@pytest.mark.parametrize("show", [account_report, bench_rows, evaluated_texts])
@pytest.mark.parametrize("width", [100, 60, 45])
def test_no_number_is_cut_on_a_narrow_console(show, width):
    text = rendered(width, show)
    assert numbers(rendered(300, show)) <= numbers(text)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_a_table_that_does_not_fit_becomes_a_list():
    table = Table("name", title="Sizes")
    table.add_column("bytes read", justify="right")
    table.add_column("share", justify="right")
    table.add_row("weights", "1,234,567,890", "12.50%")
    table.add_row("gradients", "", "1.00%")
    lines = [line.rstrip() for line in rendered(30, lambda console: print_table(console, table)).splitlines()]
    assert lines == [
        "Sizes",
        "weights",
        "  bytes read  1,234,567,890",
        "  share       12.50%",
        "gradients",
        "  share       1.00%",
    ]
    assert "┃" in rendered(60, lambda console: print_table(console, table))
