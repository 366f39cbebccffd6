"""The pictures of the report, as SVG that is the same to the byte whenever it is drawn from the same results."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import atomic_file
from .jobs import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Stages = Mapping[str, Sequence[Row]]
"""The rows of each stage."""
OWN = "tilewright"


def _figure(panels: int = 1) -> "tuple[Figure, list[Axes]]":
    # Without pyplot, no state outlives the call.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * panels, 4.5), layout="constrained")
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _series(rows: Iterable[Row], op: str, value: str) -> dict[str, list[tuple[float, float]]]:
    """Return (size, value) of an op for each variant, in order of size."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("op") == op and row.get(value) is not None and row.get("size") is not None:
            found.setdefault(str(row.get("variant")), []).append((row["size"], row[value]))
    return {variant: sorted(points) for variant, points in found.items()}


def _draw_lines(axes: "Axes", series: Mapping[str, Sequence[tuple[float, float]]], **labels: str) -> None:
    for variant, points in series.items():
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, marker="o", ms=3, lw=2 if variant == OWN else 1, zorder=3 if variant == OWN else 2, label=variant)
    axes.set_xscale("log", base=2)
    axes.set(**labels)
    axes.set_ylim(0, 1.1 * max(y for points in series.values() for _, y in points))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _panels(rows: Sequence[Row], ops: Sequence[str], value: str, title: str, **labels: str) -> "Figure | None":
    series = {op: found for op in ops if (found := _series(rows, op, value))}
    if not series:
        return None
    figure, axes = _figure(len(series))
    for axis, (op, lines) in zip(axes, series.items(), strict=True):
        _draw_lines(axis, lines, title=f"{op}: {title}", **labels)
    return figure


def _ceilings(stages: Stages) -> dict[str, tuple[float, float | None]]:
    """Return (measured, datasheet) of the copy in bytes/s and of the bfloat16 product in FLOP/s."""
    found = {}
    for name, start, figure, unit in (("copy", "copy", "gb_per_s", 1e9), ("product", "bfloat16", "tflop_per_s", 1e12)):
        for row in stages.get("ceilings", ()):
            if str(row.get("variant", "")).startswith(start) and row.get(figure):
                datasheet = row.get(f"datasheet_{figure}")
                found[name] = row[figure] * unit, datasheet and datasheet * unit
    return found


def roofline(stages: Stages) -> "Figure | None":
    """Draw every op of ours under the roof of the measured ceilings and that of the datasheet (Williams et al. 2009)."""
    rows = [row for stage in ("kernels", "attention") for row in stages.get(stage, ())]
    points = [
        (row["tflop_per_s"] * 1e3 / row["gb_per_s"], row["tflop_per_s"], str(row.get("op", "attention")).split()[0])
        for row in rows
        if row.get("variant") == OWN and row.get("tflop_per_s") and row.get("gb_per_s")
    ]
    ceilings = _ceilings(stages)
    if not points or len(ceilings) < 2:
        return None
    figure, (axes,) = _figure()
    lowest, highest = min(x for x, _, _ in points) / 2, max(x for x, _, _ in points) * 2
    for i, (title, style) in enumerate((("measured in the same run", "-"), ("datasheet", "--"))):
        bandwidth, peak = ceilings["copy"][i], ceilings["product"][i]
        if bandwidth and peak:
            xs = sorted({lowest, peak / bandwidth, highest})
            axes.plot(xs, [min(bandwidth * x, peak) / 1e12 for x in xs], style, color="black", lw=1, label=title)
    for op in dict.fromkeys(op for _, _, op in points):
        xs, ys = zip(*((x, y) for x, y, name in points if name == op), strict=True)
        axes.scatter(xs, ys, s=12, label=op, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s", title="Roofline: every op at every shape")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def attention(stages: Stages) -> "Figure | None":
    """Draw the speed of causal attention over the length of the sequence."""
    ops = [f"attention K128 {direction}" for direction in ("forward", "backward")]
    labels = {"xlabel": "tokens of a sequence", "ylabel": "TFLOP/s"}
    return _panels(stages.get("attention", ()), ops, "tflop_per_s", "TFLOP/s over length", **labels)


def bandwidth(stages: Stages) -> "Figure | None":
    """Draw the bandwidth of RMSNorm over its width."""
    ops = [f"rms_norm {direction}" for direction in ("forward", "backward")]
    return _panels(stages.get("kernels", ()), ops, "gb_per_s", "GB/s over width", xlabel="width", ylabel="GB/s")


def memory(stages: Stages) -> "Figure | None":
    """Draw what the losses hold beyond their inputs over the vocabulary, each at the width of the model that has it."""
    ops = ("cross_entropy both", "linear_cross_entropy both")
    labels = {"xlabel": "vocabulary (tokens), of models of several widths", "ylabel": "GB (1e9 bytes)"}
    return _panels(stages.get("kernels", ()), ops, "peak_gb", "memory over vocabulary", **labels)


PLOTS: dict[str, Callable[[Stages], "Figure | None"]] = {
    "roofline": roofline,
    "attention": attention,
    "bandwidth": bandwidth,
    "memory": memory,
}


def draw_plots(stages: Stages, folder: Path, prefix: str) -> dict[str, Path]:
    """Draw each picture that there are results for to PREFIX-NAME.svg in `folder`; return their paths."""
    import matplotlib

    drawn = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Names of elements from their content, text as text, and no date: the same bytes every time.
        matplotlib.rcParams.update({"svg.hashsalt": "tilewright", "svg.fonttype": "none"})
        for name, plot in PLOTS.items():
            figure = plot(stages)
            if figure is not None:
                drawn[name] = folder / f"{prefix}-{name}.svg"
                with atomic_file(drawn[name]) as file:
                    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return drawn
