import gzip
import io
import json

import pytest
from rich.console import Console

from tilewright.cli import main
from tilewright.tokenizer import Tokenizer, train_bpe
from tilewright.tokenizer.formats import TokenizerData, load_tiktoken, load_tokenizer, read_gpt2_files
from tilewright.tokenizer.inspect import (
    beginning,
    coloured,
    longest_tokens,
    measure_text,
    printable,
    report,
    split_of,
    unused_tokens,
)

BYTES = {id: bytes([id]) for id in range(256)}
SMALL = Tokenizer(BYTES | {256: b"ab", 257: b"abab", 258: b"cd"}, [(b"a", b"b"), (b"ab", b"ab"), (b"c", b"d")], ["<|long|>"])


def test_longest_tokens_exclude_special_ones():
    assert longest_tokens(SMALL, 3) == [b"abab", b"ab", b"cd"]


def test_measure_text_counts_tokens(text_file):
    figures = measure_text(SMALL, text_file("ababab ab<|long|>é"))
    assert (figures.num_bytes, figures.num_tokens) == (19, 7)
    assert figures.bytes_per_token == 19 / 7
    assert [figures.counts[id] for id in (256, 257, 258, 259, ord(" "), 0xC3)] == [2, 1, 0, 1, 1, 1]
    assert unused_tokens(SMALL, figures) == [258]


def test_compressed_files_and_columns_are_read(tmp_path):
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"ababab ab"))
    (tmp_path / "rows.jsonl").write_text('{"text": "ababab"}\n{"text": null}\n{"text": " ab"}\n')
    (tmp_path / "nothing.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    for name in ("text.gz", "rows.jsonl"):
        figures = measure_text(SMALL, tmp_path / name)
        assert (figures.num_bytes, figures.num_tokens) == (9, 4)
        assert beginning(tmp_path / name) == "ababab ab"
    assert measure_text(SMALL, tmp_path / "nothing.jsonl").bytes_per_token == 0
    assert beginning(tmp_path / "nothing.jsonl") == ""


def test_tokens_print_on_one_line():
    assert printable(" é中\n\t\x00".encode() + b"\xe4\xb8") == r" é中\n\t\x00\xe4\xb8"


def test_a_split_shows_every_token():
    split = split_of(SMALL, "abab\nab é<|long|>")
    assert split == ["abab", "\\n\n", "ab", " ", "\\xc3", "\\xa9", "<|long|>"]
    shown = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    shown.print(coloured(split))
    output = shown.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert output.count("\x1b[30;48;2;") >= len(split)
    assert "".join(split).replace("\n", "") in coloured(split).plain.replace("\n", "")


def test_report_lists_all_figures(text_file):
    data = TokenizerData(SMALL.vocab, SMALL.merges, SMALL.special_tokens, training={"bytes": 12})
    alone = report(data, SMALL)
    assert alone["tokens"] == "260: 256 bytes, 3 merges, 1 special"
    assert alone["longest"].startswith("'abab', 'ab', 'cd'")
    assert alone["training: bytes"] == "12"
    whole = report(data, SMALL, text_file("ab ab ab cd"))
    assert whole["text"] == "11 bytes, 7 tokens, 1.571 bytes/token"
    assert whole["most frequent"] == "' ', 'ab', 'cd'"
    assert whole["unused"] == "1 merged tokens: 'abab'"


@pytest.fixture
def run_folder(tmp_path, text_file, real_text):
    tokenizer = Tokenizer(*train_bpe(text_file(real_text), 400, ["<|endoftext|>"]), ["<|endoftext|>"])
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "text.txt").write_text("The cat\nsat.")
    return tmp_path


@pytest.mark.parametrize("format", ["huggingface", "tiktoken", "gpt2", "tilewright"])
def test_export_writes_every_format(capsys, run_folder, format):
    arguments = ["tokenizer", "export", str(run_folder), "--to", format, "--out", str(run_folder / "out")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"wrote {run_folder / 'out'}: 400 tokens")
    own = load_tokenizer(run_folder / "tokenizer.json")
    out = run_folder / "out"
    if format == "tiktoken":
        read = load_tiktoken(out, special_tokens=own.special_tokens)
    elif format == "gpt2":
        vocab, merges = read_gpt2_files(out / "vocab.json", out / "merges.txt", list(own.special_tokens))
        read = TokenizerData(vocab, merges, own.special_tokens)
    else:
        read = load_tokenizer(out)
    assert read._replace(training=None) == own._replace(training=None)
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_export_chooses_a_name(capsys, run_folder):
    assert main(["tokenizer", "export", str(run_folder / "tokenizer.json"), "--to", "huggingface"]) == 0
    assert json.loads((run_folder / "huggingface.json").read_text())["model"]["type"] == "BPE"
    assert main(["tokenizer", "export", str(run_folder / "huggingface.json"), "--to", "tilewright"]) == 0
    capsys.readouterr()
    own, back = (load_tokenizer(run_folder / name) for name in ("tokenizer.json", "tilewright.json"))
    assert back._replace(training=None) == own._replace(training=None)


def test_inspect_shows_a_tokenizer_and_a_text(capsys, run_folder):
    assert main(["tokenizer", "inspect", str(run_folder), "--text", str(run_folder / "text.txt")]) == 0
    out = capsys.readouterr().out
    assert "tokens           400: 256 bytes, 143 merges, 1 special\n" in out
    assert "12 bytes, " in out
    assert "\x1b" not in out
    *_, first, second = out.splitlines()
    assert first.replace("|", "") == "The cat\\n"
    assert second.replace("|", "") == "sat."


@pytest.mark.parametrize(("variables", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_inspect_on_a_terminal_shows_token_boundaries(capsys, monkeypatch, run_folder, variables, colored):
    for name, value in ({"FORCE_COLOR": "1", "TERM": "xterm-256color"} | variables).items():
        monkeypatch.setenv(name, value)
    assert main(["tokenizer", "inspect", str(run_folder), "--text", str(run_folder / "text.txt")]) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    assert ("\x1b[30;48;" in first and "\x1b[30;48;" in second) == colored
    assert ("|" in first and "|" in second) != colored


@pytest.mark.parametrize("command", [["export", "--to", "gpt2"], ["inspect"]])
def test_a_missing_tokenizer_raises(capsys, tmp_path, command):
    assert main(["tokenizer", command[0], str(tmp_path), *command[1:]]) == 2
    assert "tokenizer.json does not exist: name the folder of a run or a tokenizer file" in capsys.readouterr().err
