"""Directives about ops: their costs and launches come from their records, and text from the command itself."""

import contextlib
import importlib
import inspect
import io
import os
import re
from pathlib import Path
from unittest import mock

import torch

import tilewright.kernels
from tilewright.kernels.launch import Launch, recording
from tilewright.kernels.op import ALL, Op, Sizes

NUM_SHAPES = 4
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_ROWS", "BLOCK_WIDTH", "PARTS", "BLOCK_TOKENS", "BLOCK_HEADS",
          "BLOCK_CHANNELS", "BLOCK", "BLOCK_COLUMNS")  # fmt: skip


def table(header: list[str], rows: list[list[str]], numbers: int) -> str:
    """Return a Markdown table whose last `numbers` columns are right-aligned."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def shape_of(op: Op, sizes: Sizes) -> str:
    """Return the label of a call without the op's name."""
    return op.label(sizes).removeprefix(op.name).strip()


def costs(name: str) -> str:
    """Return the least bytes and the FLOPs of an op at the first shapes that the bench measures, in bfloat16."""
    op = ALL[name]
    rows = []
    for sizes in op.shapes[:NUM_SHAPES]:
        found = op.cost(torch.bfloat16.itemsize, **sizes)
        passes = [("forward", found.forward), ("backward", found.backward)]
        if found.forward is None or found.backward is None:
            passes = [("forward and backward", found.both)]
        for which, cost in passes:
            assert cost is not None
            figures = [f"{cost.bytes / 1e6:,.1f} MB", f"{cost.flops / 1e9:,.2f} G", f"{cost.flops / cost.bytes:,.1f}"]
            rows.append([shape_of(op, sizes), which, *figures])
    return table(["shape", "pass", "bytes", "FLOPs", "FLOPs/byte"], rows, 3)


def recorded(op: Op, sizes: Sizes) -> list[Launch]:
    """Return what a call in bfloat16 and its backward pass launch on an H100."""
    with recording((9, 0)) as found:
        positional, options = op.arguments(torch.device("meta"), torch.bfloat16, **sizes)
        outputs = op.function(*positional, **options)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None and y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return found


def launches(name: str) -> str:
    """Return the launches of a call at the first shape that the bench measures, each kind once."""
    op = ALL[name]
    rows = []
    for launch in recorded(op, op.shapes[0]):
        blocks = ", ".join(f"{key} {launch.constants[key]:,}" for key in BLOCKS if key in launch.constants)
        row = [f"`{launch.kernel.__name__}`", blocks, f"{launch.num_programs:,}", str(launch.constants["num_warps"])]
        if row not in rows:
            rows.append(row)
    head = f"Launches for {shape_of(op, op.shapes[0])} in bfloat16 on an H100:\n\n"
    return head + table(["kernel", "blocks", "programs", "warps"], rows, 2)


def index(folder: str = "") -> str:
    """Return a table of all ops that have a record, with links to their pages in `folder`."""
    pages = {"add_rms_norm": "rms_norm", "rope_qk": "rope", "rope_qkv": "rope"}
    rows = []
    for name, op in sorted(ALL.items()):
        first = (op.function.__doc__ or "").strip().splitlines()[0]
        limit = "memory bandwidth" if op.bound_by == "bytes" else "matrix products"
        rows.append([f"[`{name}`]({folder}{pages.get(name, name)}.md)", first.replace("|", "\\|"), limit])
    return table(["op", "computes", "limited by"], rows, 0)


def reference(*kernels: str) -> str:
    """Return mkdocstrings' entries of names of `tilewright.kernels`, each by its module: a module may have the op's name."""
    entries = []
    for name in kernels:
        found = getattr(tilewright.kernels, name)
        entries.append(f"::: {found.__module__}.{found.__qualname__}\n    options: {{heading_level: 3}}")
    return "\n\n".join(entries)


def other_kernels() -> str:
    """Return links to the names of `tilewright.kernels` on the pages of ops, then entries of the names on no other page."""
    pages = "".join(path.read_text() for path in (Path(__file__).parent.parent / "kernels").glob("*.md"))
    documented = " ".join(re.findall(r"<!-- docs: reference (.*?) -->", pages)).split()
    found = {name: getattr(tilewright.kernels, name) for name in sorted(set(documented) - set(ALL))}
    links = ", ".join(f"[`{name}`][{value.__module__}.{value.__qualname__}]" for name, value in found.items())
    others = reference(*sorted(set(tilewright.kernels.__all__) - set(documented)))
    return f"The pages of the ops also describe {links}.\n\n{others}"


def _is_own(value: object) -> bool:
    """Return False for functions and classes of other packages."""
    is_data = not (inspect.isroutine(value) or inspect.isclass(value))
    return is_data or (value.__module__ or "").startswith("tilewright")


def names(package: str) -> str:
    """Return the docstring of a package and mkdocstrings' entries of its public names; names of PyTorch are only listed."""
    module = importlib.import_module(f"tilewright.{package}")
    own = [name for name in sorted(module.__all__) if _is_own(getattr(module, name))]
    parts = [inspect.cleandoc(module.__doc__ or "")]
    if others := sorted(set(module.__all__) - set(own)):
        parts.append(f"{' and '.join(f'`{name}`' for name in others)} are PyTorch's, exported under the same names.")
    return "\n\n".join((*parts, *(f"::: tilewright.{package}.{name}" for name in own)))


def command(*arguments: str) -> str:
    """Return what `tilewright ARGUMENTS` prints, run now."""
    from tilewright.cli import main

    out = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": "116", "NO_COLOR": "1"}), contextlib.redirect_stdout(out):
        status = main(list(arguments))
    if status:
        raise RuntimeError(f"tilewright {' '.join(arguments)} exited with status {status}")
    lines = [line.rstrip() for line in out.getvalue().strip().splitlines()]
    return "\n".join(["```text", f"$ tilewright {' '.join(arguments)}", *lines, "```"])
