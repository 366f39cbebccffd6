"""Evaluate every call of the page for users of other tools; compare the layouts of flash-attention and results of tiktoken."""

import pytest
import torch
import torch.nn.functional as F
from pages import code_spans, read_sections
from torch.testing import assert_close

from tilewright.cli.command_line import COMMANDS
from tilewright.tokenizer.text.patterns import resolve_pattern

SECTIONS = {section.heading: section for section in read_sections("coming_from.md") if section.rows}


def calls(section):
    """Return the pairs of Python expressions of a section's tables, without the commands."""
    pairs = [(code_spans(old), code_spans(new)[0]) for old, new in SECTIONS[section].rows]
    return [(old[0], new) for old, new in pairs if not new.startswith(("tilewright ", "torchrun "))]


@pytest.fixture
def names(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {}
    exec(SECTIONS[request.param].code, scope)
    return scope


@pytest.mark.parametrize("names", SECTIONS, indirect=True)
def test_every_call_runs(names, request):
    section = request.node.callspec.params["names"]
    assert len(calls(section)) > 5
    for _, new in calls(section):
        eval(new, names)


@pytest.mark.parametrize("names", ["flash-attention"], indirect=True)
def test_layouts_of_flash_attention(names):
    results = {old: eval(new, names) for old, new in calls("flash-attention")}
    q, k, v, packed, qkv = (names[name] for name in ("q", "k", "v", "packed", "qkv"))

    def plain(q, k, v, causal):
        heads = (x.transpose(-3, -2) for x in (q, *(x.repeat_interleave(q.shape[-2] // x.shape[-2], dim=-2) for x in (k, v))))
        return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(-3, -2)

    assert_close(results["flash_attn_func(q, k, v)"], plain(q, k, v, False))
    assert_close(results["flash_attn_func(q, k, v, causal=True)"], plain(q, k, v, True))
    assert_close(results["flash_attn_qkvpacked_func(qkv)"], plain(*qkv.unbind(2), False))
    varlen = next(result for old, result in results.items() if "varlen" in old)
    assert_close(varlen, torch.cat([plain(part, part, part, True) for part in packed.split([8, 12])]))
    first, second = q.unflatten(-1, (2, -1)).unbind(-2)
    cos, sin = names["cos"][:, None], names["sin"][:, None]
    rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    assert_close(results["apply_rotary_emb(q, cos, sin)"], rotated)


@pytest.mark.parametrize("names", ["tiktoken"], indirect=True)
def test_results_equal_tiktoken(names):
    tiktoken = pytest.importorskip("tiktoken")
    data = names["tokenizer"].data
    ranks = {token: id for id, token in data.vocab.items() if token.decode(errors="replace") not in data.special_tokens}
    encoding = tiktoken.Encoding(
        "test", pat_str=resolve_pattern("cl100k"), mergeable_ranks=ranks, special_tokens=data.special_tokens
    )
    for old, new in calls("tiktoken"):
        expected, actual = eval(old, {**names, "encoding": encoding}), eval(new, names)
        assert list(actual) == list(expected) if hasattr(expected, "__len__") else actual == expected, old


def test_commands_exist():
    codes = [code for section in SECTIONS.values() for _, new in section.rows for code in code_spans(new)]
    commands = [code.split() for code in codes if code.startswith("tilewright ")]
    assert len(commands) > 5
    for words in commands:
        assert any(" ".join(words[1:end]) in COMMANDS for end in (2, 3)), words
