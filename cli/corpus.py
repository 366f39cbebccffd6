"""Corpora: made, fetched, split."""

from pathlib import Path
from typing import Literal

from .options import Positional


def corpus_stories(
    out: Path = Path("data/stories"),
    megabytes: float = 100.0,
    valid_megabytes: float = 2.0,
    seed: int = 0,
) -> None:
    """Write the embedded corpus: children's stories from a seeded generator, as train.txt and valid.txt.

    Args:
        out: Folder of the two files.
        megabytes: Size of train.txt, in MB.
        valid_megabytes: Size of valid.txt, in MB; its stories are others.
        seed: The same seed gives the same bytes.
    """
    from ..files import require_absent
    from ..train.data.corpus import check_stories, write_stories

    train, valid = (require_absent(out / name) for name in ("train.txt", "valid.txt"))
    for size in (megabytes, valid_megabytes):
        check_stories(size, seed)
    write_stories(train, megabytes, seed=2 * seed)
    write_stories(valid, valid_megabytes, seed=2 * seed + 1)
    print(f"wrote {train} and {valid}; next: tilewright tokenizer train {train}")


def corpus_fetch(name: Positional[Literal["tinystories", "openwebtext"]], out: Path | None = None) -> None:
    """Download a corpus from the Hugging Face hub, as train.txt and valid.txt; an interrupted download goes on.

    Args:
        name: Which corpus.
        out: Folder of the two files; by default data/NAME.
    """
    from ..train.data.corpus import fetch

    folder = out or Path("data") / name
    fetch(name, folder)
    print(f"next: tilewright tokenizer train {folder / 'train.txt'}")


def corpus_split(texts: Positional[tuple[Path, ...]], out: Path, valid_share: float = 0.01) -> None:
    """Split texts into train.txt and valid.txt, each document by the hash of its own bytes.

    Args:
        texts: Files, folders or globs of UTF-8 text, plain, .gz or .zst, with <|endoftext|> after each document.
        out: Folder of the two files.
        valid_share: Share of the documents that become validation text.
    """
    from ..train.data.corpus_split import split_corpus

    split = split_corpus(texts, out, valid_share)
    sides = {"train.txt": (split.train_documents, split.train_bytes), "valid.txt": (split.valid_documents, split.valid_bytes)}
    for name, (documents, size) in sides.items():
        print(f"wrote {out / name}: {documents:,} documents, {size / 1e6:,.1f} MB")
    print(f"next: tilewright tokenizer train {out / 'train.txt'}")
