"""The tokenizer commands on every input format, and their output in limited encodings."""

import base64
import io
import sys

import pytest

from huggingface_tokenizers import make
from tilewright.cli import main
from tilewright.tokenizer import Tokenizer, train_bpe
from tilewright.tokenizer.formats import save_gpt2_files, save_huggingface, save_tiktoken

SPECIAL = "<|endoftext|>"


@pytest.fixture(scope="module")
def trained(text_file, real_text):
    return Tokenizer(*train_bpe(text_file(real_text), 400, [SPECIAL]), [SPECIAL], "cl100k")


@pytest.fixture
def sources(trained, tmp_path):
    """Return for each format its path and the options for what it does not store."""
    save_tiktoken(tmp_path / "ranks.tiktoken", trained.data)
    save_gpt2_files(tmp_path / "gpt2", trained.data)
    save_huggingface(tmp_path / "huggingface.json", trained.data)
    trained.save(tmp_path / "tokenizer.json")
    options = ["--pattern", "cl100k", "--special-tokens", SPECIAL]
    return {
        "tiktoken": (tmp_path / "ranks.tiktoken", options),
        "gpt2": (tmp_path / "gpt2", options),
        "huggingface": (tmp_path / "huggingface.json", []),
        "tilewright": (tmp_path / "tokenizer.json", []),
    }


FORMATS = ("tiktoken", "gpt2", "huggingface", "tilewright")
formats = pytest.mark.parametrize("format", FORMATS)


@formats
def test_load_reads_every_format(trained, sources, format):
    path, cli_options = sources[format]
    options = {"pattern": "cl100k", "special_tokens": [SPECIAL]} if cli_options else {}
    assert Tokenizer.load(path, **options).fingerprint == trained.fingerprint


@pytest.mark.parametrize("style", ["llama", "gemma"])
def test_commands_accept_tokenizers_of_another_library(capsysbinary, tmp_path, style):
    pytest.importorskip("tokenizers")
    path = make(style, tmp_path / "tokenizer.json")
    text = "The cat sat.\n\nThe\tbird: 中文 🙂\n"
    (tmp_path / "text.txt").write_text(text)
    assert main(["tokenizer", "encode", str(tmp_path / "text.txt")]) == 0
    assert b"wrote " in capsysbinary.readouterr().out
    assert main(["tokenizer", "decode", str(tmp_path / "text.tokens")]) == 0
    assert capsysbinary.readouterr().out.decode() == text
    assert main(["tokenizer", "inspect", str(path), "--text", str(tmp_path / "text.txt")]) == 0
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert "backend          Hugging Face tokenizers" in lines
    assert any(line.startswith(f"text             {len(text.encode())} bytes") for line in lines)
    assert main(["tokenizer", "export", str(path), "--to", "tiktoken"]) == 2
    assert main(["tokenizer", "encode", str(tmp_path / "text.txt"), "--out", "o.tokens", "--pattern", "gpt2"]) == 2


@formats
def test_every_format_encodes_and_decodes(capsysbinary, trained, sources, tmp_path, format):
    path, cli_options = sources[format]
    text = "Every format: 1234 it'S.\n<|endoftext|>é"
    (tmp_path / "text.txt").write_text(text)
    assert main(["tokenizer", "encode", str(tmp_path / "text.txt"), "--tokenizer", str(path), *cli_options]) == 0
    assert b"wrote " in capsysbinary.readouterr().out
    assert main(["tokenizer", "decode", str(tmp_path / "text.tokens"), "--tokenizer", str(path), *cli_options]) == 0
    assert capsysbinary.readouterr().out.decode() == text
    # The tokenizer in another format decodes the same tokens.
    assert main(["tokenizer", "decode", str(tmp_path / "text.tokens"), "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0


@formats
def test_every_format_is_inspected(capsys, sources, format):
    path, cli_options = sources[format]
    assert main(["tokenizer", "inspect", str(path), *cli_options]) == 0
    out = capsys.readouterr().out
    assert "tokens           400: 256 bytes, 143 merges, 1 special\n" in out
    assert "pattern          cl100k\n" in out


@formats
@pytest.mark.parametrize("to", FORMATS)
def test_every_format_is_exported_to_every_other(capsys, trained, sources, tmp_path, format, to):
    path, cli_options = sources[format]
    out = tmp_path / "out"
    assert main(["tokenizer", "export", str(path), "--to", to, "--out", str(out), *cli_options]) == 0
    options = {"pattern": "cl100k", "special_tokens": [SPECIAL]} if sources[to][1] else {}
    assert Tokenizer.load(out, **options).fingerprint == trained.fingerprint


def test_options_that_a_file_stores_raise(capsys, sources):
    path, _ = sources["huggingface"]
    assert main(["tokenizer", "inspect", str(path), "--pattern", "gpt2"]) == 2
    assert f"{path} stores its own pattern and special tokens: omit both arguments" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_training_works_with_any_terminal_encoding(monkeypatch, text_file, tmp_path, encoding):
    text = text_file("中文中文中文 日本語日本語 " * 20)
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    out = tmp_path / "tokenizer.json"
    assert main(["tokenizer", "train", str(text), "--vocab-size", "270", "275", "--out", str(out)]) == 0
    sys.stdout.flush()
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer-270.json", "tokenizer-275.json"}
    lines = shown.getvalue().decode(encoding).splitlines()
    assert len(lines) == 2
    assert ("\\u65e5" in lines[1]) == (encoding != "utf-8")
    assert main(["tokenizer", "inspect", str(tmp_path / "tokenizer-275.json"), "--text", str(text)]) == 0


def test_outputs_that_are_not_writable_raise(capsys, sources, tmp_path):
    path, _ = sources["tilewright"]
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out.json"
    (tmp_path / "text.txt").write_text("text")
    for arguments in (
        ["export", str(path), "--to", "huggingface"],
        ["export", str(path), "--to", "tiktoken"],
        ["encode", str(tmp_path / "text.txt"), "--tokenizer", str(path)],
        ["train", str(tmp_path / "text.txt"), "--vocab-size", "258"],
    ):
        assert main(["tokenizer", *arguments, "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert err == f"tilewright: error: cannot write {out}: {tmp_path / 'file'} is not a folder\n"


def test_errors_name_the_invalid_file(capsys, sources):
    folder, cli_options = sources["gpt2"]
    merges = folder / "merges.txt"
    good = merges.read_text()
    for wrong in ("ab\n", "a b c\n", "\ufeff" + good, "q \n"):
        merges.write_text(wrong)
        assert main(["tokenizer", "inspect", str(folder), *cli_options]) == 2
        err = capsys.readouterr().err
        assert str(merges) in err
        assert "vocab.json" not in err
        assert err.count("\n") == 1


def test_a_byte_order_mark_raises(capsys, sources):
    path, _ = sources["huggingface"]
    path.write_text("\ufeff" + path.read_text())
    assert main(["tokenizer", "inspect", str(path)]) == 2
    assert capsys.readouterr().err == (f"tilewright: error: {path} begins with a byte order mark: expected UTF-8 without one\n")


def test_extending_tokens_that_no_merge_produces_raises(capsys, text_file, tmp_path):
    tokens = [*(bytes([byte]) for byte in range(256)), b"abc"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (tmp_path / "ranks.tiktoken").write_text("".join(lines))
    arguments = ["tokenizer", "train", str(text_file("abc")), "--extend", str(tmp_path / "ranks.tiktoken")]
    assert main([*arguments, "--out", str(tmp_path / "out.json")]) == 2
    assert "it has tokens that no merge produces" in capsys.readouterr().err
