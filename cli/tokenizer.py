"""Commands that train, use, export and inspect tokenizers."""

import re
import sys
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .options import Positional


def tokenizer_train(
    texts: Positional[tuple[Path, ...]] = (),
    vocab_size: tuple[int, ...] = (10_000,),
    special_tokens: tuple[str, ...] = ("<|endoftext|>",),
    out: Path | None = None,
    pattern: str = "gpt2",
    ties: Literal["cs336", "huggingface"] = "cs336",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    column: str = "text",
    memory: str | None = None,
    num_workers: int | None = None,
    extend: Path | None = None,
    save_counts: Path | None = None,
    from_counts: Path | None = None,
) -> None:
    """Train a byte-level BPE tokenizer on text.

    Args:
        texts: Files, folders or globs of UTF-8 text: plain, .gz or .zst; .jsonl and .parquet hold one document a row.
        vocab_size: Number of tokens: 256 bytes, merges, special tokens. Each of several is written to tokenizer-SIZE.json.
        special_tokens: Tokens that merges never cross. They separate the documents of plain text.
        out: Output file; by default tokenizer.json in the folder of the first text or of the counts.
        pattern: Pattern of pretokens: gpt2, cl100k, o200k, llama3, qwen2, tekken, deepseek-v3, or a regular expression.
        ties: Which of equally frequent pairs merges first: the lexicographically greater, or the one with lower ids.
        min_frequency: Pairs that occur less often never merge.
        max_token_length: Maximum length of a token in bytes.
        column: Column of .jsonl and .parquet files that holds the text.
        memory: Memory limit for the counts, such as 500MB or 2GB; the rest is spilled to disk, in the folder of --out.
        num_workers: Number of threads; by default one per core.
        extend: Tokenizer to extend. Its merges come first, under new ids; its pattern and special tokens are used.
        save_counts: File to store the pretoken counts in, to train other vocabulary sizes without counting again.
        from_counts: File from --save-counts to use instead of text. Its pattern and special tokens are used.
    """
    import time

    from ..files import make_folder, refused_writes, require_absent
    from ..tokenizer import Tokenizer
    from ..tokenizer.counting import counts_file
    from ..tokenizer.counting.count_text import count_text
    from ..tokenizer.formats import save_tokenizer
    from ..tokenizer.learning.trainer import check_training, known_ids, learn_bpe, shorten_vocab
    from ..tokenizer.text.sources import Files

    if bool(texts) == (from_counts is not None):
        raise UserError("expected either texts or --from-counts: make a corpus with `tilewright corpus`")
    base = from_counts or texts[0]
    path = out or (base if base.is_dir() else base.parent) / "tokenizer.json"
    several = len(set(vocab_size)) > 1
    if not vocab_size:
        raise UserError("--vocab-size has no value: expected at least one size")
    paths = {size: path.with_stem(f"{path.stem}-{size}") if several else path for size in sorted(set(vocab_size))}
    if save_counts and save_counts.resolve() in {each.resolve() for each in paths.values()}:
        raise UserError(f"--save-counts is {save_counts}, the output file of the tokenizer: choose another file")
    for each in (*paths.values(), *([save_counts] if save_counts else [])):
        require_absent(each)
    known = None
    if extend:
        known = Tokenizer.load(extend)
        if known.ignore_merges:
            raise UserError(f"cannot extend {extend}: it has tokens that no merge produces")
        known_ids(known.merges)
        pattern, special_tokens = known.pattern, tuple(known.special_tokens)
    rules: dict[str, Any] = {"ties": ties, "min_frequency": min_frequency, "max_token_length": max_token_length}
    start = time.perf_counter()
    if from_counts:
        text = counts_file.load_counts(from_counts)
        if known and (text.pattern, {*text.special_tokens}) != (pattern, {*special_tokens}):
            raise UserError(
                f"{extend} and the counts in {from_counts} differ in pattern or special tokens: count the text with --extend"
            )
    else:
        check_training(min(paths), special_tokens, **rules)
        check_training(max(paths), special_tokens, num_known=len(known.merges) if known else 0)
        with refused_writes(path):
            make_folder(path.parent)
        options: dict[str, Any] = {"memory": _parse_bytes(memory), "scratch": path.parent, "num_workers": num_workers}
        text = count_text([Files(each, column) for each in texts], special_tokens, pattern=pattern, **options)
    if save_counts:
        counts_file.save_counts(save_counts, text)
    check_training(min(paths), text.special_tokens)
    _, merges = learn_bpe(text, max(paths), **rules, known_merges=known.merges if known else ())
    figures = {"text_bytes": text.text_bytes, "distinct_pretokens": len(text.counts), **rules}
    for size, each in paths.items():
        tokenizer = Tokenizer(*shorten_vocab(merges, size, text.special_tokens), text.special_tokens, text.pattern)
        save_tokenizer(each, tokenizer.data._replace(training=figures))
        specials = {token.encode() for token in text.special_tokens}
        longest = max((token for token in tokenizer.vocab.values() if token not in specials), key=len)
        print(
            f"wrote {each}: {tokenizer.vocab_size:,} tokens in {time.perf_counter() - start:.1f} s; "
            f"the longest is {longest.decode(errors='replace')!r}"
        )


