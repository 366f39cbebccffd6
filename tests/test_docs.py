"""The documentation: every public kernel has a page, the examples run, and the pictures of masks match the reference."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import tilewright.kernels
from tilewright.kernels import reference
from tilewright.kernels.op import ALL

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "kernels").glob("*.md"))


@pytest.fixture(scope="module")
def hooks():
    """Return the modules `ops` and `tiles` of docs/hooks, imported as top-level modules."""
    folder = str(ROOT / "docs" / "hooks")
    sys.path.insert(0, folder)
    try:
        yield {name: importlib.import_module(name) for name in ("ops", "tiles")}
    finally:
        sys.path.remove(folder)
        for name in ("ops", "svg", "tiles"):
            sys.modules.pop(name, None)


def test_every_op_and_example_has_a_page_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    listed = {name for page in PAGES for found in re.findall(r"<!-- docs: reference (.*?) -->", page.read_text())
              for name in found.split()}  # fmt: skip
    assert set(ALL) <= listed <= set(tilewright.kernels.__all__)
    assert all(f"kernels/{page.name}" in navigation for page in PAGES)
    assert all(f"examples/{path.stem}.md" in navigation for path in (ROOT / "examples").glob("*.py"))


def python_blocks():
    for page in (*PAGES, ROOT / "docs" / "quickstart.md"):
        for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)):
            yield pytest.param(code, id=f"{page.stem}-{i}")


@pytest.mark.parametrize("code", list(python_blocks()))
def test_examples_of_the_pages_run(code):
    torch.manual_seed(0)
    exec(compile(code, "page", "exec"), {})


def dense_mask(mask):
    """Return the mask (T, S) computed by the reference."""
    window = mask.window
    if mask.key_lengths is not None:
        cu_seqlens, cu_seqlens_k = (
            torch.tensor([0, *lengths]).cumsum(0) for lengths in (mask.document_lengths, mask.key_lengths)
        )
        return reference.packed_mask(cu_seqlens, cu_seqlens_k, mask.num_queries, mask.num_keys, mask.causal, window)
    ids = None
    if mask.document_lengths is not None:
        lengths = torch.tensor(mask.document_lengths)
        ids = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    cache_lengths = None if mask.cache_length is None else torch.tensor([mask.cache_length])
    found = reference.attention_mask(
        mask.num_queries, mask.num_keys, mask.causal, window, ids, cache_lengths=cache_lengths
    )  # fmt: skip
    return found.reshape(mask.num_queries, mask.num_keys)


def test_pictures_of_masks_agree_with_the_reference(hooks):
    block = hooks["tiles"].BLOCK
    for name, mask in hooks["tiles"].MASKS.items():
        tiles = dense_mask(mask).unflatten(1, (-1, block)).unflatten(0, (-1, block)).float().mean(dim=(1, 3))
        expected = (tiles > 0).int() + (tiles == 1).int()
        assert torch.equal(torch.from_numpy(mask.kinds()).int(), expected), name


def test_every_op_has_costs_launches_and_a_picture(hooks):
    for name in ALL:
        assert "| forward" in hooks["ops"].costs(name)
        assert f"`{ALL[name].kernels[0].__name__}`" in hooks["ops"].launches(name) or name == "linear_cross_entropy"
        assert "<svg" in hooks["tiles"].tiles(name)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_relative_links_name_files(page):
    links = re.findall(r"\[[^\]]*\]\(([^)\s#]+)(?:#[^)\s]*)?\)", page.read_text())
    missing = [link for link in links if not re.match("https?:", link) and not (page.parent / link).exists()]
    assert not missing
