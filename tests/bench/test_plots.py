import pytest
from matplotlib.colors import to_hex

from tilewright.bench import plots

CEILINGS = [
    {"variant": "copy of 1 GiB", "gb_per_s": 4300.0, "datasheet_gb_per_s": 4800.0},
    {"variant": "bfloat16 product 8192^3", "tflop_per_s": 790.0, "datasheet_tflop_per_s": 989.4},
]


def widths(direction, variant, speed):
    for size in (768, 1024, 4096):
        yield {"op": f"rms_norm {direction}", "size": size, "variant": variant, "gb_per_s": speed}


def drawn(figure):
    """Return (title, number of points, color) for every line of a figure's panels."""
    return [
        (axes.get_title(), len(line.get_xdata()), to_hex(line.get_color())) for axes in figure.axes for line in axes.get_lines()
    ]


def test_variants_keep_their_color_in_all_panels():
    # The second panel lacks torch, and the panels have different orders.
    rows = [*widths("forward", "torch", 1000.0), *widths("forward", "tilewright", 3900.0)]
    rows += [*widths("backward", "quack", 3500.0), *widths("backward", "tilewright", 3800.0)]
    figure = plots.bandwidth({"kernels": rows, "ceilings": CEILINGS})
    assert figure is not None
    torch, ours, quack, ceiling = (to_hex(color) for color in ("C1", "C0", "C2", "black"))
    forward, backward = "rms_norm, forward", "rms_norm, backward"
    assert drawn(figure) == [
        (forward, 3, torch), (forward, 3, ours), (forward, 2, ceiling),
        (backward, 3, quack), (backward, 3, ours), (backward, 2, ceiling),
    ]  # fmt: skip
    assert all(axes.get_ylim() == (0, pytest.approx(1.05 * 4300)) for axes in figure.axes)
    # All sizes have ticks; close neighbors share one label.
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["768", "4,096"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["tilewright", "torch", "quack", "copy, same run"]


def test_without_ceilings_the_lines_are_drawn_alone():
    figure = plots.bandwidth({"kernels": [*widths("forward", "torch", 1000.0)]})
    assert figure is not None
    assert len(drawn(figure)) == 1
    assert plots.bandwidth({}) is None


def test_the_roofline_separates_decoding_from_attention():
    rows = [
        {"case": f"attention B1 H16 {tokens} K128 forward", "variant": "tilewright", "tflop_per_s": 300.0, "gb_per_s": 2000.0}
        for tokens in ("T1024", "T1 S1024")
    ]
    figure = plots.roofline({"attention": rows, "ceilings": CEILINGS})
    assert figure is not None
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["measured in the same run", "datasheet", "attention", "decoding"]


def test_tokenizer_panels_sort_libraries_by_speed():
    def row(job, text, variant, speed):
        return {"case": f"{job}, 10 MB of {text}", "variant": variant, "mb_per_s": speed}

    rows = [row("decode", "stories", "tilewright", 300.0), row("decode", "packages", "tilewright", 200.0)]
    rows += [row("decode", "stories", "tiktoken", 100.0), row("decode", "cjk", "tiktoken", 900.0), {"case": "first calls"}]
    rows += [row("train 10,000 tokens", "stories", "tilewright", 100.0)]
    figure = plots.tokenizer({"tokenizer": rows})
    assert figure is not None
    decode, train = figure.axes
    assert (decode.get_title(), train.get_title()) == ("decode", "train 10,000 tokens")
    assert [label.get_text() for label in decode.get_yticklabels()] == ["tiktoken", "tilewright"]
    assert [bar.get_width() for bar in decode.patches] == [100.0, 300.0, 0.0, 200.0]
    assert plots.tokenizer({}) is None