def _parse_bytes(size: str | None) -> int | None:
    if size is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", size.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"memory is {size!r}: expected a size such as 500MB or 2GB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def tokenizer_encode(
    texts: Positional[tuple[Path, ...]],
    tokenizer: Path | None = None,
    out: Path | None = None,
    num_workers: int | None = None,
    pattern: str | None = None,
    special_tokens: tuple[str, ...] = (),
) -> None:
    """Encode a text to a token file, or several texts to token shards with an index.

    Several threads encode. An interrupted encoding resumes.

    Args:
        texts: Files, folders or globs of text or chats, a shard for each file; chats need a chat template beside the tokenizer.
        tokenizer: Tokenizer in a format of `tokenizer inspect`; by default tokenizer.json in the folder of the first text.
        out: Output file, or folder for several texts; by default the name of the text or folder with the ending .tokens.
        num_workers: Number of threads; by default one per core.
        pattern: Pattern of a tokenizer that stores none (tiktoken's and GPT-2's files), as for training; by default gpt2.
        special_tokens: Special tokens of such a tokenizer, in the order of their ids.
    """
    import glob

    from ..files import require_absent, require_file
    from ..tokenizer import read_tokenizer
    from ..tokenizer.chat_template import ChatTemplate
    from ..train.data.encoded_file import open_encoded
    from ..train.data.shard_encoding import default_folder, encode_shards

    if not texts:
        raise UserError("expected a text to encode: make a corpus with `tilewright corpus`")
    first = texts[0]
    several = len(texts) > 1 or first.is_dir() or (glob.has_magic(str(first)) and not first.exists())
    if len(texts) > 1 and out is None:
        raise UserError(f"cannot encode {len(texts)} texts without --out: name a folder for their shards")
    if several:
        path = out or default_folder(first)
    else:
        require_file(first, "text file", "make a corpus with `tilewright corpus`")
        path = require_absent(out or first.with_suffix(".tokens"))
    file = tokenizer or (first if first.is_dir() else first.parent) / "tokenizer.json"
    file = _tokenizer_path(file, "make one with `tilewright tokenizer train`")
    loaded = read_tokenizer(file, pattern=pattern, special_tokens=special_tokens)
    template = ChatTemplate.load(file if file.is_dir() else file.parent)
    if several:
        shards = encode_shards(texts, path, loaded, template, num_workers)
    else:
        shards = [open_encoded(first, path, loaded, template, num_workers)]
    headers = [shard.header for shard in shards]
    num_tokens, num_bytes = sum(each.num_tokens for each in headers), sum(each.text_bytes for each in headers)
    what = f"{num_tokens:,} tokens in {len(headers):,} shards" if several else f"{num_tokens:,} tokens"
    print(f"wrote {path}: {what} as {headers[0].dtype}, {num_bytes / max(1, num_tokens):.3f} bytes/token")


