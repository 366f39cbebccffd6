"""The commands `corpus stories`, `corpus fetch` and `corpus split`."""

from pathlib import Path

from .options import Positional


def corpus_stories(
    out: Path = Path("data/stories"),
    megabytes: float = 100.0,
    valid_megabytes: float = 2.0,
    seed: int = 0,
) -> None:
    """Generate the embedded corpus of children's stories, as train.txt and valid.txt.

    Args:
        out: Folder of the two files.
        megabytes: Size of train.txt, in MB.
        valid_megabytes: Size of valid.txt, in MB; its stories differ from those in train.txt.
        seed: Seed of the generator; the same seed gives the same bytes.
    """
    from ..files import require_absent
    from ..train.data.corpus import check_stories, write_stories

    train, valid = (require_absent(out / name) for name in ("train.txt", "valid.txt"))
    for size in (megabytes, valid_megabytes):
        check_stories(size, seed)
    write_stories(train, megabytes, seed=2 * seed)
    write_stories(valid, valid_megabytes, seed=2 * seed + 1)
    print(f"wrote {train} and {valid}; next: tilewright tokenizer train {train}")


def corpus_fetch(
    name: Positional[str],
    out: Path | None = None,
    config: str | None = None,
    split: str | None = None,
    valid_split: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    files: str | None = None,
    max_gigabytes: float | None = None,
    documents: int | None = None,
    shard_megabytes: float | None = None,
) -> None:
    """Fetch a dataset from the Hugging Face hub as training text and valid.txt; an interrupted fetch resumes.

    Args:
        name: OWNER/NAME on the hub, or a preset: tinystories, openwebtext, fineweb-edu-10bt, fineweb-10bt, climbmix.
        out: Folder of the text; default: data/NAME.
        config: Config of the dataset; default: the default of the dataset card.
        split: Training split; default: train.
        valid_split: Validation split; default: validation, or every 2000th training document if there is no such split.
        column: Column of the text; default: text.
        revision: Branch, tag or commit; default: the newest commit.
        files: Glob of Parquet or JSON lines files in the repository, instead of a config.
        max_gigabytes: Stop after the document that reaches this size of training text.
        documents: Stop after this number of documents.
        shard_megabytes: Size of train/00000.txt and so on; default: 1000, and a single train.txt for tinystories and
            openwebtext.
    """
    from dataclasses import replace

    from ..train.data.fetch import dataset_of, fetch

    options = {
        "config": config,
        "split": split,
        "valid_split": valid_split,
        "column": column,
        "revision": revision,
        "files": files,
        "max_gigabytes": max_gigabytes,
        "documents": documents,
        "shard_megabytes": shard_megabytes,
    }
    dataset = replace(dataset_of(name), **{option: value for option, value in options.items() if value is not None})
    folder = out or Path("data") / "-".join(filter(None, [name.rpartition("/")[2], config]))
    fetch(dataset, folder)
    train = folder / ("train.txt" if dataset.shard_megabytes is None else "train")
    print(f"next: tilewright tokenizer train {train}")


def corpus_split(texts: Positional[tuple[Path, ...]], out: Path, valid_share: float = 0.01) -> None:
    """Split texts into train.txt and valid.txt; the hash of each document decides its side.

    Args:
        texts: Files, folders or globs of UTF-8 text, plain, .gz or .zst, with <|endoftext|> after each document.
        out: Folder of the two files.
        valid_share: Share of the documents that go to valid.txt.
    """
    from ..train.data.corpus_split import split_corpus

    split = split_corpus(texts, out, valid_share)
    sides = {"train.txt": (split.train_documents, split.train_bytes), "valid.txt": (split.valid_documents, split.valid_bytes)}
    for name, (documents, size) in sides.items():
        print(f"wrote {out / name}: {documents:,} documents, {size / 1e6:,.1f} MB")
    print(f"next: tilewright tokenizer train {out / 'train.txt'}")
