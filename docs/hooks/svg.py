"""Inline SVG: panels of tiles with labelled axes. docs/assets/site.css sets the colors for the light and the dark theme."""

import html
from dataclasses import dataclass

import numpy as np

SIDE = 250
BANDS = 4
BAND_HEIGHT = 22
LEFT, TOP, BOTTOM, RIGHT = 62, 26, 44, 14
MASK_LEGEND = (("full", "computed without a mask"), ("partial", "computed with a mask"), ("skipped", "skipped"))


@dataclass(frozen=True)
class Panel:
    """A drawing and its size in pixels."""

    body: str
    width: float
    height: float


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{html.escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="tile-{kind}"/>'


def _axes(width: float, height: float, columns: str, rows: str, x_ticks: dict[float, str], y_ticks: dict[float, str]) -> str:
    parts = [_text(x, height + 16, label) for x, label in x_ticks.items()]
    parts += [_text(-7, y + 4, label, "end") for y, label in y_ticks.items()]
    parts.append(_text(width / 2, height + 36, columns, extra='class="axis"'))
    parts.append(_text(0, 0, rows, extra=f'class="axis" transform="translate({-LEFT + 14} {height / 2:.1f}) rotate(-90)"'))
    return "".join(parts)


def _edge_path(edge: np.ndarray, scale: float) -> str:
    # Only the corners: points between two others on a straight line are left out.
    kept = [i for i in range(len(edge)) if i in (0, len(edge) - 1) or edge[i] - edge[i - 1] != edge[i + 1] - edge[i]]
    points = " ".join(f"{edge[i] * scale:.1f},{(i + 0.5) * scale:.1f}" for i in kept)
    return f'<polyline points="{points}" class="mask-edge"/>'


def mask_panel(
    kinds: np.ndarray, edges: tuple[np.ndarray, np.ndarray], block_m: int, block_n: int, num_keys: int, title: str = "",
    program: tuple[str, int] | None = None,
) -> Panel:  # fmt: skip
    """Return the tiles of a mask, queries downward and keys to the right, with the exact edges of the mask.

    `program` is a row or a column of tiles to outline.
    """
    scale = SIDE / num_keys
    num_queries = len(edges[0])
    width, height = SIDE, num_queries * scale
    names = ("skipped", "partial", "full")
    parts = [
        _rect(j * block_n * scale, i * block_m * scale, block_n * scale, block_m * scale, names[kinds[i, j]])
        for i, j in np.ndindex(*kinds.shape)
    ]
    seen = edges[1] > edges[0]
    parts += [_edge_path(np.clip(edge, 0, num_keys)[seen], scale) for edge in edges] if seen.all() else []
    if program:
        kind, i = program
        box = (0, i * block_m, num_keys, block_m) if kind == "row" else (i * block_n, 0, block_n, num_queries)
        parts.append(_rect(*(value * scale for value in box), "program"))
    ticks = {0.0: "0", width / 2: f"{num_keys // 2:,}", width: f"{num_keys:,}"}
    y_ticks = {0.0: "0", height: f"{num_queries:,}"} | ({height / 2: f"{num_queries // 2:,}"} if height > 100 else {})
    parts.append(_axes(width, height, "key", "query", ticks, y_ticks))
    if title:
        parts.append(_text(width / 2, -10, title, extra='class="title"'))
    return Panel("".join(parts), width, height)


def grid_panel(
    title: str, rows: int, columns: int, block_rows: int, block_columns: int, column_name: str = "columns",
    row_name: str = "rows", whole_rows: bool = False,
) -> Panel:  # fmt: skip
    """Return the first rows of blocks of a matrix; the first program has one block, or with `whole_rows` a row of them.

    Heights are not to scale.
    """
    num_blocks = -(-columns // block_columns)
    scale = SIDE / (num_blocks * block_columns)
    bands = min(BANDS, -(-rows // block_rows))
    height = bands * BAND_HEIGHT
    parts = [
        _rect(j * block_columns * scale, i * BAND_HEIGHT, block_columns * scale, BAND_HEIGHT,
              "full" if i == 0 and (whole_rows or j == 0) else "other")
        for i in range(bands) for j in range(num_blocks)
    ]  # fmt: skip
    if num_blocks * block_columns > columns:
        parts.append(_rect(columns * scale, 0, SIDE - columns * scale, height, "masked"))
    y_ticks = {i * BAND_HEIGHT: f"{i * block_rows:,}" for i in range(bands)}
    more = rows > bands * block_rows
    y_ticks[height] = f"… {rows:,}" if more else f"{rows:,}"
    parts.append(_axes(SIDE, height, column_name, row_name, {0.0: "0", columns * scale: f"{columns:,}"}, y_ticks))
    parts.append(_text(SIDE / 2, -10, title, extra='class="title"'))
    return Panel("".join(parts), SIDE, height)


_PATTERN = (
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line x1="0" y1="0" x2="0" y2="6" class="hatch"/></pattern></defs>'
)


def figure(panels: list[Panel], caption: str, legend: tuple[tuple[str, str], ...] = ()) -> str:
    """Return panels as HTML, in a row if the window is wide enough, with a legend and a caption below."""
    drawn = []
    for panel in panels:
        width, height = panel.width + LEFT + RIGHT, panel.height + TOP + BOTTOM
        drawn.append(
            f'<svg class="tiles" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
            f'aria-label="{html.escape(caption)}">{_PATTERN}<g transform="translate({LEFT} {TOP})">{panel.body}</g></svg>'
        )
    keys = "".join(f'<span><i class="key-{kind}"></i>{name}</span>' for kind, name in legend)
    keys = f'<p class="legend">{keys}</p>' if keys else ""
    return f'<figure class="tiles">{"".join(drawn)}{keys}<figcaption>{html.escape(caption)}</figcaption></figure>'