def tokenizer_decode(
    tokens: Positional[Path],
    tokenizer: Path | None = None,
    pattern: str | None = None,
    special_tokens: tuple[str, ...] = (),
) -> None:
    """Print the text of a token file.

    Args:
        tokens: Token file.
        tokenizer: Tokenizer in a format of `tokenizer inspect`; by default tokenizer.json in the folder of the token file.
        pattern: Pattern of a tokenizer that stores none (tiktoken's and GPT-2's files), as for training; by default gpt2.
        special_tokens: Special tokens of such a tokenizer, in the order of their ids.
    """
    from ..tokenizer import read_tokenizer
    from ..tokenizer.chat_template import ChatTemplate
    from ..train.data.datasets import open_dataset
    from ..train.data.encoding import decode_text
    from ..train.data.token_file import TokenDataset

    TokenDataset(tokens)
    file = tokenizer or tokens.with_name("tokenizer.json")
    file = _tokenizer_path(file, "name one with --tokenizer")
    loaded = read_tokenizer(file, pattern=pattern, special_tokens=special_tokens)
    template = ChatTemplate.load(file if file.is_dir() else file.parent)
    for piece in decode_text(open_dataset(tokens, loaded, template), loaded):
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def tokenizer_export(
    source: Positional[Path],
    to: Literal["huggingface", "tiktoken", "gpt2", "tilewright"],
    out: Path | None = None,
    pattern: str | None = None,
    special_tokens: tuple[str, ...] = (),
) -> None:
    """Write a tokenizer in the format of another library, which then gives the same ids.

    Args:
        source: Folder of a run, or a tokenizer in a format of `tokenizer inspect`.
        to: Format: huggingface writes a tokenizer.json, tiktoken its ranks, gpt2 a folder with vocab.json and merges.txt.
        out: Output path; by default the name of the format in the folder of the source.
        pattern: Pattern of a tokenizer that stores none (tiktoken's and GPT-2's files), as for training; by default gpt2.
        special_tokens: Special tokens of such a tokenizer, in the order of their ids.
    """
    from ..files import require_absent
    from ..tokenizer import Tokenizer
    from ..tokenizer.formats import load_tokenizer, save_gpt2_files, save_huggingface, save_tiktoken, save_tokenizer

    file = _tokenizer_path(source, "name the folder of a run or a tokenizer file")
    names = {"huggingface": "huggingface.json", "tiktoken": "ranks.tiktoken", "gpt2": "gpt2", "tilewright": "tilewright.json"}
    save = {"huggingface": save_huggingface, "tiktoken": save_tiktoken, "gpt2": save_gpt2_files, "tilewright": save_tokenizer}
    path = require_absent(out or (file if file.is_dir() else file.parent) / names[to])
    data = load_tokenizer(file, pattern, special_tokens)
    save[to](path, Tokenizer.of(data).data._replace(training=data.training))
    omitted = f"; the format stores neither the pattern, {data.pattern}, nor the special tokens, {data.special_tokens}"
    print(f"wrote {path}: {len(data.vocab):,} tokens{omitted if to in ('tiktoken', 'gpt2') else ''}")


def tokenizer_inspect(
    source: Positional[Path], text: Path | None = None, pattern: str | None = None, special_tokens: tuple[str, ...] = ()
) -> None:
    """Show a tokenizer's longest tokens and, for a text, bytes per token, unused tokens and a split.

    Formats: Tilewright's own file, Hugging Face's tokenizer.json, tiktoken's ranks, or a folder with GPT-2's vocab.json and
    merges.txt. Tokens that a tokenizer.json adds to every text, such as a begin-of-text, are ignored.

    Args:
        source: Folder of a run, or a tokenizer in one of these formats.
        text: UTF-8 text to encode for the figures and the split.
        pattern: Pattern of a tokenizer that stores none (tiktoken's and GPT-2's files), as for training; by default gpt2.
        special_tokens: Special tokens of such a tokenizer, in the order of their ids.
    """
    from rich.console import Console

    from ..files import require_file
    from ..tokenizer import Tokenizer, read_tokenizer
    from ..tokenizer.formats import load_tokenizer
    from ..tokenizer.inspect import beginning, coloured, report, split_of

    file = _tokenizer_path(source, "name the folder of a run or a tokenizer file")
    if text is not None:
        require_file(text, "text file")
    tokenizer = read_tokenizer(file, pattern=pattern, special_tokens=special_tokens)
    ours = isinstance(tokenizer, Tokenizer)
    data = load_tokenizer(file, pattern, special_tokens, ignore_template=True) if ours else None
    for name, line in report(data, tokenizer, text).items():
        print(f"{name:16} {line}")
    if text is not None:
        split = split_of(tokenizer, beginning(text))
        console = Console()
        has_colors = console.color_system is not None and not console.no_color
        print()
        console.print(coloured(split)) if has_colors else print("|".join(split))


def _tokenizer_path(source: Path, remedy: str) -> Path:
    """Return the tokenizer's file, or its folder if that holds GPT-2's two files; otherwise raise a `UserError`."""
    from ..files import require_file

    if source.is_dir():
        if not (source / "tokenizer.json").exists() and (source / "vocab.json").exists():
            return source
        source = source / "tokenizer.json"
    return require_file(source, "tokenizer", remedy)
