"""The files of each split of a dataset: all forms of a card, globs, and converted files."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

from hub_server import Hub, serving_hub

from tilewright.errors import UserError
from tilewright.train.data.hub import find_splits

FILES = ("a/1.parquet", "a/2.parquet", "a/deep/3.parquet", "b/1.json.gz", "b/2.jsonl", "b/x.csv", "README.md")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_hub(monkeypatch) as hub:
        yield hub


def paths(config: str | None = None, files: str | None = None) -> dict[str, list[str]]:
    splits = find_splits("o/n", config, None, files).splits
    return {split: [file.path for file in files] for split, files in splits.items()}


@pytest.mark.parametrize(
    ("entry", "splits"),
    [
        ({"data_files": "a/*.parquet"}, {"train": ["a/1.parquet", "a/2.parquet"]}),
        ({"data_files": ["a/1.*", "b/2.*"]}, {"train": ["a/1.parquet", "b/2.jsonl"]}),
        ({"data_files": [{"split": "test", "path": "a/**"}]}, {"test": ["a/1.parquet", "a/2.parquet", "a/deep/3.parquet"]}),
        ({"data_files": [{"split": "train", "path": ["b/?.json*", "none/*"]}]}, {"train": ["b/1.json.gz", "b/2.jsonl"]}),
        ({"data_dir": "a/deep"}, {"train": ["a/deep/3.parquet"]}),
        ({"data_dir": "b", "data_files": "*.gz"}, {"train": ["b/1.json.gz"]}),
    ],
)
def test_the_forms_of_a_card(entry: dict[str, Any], splits: dict[str, list[str]], hub: Hub) -> None:
    hub.add("o/n", dict.fromkeys(FILES, b"x"), {"configs": [{"config_name": "only", **entry}]})
    assert paths() == splits


def test_the_default_config(hub: Hub) -> None:
    names = {name: {"config_name": name, "data_files": f"a/{n}.parquet"} for n, name in enumerate(("default", "other"), 1)}
    hub.add("o/n", dict.fromkeys(FILES, b"x"), {"configs": list(names.values())})
    assert paths() == {"train": ["a/1.parquet"]}
    assert paths("other") == {"train": ["a/2.parquet"]}
    hub.add("o/n", dict.fromkeys(FILES, b"x"), {"configs": [names["default"], {**names["other"], "default": True}]})
    assert paths() == {"train": ["a/2.parquet"]}
    hub.add("o/n", dict.fromkeys(FILES, b"x"), {"configs": [names["other"], {**names["other"], "config_name": "third"}]})
    with pytest.raises(UserError, match="several configs: choose one of other, third with --config"):
        paths()


def test_converted_files(hub: Hub) -> None:
    converted = ("en/train/0000.parquet", "en/train/0001.parquet", "en/test/0000.parquet", "fr/partial-train/0000.parquet")
    cards: list[dict[str, Any]] = [{}, {"configs": [{"config_name": "en", "data_files": "b/*.csv"}]}]
    for card in cards:
        hub.add("o/n", dict.fromkeys(FILES, b"x"), card, parquet=dict.fromkeys(converted, b"x"))
        assert paths("en") == {"train": list(converted[:2]), "test": [converted[2]]}
    hub.add("o/n", dict.fromkeys(FILES, b"x"), {}, parquet=dict.fromkeys(converted, b"x"))
    assert paths("fr") == {"partial-train": [converted[3]]}
    with pytest.raises(UserError, match="no config 'de': expected one of en, fr"):
        paths("de")
    hub.add("o/n", dict.fromkeys(FILES, b"x"))
    with pytest.raises(UserError, match="name files with --files"):
        paths()


def test_a_glob(hub: Hub) -> None:
    hub.add("o/n", dict.fromkeys(FILES, b"x"))
    assert paths(files="**/1.*") == {"train": ["a/1.parquet", "b/1.json.gz"]}
