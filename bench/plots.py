"""Plots of the report as SVG, byte-identical for the same results."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import atomic_file
from .jobs import Row
from .peers import OWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Stages = Mapping[str, Sequence[Row]]
"""Rows of each stage."""
DIRECTIONS = ("forward", "backward")
TEXTS = ("stories", "packages")


def _figure(panels: int = 1, width: float = 6.5, height: float = 4.5) -> "tuple[Figure, list[Axes]]":
    # `Figure` without pyplot leaves no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _series(rows: Iterable[Row], op: str, value: str) -> dict[str, list[tuple[float, float]]]:
    """Return the (size, value) points of an op for each variant, sorted by size."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("op") == op and row.get(value) is not None and row.get("size") is not None:
            found.setdefault(str(row.get("variant")), []).append((row["size"], row[value]))
    return {variant: sorted(points) for variant, points in found.items()}


def _colours(variants: Iterable[str]) -> dict[str, str]:
    """Return a color for each variant, ours first; the same in all panels."""
    ordered = dict.fromkeys([OWN, *variants])
    return {variant: f"C{i % 10}" for i, variant in enumerate(ordered)}


def _sizes_as_ticks(axes: "Axes", sizes: Iterable[float]) -> None:
    # Label the measured sizes; close neighbors get unlabeled minor ticks.
    named: list[float] = []
    for size in sorted(set(sizes)):
        if not named or size >= 1.5 * named[-1]:
            named.append(size)
    axes.set_xscale("log", base=2)
    axes.set_xticks(named, [f"{size:,.0f}" for size in named])
    axes.set_xticks(sorted(set(sizes)), minor=True)
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.tick_params(axis="x", labelsize="small")


def _panels(
    rows: Sequence[Row],
    ops: Mapping[str, str],
    value: str,
    ceiling: tuple[str, float] | None = None,
    **labels: str,
) -> "Figure | None":
    """Plot `value` over size, one line per variant and one panel per entry of `ops`, with an optional ceiling."""
    series = {title: found for op, title in ops.items() if (found := _series(rows, op, value))}
    if not series:
        return None
    figure, panels = _figure(len(series))
    colours = _colours(variant for lines in series.values() for variant in lines)
    for axes, (title, lines) in zip(panels, series.items(), strict=True):
        for variant, points in lines.items():
            ours = variant == OWN
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=2.5 if ours else 1.2, color=colours[variant],
                      zorder=3 if ours else 2)  # fmt: skip
        if ceiling is not None:
            axes.axhline(ceiling[1], color="black", lw=1, ls="--")
        _sizes_as_ticks(axes, (size for points in lines.values() for size, _ in points))
        axes.set(title=title, **labels)
        axes.set_ylim(0, 1.05 * max(*(y for points in lines.values() for _, y in points), ceiling[1] if ceiling else 0))
        axes.grid(alpha=0.3)
    _legend(figure, {variant: colours[variant] for lines in series.values() for variant in lines}, ceiling and ceiling[0])
    return figure


def _legend(figure: "Figure", colours: Mapping[str, str], ceiling: str | None = None) -> None:
    # Outside the panels, where it hides no line.
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colours[variant], lw=2.5 if variant == OWN else 1.2, marker="o", ms=4, label=variant)
             for variant in sorted(colours, key=lambda variant: variant != OWN)]  # fmt: skip
    if ceiling is not None:
        lines.append(Line2D([], [], color="black", lw=1, ls="--", label=ceiling))
    figure.legend(handles=lines, loc="outside right upper", fontsize="small")


def _ceilings(stages: Stages) -> dict[str, tuple[float, float | None]]:
    """Return (measured, datasheet) for the copy in bytes/s and the bfloat16 product in FLOP/s."""
    found = {}
    for name, start, figure, unit in (("copy", "copy", "gb_per_s", 1e9), ("product", "bfloat16", "tflop_per_s", 1e12)):
        for row in stages.get("ceilings", ()):
            if str(row.get("variant", "")).startswith(start) and row.get(figure):
                datasheet = row.get(f"datasheet_{figure}")
                found[name] = row[figure] * unit, datasheet and datasheet * unit
    return found


