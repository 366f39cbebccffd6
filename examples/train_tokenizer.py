"""Train a byte-level BPE tokenizer on your files, encode them, and save the tokenizer for other libraries.

Without files it trains on 1 MB of generated stories. The tokenizer is written to tokenizer/ in the current folder.

    python examples/train_tokenizer.py notes.txt more.jsonl.gz --vocab-size 8000
"""

import argparse
import tempfile
import time
from pathlib import Path

from tilewright.tokenizer import END_OF_TEXT, Files, Tokenizer, iter_encoded, train_bpe
from tilewright.tokenizer.formats import save_huggingface, save_tiktoken
from tilewright.train.data.corpus import write_stories


def main() -> None:
    """Train, save, encode and decode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="text, JSON lines or Parquet, also as .gz or .zst")
    parser.add_argument("--vocab-size", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = options.files or [Path(folder) / "stories.txt"]
        if not options.files:
            write_stories(files[0], megabytes=1)
        train(files, options.vocab_size, Path("tokenizer"))


def train(files: list[Path], vocab_size: int, out: Path) -> None:
    """Train a tokenizer on the files and write it in three formats."""
    start = time.perf_counter()
    # END_OF_TEXT separates documents: no merge crosses it.
    sources = [Files(str(file)) for file in files]
    tokenizer = Tokenizer(*train_bpe(sources, vocab_size, [END_OF_TEXT]), [END_OF_TEXT])
    print(f"trained {tokenizer.vocab_size:,} tokens in {time.perf_counter() - start:.1f} s")
    longest = sorted(tokenizer.data.vocab.values(), key=len)[-5:]
    print("the longest:", ", ".join(repr(token.decode(errors="replace")) for token in longest))

    out.mkdir(exist_ok=True)
    tokenizer.save(out / "tokenizer.json")  # Tokenizer.load reads it back
    save_huggingface(out / "huggingface.json", tokenizer.data)  # for the library tokenizers
    save_tiktoken(out / "ranks.tiktoken", tokenizer.data)  # for tiktoken
    assert Tokenizer.load(out / "tokenizer.json").fingerprint == tokenizer.fingerprint

    text = "A small test: naïve café, 3.14!"
    ids = tokenizer.encode(text)
    print(" ".join(f"{tokenizer.decode([id])!r}" for id in ids))
    assert tokenizer.decode(ids) == text

    # Chunks of ids as NumPy arrays, encoded in parallel and in constant memory.
    num_tokens = sum(len(chunk) for chunk in iter_encoded(sources, tokenizer))
    num_bytes = sum(file.stat().st_size for file in files)
    print(f"{num_bytes:,} bytes on disk are {num_tokens:,} tokens: {num_bytes / num_tokens:.2f} bytes/token")


if __name__ == "__main__":
    main()
