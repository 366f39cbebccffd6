"""Tables of the `account` report."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ...tables import print_table
from .memory import both_units


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.2f}%"


def _parameters(report: dict[str, Any]) -> Table:
    total, flops = report["num_parameters"], report["flops"]
    table = _table("Parameters", "group", "parameters", "share")
    for group, count in report["parameters"].items():
        table.add_row(group, f"{count:,}", f"{100 * count / total:.2f}%")
    table.add_section()
    table.add_row("all", f"{total:,}", both_units(4 * total) + " in float32")
    active = report["num_active_parameters"]
    if active != total:
        table.add_row("active per token", f"{active:,}", f"{100 * active / total:.2f}%")
    table.add_row("AdamW's step", f"{flops['adamw_flops']:,} FLOPs", f"at least {flops['adamw_bytes']:,} bytes")
    return table


def _flops(report: dict[str, Any]) -> Table:
    flops, batch = report["flops"], report["batch_size"]
    windows = " within windows" if report["policy"]["window"] or report["num_local_layers"] else ""
    table = _table(f"FLOPs of matrix products, attention in full{windows}", "forward, one sequence", "FLOPs", "share")
    for group, row in flops["forward_one_sequence"].items():
        table.add_row(group, f"{row['flops']:,}", f"{row['percent']:.2f}%")
    table.add_row("all", f"{flops['forward_one_sequence_flops']:,}", "100.00%")
    table.add_section()
    step = flops["step_flops"]
    for name, key in (
        (f"step of {batch:,}: forward and backward", "step_flops"),
        ("  attention exactly causal", "step_exact_causal_flops"),
        ("  with recomputation (HFU)", "step_hardware_flops"),
    ):
        table.add_row(name, f"{flops[key]:,}", f"{flops[key] / step:.4f}x")
    return table


def _memory(report: dict[str, Any]) -> Table:
    memory, batch = report["memory"], report["batch_size"]
    table = _table(f"Memory of a step on {batch:,} x {report['context_length']:,} tokens", "tensors", "bytes", "")
    for name, key in (
        ("weights", "weights_bytes"),
        ("master weights", "master_weights_bytes"),
        ("gradients", "gradients_bytes"),
        ("optimizer state", "optimizer_state_bytes"),
        ("saved for the backward pass", "saved_bytes"),
        ("logits at once", "logits_bytes"),
    ):
        if memory[key]:
            table.add_row(name, f"{memory[key]:,}", both_units(memory[key]))
    table.add_section()
    for phase, size in memory["peaks_bytes"].items():
        table.add_row(f"peak, {phase}", f"{size:,}", both_units(size))
    at = memory["peak_at"]
    where = at["operation"] if at["layer"] is None else f"{at['operation']} of layer {at['layer']}"
    table.add_row("peak", f"{memory['peak_bytes']:,}", f"{at['phase']}, {where}")
    table.add_section()
    if "written_out_float32_peak_bytes" in memory:
        written_out = memory["written_out_float32_peak_bytes"]
        table.add_row("naive attention in float32, peak", f"{written_out:,}", "CS336's model as it runs")
    fixed, each = memory["handout_fixed_bytes"], memory["handout_bytes_per_sequence"]
    table.add_row("CS336 handout's estimate", f"{fixed + each * batch:,}", f"{each:,} x batch + {fixed:,}")
    if "largest_batch" in memory:
        table.add_section()
        given = both_units(memory["memory_bytes"])
        table.add_row("largest batch", f"{memory['largest_batch']:,}", f"in {given}")
        table.add_row("  by the handout's estimate", f"{memory['largest_batch_by_handout']:,}", f"in {given}")
    return table


def _roofline(report: dict[str, Any]) -> Table:
    speed = report["speed"]
    title = f"Least time of a step on one {report['gpu']['name']}, by its datasheet"
    table = _table(title, "operation", "calls", "FLOPs/byte", "bound by", "ms", "lost")
    for op in sorted(speed["operations"], key=lambda op: -op["seconds"]):
        bound = "FLOPs" if op["compute_bound"] else "bytes"
        lost = f"{100 * op['lost_share']:.1f}%"
        table.add_row(op["name"], f"{op['count']}", f"{op['flops_per_byte']:.1f}", bound, f"{1e3 * op['seconds']:.3f}", lost)
    table.add_section()
    table.add_row("all", "", f"{speed['flops_per_byte']:.1f}", "", f"{1e3 * speed['best_step_s']:.3f}", "")
    table.add_row(f"best possible MFU, of {speed['peak_of']}", "", "", "", _percent(speed["best_mfu"]), "")
    return table


def _plan(report: dict[str, Any]) -> Table:
    speed, plan = report["speed"], report["plan"]
    table = _table("Time and money", "", "")
    table.add_row("fastest possible", f"{speed['best_tokens_per_s']:,.0f} tokens/s per GPU")
    table.add_row(f"at {_percent(plan['mfu'])} MFU", f"{plan['tokens_per_second']:,.0f} tokens/s on {plan['num_gpus']} GPU")
    table.add_row("tokens of the run", f"{plan['tokens']:,}")
    table.add_row("FLOPs of the run", f"{plan['flops']:.4g}")
    table.add_row("time", f"{plan['days']:,.2f} days")
    table.add_row("cost", "n/a (no price given)" if plan["cost"] is None else f"{plan['cost']:,.2f}")
    return table


def _conventions(report: dict[str, Any]) -> Table:
    plan = report["plan"]
    speed = "" if plan is None else f", and MFU at {plan['tokens_per_second'] / plan['num_gpus']:,.0f} tokens/s per GPU"
    table = _table(f"FLOPs per trained token by other conventions{speed}", "convention", "FLOPs", "MFU", "how")
    table.columns[3].justify = "left"
    for row in report["conventions"]:
        table.add_row(row["name"], f"{row['flops_per_token']:,.0f}", _percent(row["mfu"]), row["note"])
    return table


def _generation(report: dict[str, Any]) -> Table:
    title = f"Generation at token {report['context_length']:,}, {report['policy']['compute']}"
    table = _table(title, "batch", "FLOPs/token", "KV cache", "bytes/step", "max tokens/s")
    for row in report["generation"]:
        speed = row["tokens_per_second"]
        most = "n/a" if speed is None else f"{speed:,.0f} ({row['bound_by']})"
        cache = both_units(row["kv_cache_bytes"])
        table.add_row(f"{row['batch_size']}", f"{row['flops_per_token']:,}", cache, f"{row['bytes_per_step']:,}", most)
    return table


def _attention_of(report: dict[str, Any]) -> str:
    """Return a description of the heads, and of key-value heads and windows if the model has them."""
    shape, window = report["shape"], report["policy"]["window"]
    text = f"{shape['num_heads']} heads"
    if shape["head_dim"] is not None:
        text += f" of {shape['head_dim']}"
    if shape["num_kv_heads"] not in (None, shape["num_heads"]):
        text += f", {shape['num_kv_heads']} key-value heads"
    if window is not None:
        text += f", windows of {window:,}"
    elif shape["window"] is not None:
        text += f", windows of {shape['window']:,} in {report['num_local_layers']} layers"
    return text


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the tables of a report."""
    # Without a terminal, rich would wrap at 80 columns and cut the figures.
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=120)
    shape, checkpointing = report["shape"], report["policy"]["checkpointing"]
    if isinstance(checkpointing, int):
        checkpointing = f"{checkpointing} of {shape['num_layers']} blocks"
    console.print(
        f"[bold]{report['model']}[/bold]: {shape['num_layers']} layers of {shape['d_model']}, {_attention_of(report)}, "
        f"d_ff {shape['d_ff']}, vocabulary {shape['vocab_size']:,}; batch {report['batch_size']:,} x "
        f"{report['context_length']:,} tokens; {report['policy']['compute']}, {report['policy']['attention']} attention, "
        f"{report['policy']['ops']} ops, {report['policy']['loss']} loss, checkpointing {checkpointing}",
        highlight=False,
    )
    tables = [_parameters(report), _flops(report), _memory(report)]
    if report["speed"] is not None:
        tables += [_roofline(report), _plan(report)]
    tables += [_conventions(report), _generation(report)]
    for table in tables:
        console.print()
        print_table(console, table)
    if report["speed"] is None:
        known = ", ".join(report["gpus_known"])
        console.print(f"\nMFU, time and money are left out: name a GPU with --gpu, one of {known}.", highlight=False)