def roofline(stages: Stages) -> "Figure | None":
    """Plot our ops under the measured and the datasheet's roofline (Williams et al. 2009)."""
    rows = [row for stage in ("kernels", "attention") for row in stages.get(stage, ())]
    points = [
        (row["tflop_per_s"] * 1e3 / row["gb_per_s"], row["tflop_per_s"], _kind(row))
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
    axes.set(xscale="log", yscale="log", xlabel="FLOPs/byte", ylabel="TFLOP/s", title="Roofline: every op at every shape")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _kind(row: Row) -> str:
    case = str(row.get("case", ""))
    return "decoding" if case.startswith("attention") and " T1 " in case else case.split()[0] if case else ""


def attention(stages: Stages) -> "Figure | None":
    """Plot the speed of causal attention over the sequence length."""
    ops = {f"attention K128 {direction}": f"causal attention, head dim 128, {direction}" for direction in DIRECTIONS}
    labels = {"xlabel": "tokens per sequence; a batch has 16,384 tokens or one sequence", "ylabel": "TFLOP/s"}
    product = _ceilings(stages).get("product")
    ceiling = ("bfloat16 product, same run", product[0] / 1e12) if product else None
    return _panels(stages.get("attention", ()), ops, "tflop_per_s", ceiling, **labels)


def bandwidth(stages: Stages) -> "Figure | None":
    """Plot the bandwidth of RMSNorm over its width."""
    ops = {f"rms_norm {direction}": f"rms_norm, {direction}" for direction in DIRECTIONS}
    copy = _ceilings(stages).get("copy")
    ceiling = ("copy, same run", copy[0] / 1e9) if copy else None
    return _panels(stages.get("kernels", ()), ops, "gb_per_s", ceiling, xlabel="width", ylabel="GB/s")


def memory(stages: Stages) -> "Figure | None":
    """Plot the memory of the losses beyond their inputs over the vocabulary, at the width of a model with that vocabulary."""
    ops = {f"{op} both": f"{op}, forward and backward" for op in ("cross_entropy", "linear_cross_entropy")}
    labels = {"xlabel": "vocabulary (tokens), from models of several widths", "ylabel": "GB (1e9 bytes) beyond the inputs"}
    return _panels(stages.get("kernels", ()), ops, "peak_gb", None, **labels)


def run(stages: Stages) -> "Figure | None":
    """Plot the loss curves of the training run."""
    points = [row for row in stages.get("run", ()) if row.get("table") == "loss curve" and row.get("tokens")]
    if not points:
        return None
    figure, (axes,) = _figure()
    for name, label in (("loss", "training, last step"), ("valid_loss", "validation")):
        drawn = [(row["tokens"], row[name]) for row in points if row.get(name) is not None]
        axes.plot(*zip(*drawn, strict=True), marker=".", label=label)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=str(points[0].get("case")))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def tokenizer(stages: Stages) -> "Figure | None":
    """Plot the throughput of every library in every job, fastest first, on the two ordinary texts."""
    speeds: dict[str, dict[str, dict[str, float]]] = {}
    for row in stages.get("tokenizer", ()):
        job, _, text = str(row.get("case", "")).rpartition(", ")
        kind = text.rpartition(" of ")[2]
        if row.get("mb_per_s") and kind in TEXTS:
            speeds.setdefault(job, {}).setdefault(str(row.get("variant")), {})[kind] = row["mb_per_s"]
    if not speeds:
        return None
    figure, panels = _figure(len(speeds), width=3.2, height=3.6)
    for axes, (job, libraries) in zip(panels, speeds.items(), strict=True):
        names = sorted(libraries, key=lambda name: max(libraries[name].values()))
        for i, kind in enumerate(TEXTS):
            places = [place + 0.2 - 0.4 * i for place in range(len(names))]
            values = [libraries[name].get(kind, 0.0) for name in names]
            axes.barh(places, values, height=0.4, color=f"C{i}", label=kind if axes is panels[0] else None)
        axes.set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize="small")
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if label.get_text().startswith(OWN) else "normal")
        axes.set_title(job, fontsize="medium")
        axes.set_xlabel("MB/s")
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


PLOTS: dict[str, Callable[[Stages], "Figure | None"]] = {
    "roofline": roofline,
    "attention": attention,
    "bandwidth": bandwidth,
    "memory": memory,
    "run": run,
}
"""Plots of a GPU run."""
ANYWHERE: dict[str, Callable[[Stages], "Figure | None"]] = {"tokenizer": tokenizer}


def draw_plots(stages: Stages, folder: Path, prefix: str) -> dict[str, Path]:
    """Write each plot that has results to PREFIX-NAME.svg in `folder`; return the paths."""
    import matplotlib

    drawn = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Derive element IDs from the content and omit the date, for reproducible bytes; keep text as text.
        matplotlib.rcParams.update({"svg.hashsalt": "tilewright", "svg.fonttype": "none"})
        for name, plot in (PLOTS | ANYWHERE).items():
            figure = plot(stages)
            if figure is not None:
                drawn[name] = folder / f"{prefix}-{name}.svg"
                with atomic_file(drawn[name]) as file:
                    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return drawn
