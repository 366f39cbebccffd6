"""Fetching of datasets from a hub on localhost: outputs, bitwise resume after interruptions, and errors."""

import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("pyarrow")

from hub_server import Hub, parquet_bytes, serving_hub

from tilewright.errors import UserError
from tilewright.tokenizer import END_OF_TEXT
from tilewright.tokenizer.text.sources import iter_blocks
from tilewright.train.data import fetch as module
from tilewright.train.data.fetch import DATASETS, Dataset, dataset_of, fetch

SEPARATOR = f"\n{END_OF_TEXT}\n"
NAME = "owner/texts"
TRAIN = [f"Document {i}.\n\n{'word ' * (i % 17)}".strip() for i in range(100)]
VALID = [f"Other {i}." for i in range(7)]
SMALL = Dataset(NAME, holdout=7, shard_megabytes=0.001)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_hub(monkeypatch) as hub:
        add_texts(hub)
        yield hub


def add_texts(hub: Hub) -> None:
    """Add 100 documents in three files with row groups of 10, and 7 documents of a validation split of another config."""
    files = {f"data/train-{n}.parquet": parquet_bytes(TRAIN[n * 40 : n * 40 + 40]) for n in range(3)}
    files["more/valid.parquet"] = parquet_bytes(VALID)
    both = [{"split": "train", "path": "data/train-*"}, {"split": "validation", "path": ["more/*.parquet"]}]
    configs = [
        {"config_name": "only", "data_files": "data/*.parquet", "default": True},
        {"config_name": "both", "data_files": both},
    ]
    hub.add(NAME, {**files, "README.md": b"text"}, {"configs": configs})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents(*paths: Path) -> list[str]:
    return "".join(path.read_text(encoding="utf-8") for path in paths).split(SEPARATOR)[:-1]


class Interrupted(Exception):
    """A simulated crash."""


def interrupt_after(patch: pytest.MonkeyPatch, units: int) -> None:
    real = module.iter_units

    def broken(*arguments: Any) -> Iterator[Any]:
        yield from islice(real(*arguments), units)
        raise Interrupted

    patch.setattr(module, "iter_units", broken)


class TestText:
    def test_of_a_config_with_two_splits(self, hub: Hub, folder: Path) -> None:
        fetch(Dataset(NAME, "both", shard_megabytes=None), folder)
        assert documents(folder / "train.txt") == TRAIN
        assert documents(folder / "valid.txt") == VALID

    def test_in_shards_with_an_index(self, hub: Hub, folder: Path) -> None:
        fetch(SMALL, folder)
        index = json.loads((folder / "corpus.json").read_text())
        assert (index["origin"]["repo"], index["commit"], len(index["train"]) > 3) == (NAME, "c0", True)
        for shard in [*index["train"], *index["valid"]]:
            data = (folder / shard["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
            assert data.count(SEPARATOR.encode()) == shard["documents"]
        shards = [folder / shard["name"] for shard in index["train"]]
        assert all(1000 <= shard.stat().st_size < 1150 for shard in shards[:-1])
        assert documents(*shards) == [text for i, text in enumerate(TRAIN, 1) if i % 7]
        assert documents(folder / "valid.txt") == TRAIN[6::7]
        assert sorted(folder.iterdir()) == [folder / name for name in ("corpus.json", "train", "valid.txt")]
        # The order in which the tokenizer reads a folder.
        assert b"".join(block.data.tobytes() for block in iter_blocks(folder / "train")) == b"".join(
            shard.read_bytes() for shard in shards
        )

    def test_end_of_text_is_removed_from_documents(self, hub: Hub, folder: Path) -> None:
        forged = END_OF_TEXT[:5] + END_OF_TEXT + END_OF_TEXT[5:]
        texts = [" one \n", "", "  \n", None, f"t{END_OF_TEXT}wo", END_OF_TEXT, f"thr{forged}ee{END_OF_TEXT}", "Zoë"]
        hub.add("o/forged", {"a.parquet": parquet_bytes(texts)})
        fetch(Dataset("o/forged", files="*.parquet", shard_megabytes=None), folder)
        assert documents(folder / "train.txt") == ["one", "two", "three", "Zoë"]

    @pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
    def test_of_json_lines(self, ending: str, hub: Hub, folder: Path) -> None:
        compress = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[ending]
        lines = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(TRAIN))
        hub.add("o/lines", {f"en/a.json{ending}": compress(lines.encode()), "en/b.txt": b"no"})
        fetch(Dataset("o/lines", files="en/*", column="body", shard_megabytes=None), folder)
        assert documents(folder / "train.txt") == TRAIN

    def test_of_converted_files(self, hub: Hub, folder: Path) -> None:
        converted = {f"plain/train/000{n}.parquet": parquet_bytes(TRAIN[n::2]) for n in range(2)}
        hub.add("o/script", {"script.py": b"code"}, parquet=converted)
        fetch(Dataset("o/script", shard_megabytes=None), folder)
        assert documents(folder / "train.txt") == TRAIN[::2] + TRAIN[1::2]

    def test_only_the_column_is_read(self, hub: Hub, folder: Path) -> None:
        image = [os.urandom(10_000) for _ in TRAIN]
        content = parquet_bytes(TRAIN, image=image)
        hub.add("o/images", {"a.parquet": content})
        fetch(Dataset("o/images", files="*.parquet", shard_megabytes=None), folder)
        spans = [span.removeprefix("bytes=").split("-") for _, path, span in hub.requests if "/resolve/" in path]
        assert sum(int(end) - int(start) + 1 for start, end in spans) < 0.3 * len(content)

    @pytest.mark.parametrize(
        ("limit", "count"), [({"documents": 33}, 33), ({"max_gigabytes": 1e-6}, 20), ({"documents": 10**9}, 100)]
    )
    def test_limits(self, limit: dict[str, Any], count: int, hub: Hub, folder: Path) -> None:
        fetch(Dataset(NAME, "both", shard_megabytes=None, **limit), folder)
        found = documents(folder / "train.txt")
        assert found == TRAIN[: len(found)]
        assert documents(folder / "valid.txt") == VALID
        if "documents" in limit:
            assert len(found) == count
        else:
            size = (folder / "train.txt").stat().st_size
            assert 1000 <= size < 1000 + len((found[-1] + SEPARATOR).encode())


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(data)


class TestInterruptions:
    @pytest.fixture
    def whole(self, hub: Hub, tmp_path: Path) -> dict[str, str]:
        fetch(SMALL, tmp_path / "whole")
        return digest(tmp_path / "whole")

    @pytest.mark.parametrize("save_every", [1, 700])
    @pytest.mark.parametrize("units", [0, 1, 4, 5, 9, 10])
    def test_end_with_the_same_bytes(
        self, units: int, save_every: int, whole: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            interrupt_after(patch, units)
            with pytest.raises(Interrupted):
                fetch(SMALL, folder, save_every)
        assert not (folder / "corpus.json").exists()
        fetch(SMALL, folder, save_every)
        assert digest(folder) == whole

    def test_repeated(self, whole: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for _ in range(8):
            with monkeypatch.context() as patch:
                interrupt_after(patch, 1)
                with pytest.raises(Interrupted):
                    fetch(SMALL, folder, 1)
        fetch(SMALL, folder)
        assert digest(folder) == whole

    def test_row_groups_are_not_read_again(self, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            interrupt_after(patch, 6)
            with pytest.raises(Interrupted):
                fetch(SMALL, folder, 1)
        hub.requests.clear()
        fetch(SMALL, folder)
        # Four of the ten row groups are missing. The other requests read footers.
        assert not [path for _, path, _ in hub.requests if path.endswith("train-0.parquet") and "resolve" in path][2:]

    def test_by_kills(self, whole: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        context = multiprocessing.get_context("fork")
        real, saved = module._Fetcher._save, context.Semaphore(0)

        def slow(self: module._Fetcher) -> None:
            real(self)
            saved.release()
            time.sleep(0.05)

        with monkeypatch.context() as patch:
            patch.setattr(module._Fetcher, "_save", slow)
            for saves in (2, 1, 3):
                process = context.Process(target=fetch, args=(SMALL, folder, 1))
                process.start()
                for _ in range(saves):
                    assert saved.acquire(timeout=60)
                process.kill()
                process.join()
                assert process.exitcode == -signal.SIGKILL
                while saved.acquire(block=False):
                    pass
        assert not (folder / "corpus.json").exists()
        fetch(SMALL, folder)
        assert digest(folder) == whole

    def test_by_another_process_that_fetches_the_same(self, whole: dict[str, str], hub: Hub, folder: Path) -> None:
        hub.requests.clear()
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=fetch, args=(SMALL, folder)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert digest(folder) == whole
        assert sum("/tree/" in path for _, path, _ in hub.requests) == 1

    def test_by_cut_connections(self, whole: dict[str, str], hub: Hub, folder: Path) -> None:
        hub.cuts, hub.cut_after = 4, 100
        fetch(SMALL, folder)
        assert hub.cuts == 0
        assert digest(folder) == whole

    def test_by_a_busy_hub(self, whole: dict[str, str], hub: Hub, folder: Path) -> None:
        hub.failures += [503, 429, 500]
        fetch(SMALL, folder)
        assert digest(folder) == whole

    @pytest.mark.parametrize("at", range(8))
    def test_between_the_renames(self, at: int, whole: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, calls = Path.replace, iter(range(100))

        def crash(self: Path, target: Path) -> Path:
            if next(calls) == at:
                raise Interrupted
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", crash)
            with pytest.raises(Interrupted):
                fetch(SMALL, folder)
        fetch(SMALL, folder)
        assert digest(folder) == whole


class TestStates:
    @pytest.fixture
    def state(self, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        with monkeypatch.context() as patch:
            interrupt_after(patch, 5)
            with pytest.raises(Interrupted):
                fetch(SMALL, folder, 1)
        return folder / ".fetch.json"

    def test_of_another_fetch(self, state: Path, folder: Path) -> None:
        before = digest(folder)
        with pytest.raises(UserError, match="belongs to a fetch with other options"):
            fetch(replace(SMALL, holdout=8), folder)
        assert digest(folder) == before

    @pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"documents": 3}', "\x00\x01"])
    def test_that_are_invalid(self, content: str, state: Path, folder: Path) -> None:
        state.write_text(content)
        with pytest.raises(UserError, match=r"is not the state of a fetch; remove .*data to fetch again"):
            fetch(SMALL, folder)

    def test_of_missing_or_changed_text(self, state: Path, folder: Path) -> None:
        part = folder / ".valid.txt.part"
        part.write_bytes(part.read_bytes().swapcase())
        with pytest.raises(UserError, match="does not hold"):
            fetch(SMALL, folder)
        part.unlink()
        with pytest.raises(UserError, match="does not hold"):
            fetch(SMALL, folder)

    def test_resume_with_their_commit(self, state: Path, hub: Hub, folder: Path, tmp_path: Path) -> None:
        repository = hub.repositories[NAME]
        repository.commits["c1"] = {"data/train-0.parquet": parquet_bytes(["another"])}
        repository.branches["main"] = "c1"
        fetch(SMALL, folder)
        repository.branches["main"] = "c0"
        fetch(SMALL, tmp_path / "whole")
        assert digest(folder) == digest(tmp_path / "whole")

    def test_of_a_changed_commit_or_file(self, state: Path, hub: Hub, folder: Path) -> None:
        repository = hub.repositories[NAME]
        files = repository.commits["c0"]
        repository.commits["c0"] = {**files, "data/train-1.parquet": files["data/train-2.parquet"]}
        with pytest.raises(UserError, match=r"data/train-1\.parquet of owner/texts has changed on the hub"):
            fetch(SMALL, folder)
        del repository.commits["c0"]
        with pytest.raises(UserError, match=r"does not have this revision: .*c0"):
            fetch(SMALL, folder)


class TestFinished:
    def test_is_not_fetched_again(self, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fetch(SMALL, folder)
        hub.requests.clear()
        fetch(SMALL, folder)
        assert "already complete" in capsys.readouterr().out
        assert hub.requests == []

    def test_with_other_options_is_rejected(self, hub: Hub, folder: Path) -> None:
        fetch(SMALL, folder)
        with pytest.raises(UserError, match="holds another corpus"):
            fetch(replace(SMALL, config="both"), folder)

    def test_with_a_missing_file_is_rejected(self, hub: Hub, folder: Path) -> None:
        fetch(SMALL, folder)
        (folder / "train" / "00001.txt").unlink()
        with pytest.raises(UserError, match=r"00001\.txt has changed since it was fetched"):
            fetch(SMALL, folder)

    def test_files_without_a_fetch_are_kept(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder.mkdir()
        (folder / "train.txt").write_text("mine")
        with pytest.raises(UserError, match=r"train\.txt exists already"):
            fetch(SMALL, folder)
        # Earlier versions left a complete corpus so.
        (folder / "valid.txt").write_text("mine")
        with pytest.raises(UserError, match=r"train\.txt exists already"):
            fetch(SMALL, folder)
        fetch(replace(SMALL, shard_megabytes=None), folder)
        assert "already complete" in capsys.readouterr().out


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"repo": "o/none"}, "no dataset 'o/none'"),
            ({"repo": "o/a b"}, "is not a valid name of a dataset"),
            ({"config": "none"}, "no config 'none': expected one of both, only"),
            ({"split": "test"}, "no split 'test': expected one of train"),
            ({"valid_split": "dev"}, "no split 'dev': expected one of train"),
            ({"column": "story"}, "no column 'story': choose one of id, text"),
            ({"column": "id"}, "'id' of owner/texts has type int64: expected text"),
            ({"revision": "v9"}, "does not have this revision"),
            ({"files": "*.csv"}, r"match '\*\.csv'"),
            ({"documents": 3}, "documents is 3: it must be at least holdout, 7"),
        ],
    )
    def test_of_missing_names(self, changes: dict[str, Any], message: str, hub: Hub, folder: Path) -> None:
        with pytest.raises(UserError, match=message) as caught:
            fetch(replace(SMALL, **changes), folder)
        assert "\n" not in str(caught.value)
        assert not folder.exists()

    def test_a_gated_dataset(self, hub: Hub, folder: Path) -> None:
        hub.repositories[NAME].gated = True
        with pytest.raises(UserError, match=r"is gated; .*`hf auth login`"):
            fetch(SMALL, folder)

    @pytest.mark.parametrize(("status", "message"), [(429, "rate limit"), (503, "503")])
    def test_a_hub_that_stays_busy(self, status: int, message: str, hub: Hub, folder: Path) -> None:
        hub.failures += [status] * 50
        with pytest.raises(UserError, match=rf"{message}.*the same command resumes"):
            fetch(SMALL, folder)

    def test_no_network_fails_soon(self, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        begin = time.monotonic()
        with pytest.raises(UserError, match="`tilewright corpus stories` generates a corpus offline"):
            fetch(SMALL, folder)
        # Shorter than the backoff of later requests.
        assert time.monotonic() - begin < 20
        assert not folder.exists()

    def test_a_disk_that_is_too_small(self, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(folder.parent)._replace(free=3000)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(
            UserError, match=r"cannot fetch owner/texts .* GB of text to write, 0\.00 GB free; set --max-gigabytes"
        ):
            fetch(SMALL, folder)
        fetch(replace(SMALL, max_gigabytes=2e-6), folder)

    def test_damaged_files(self, hub: Hub, folder: Path) -> None:
        hub.add(
            "o/bad", {"a.parquet": b"PAR1" * 100, "b.jsonl": b'{"text": "x"}\n{"text": 3}\n', "c.jsonl.gz": b"\x1f\x8b" * 9}
        )
        for files, message in {
            "a*": "damaged, or not a Parquet file",
            "b*": r"line 2 of b\.jsonl .* has a int",
            "c*": "damaged",
        }.items():
            with pytest.raises(UserError, match=message):
                fetch(Dataset("o/bad", files=files), folder / files[0])


def test_a_missing_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'tilewright\[hub\]'"):
        fetch(SMALL, folder)


def test_names() -> None:
    assert dataset_of("fineweb-edu-10bt") == DATASETS["fineweb-edu-10bt"]
    assert dataset_of("o/n") == Dataset("o/n")
    with pytest.raises(UserError, match=r"dataset is 'tiny': expected one of tinystories, .*OWNER/NAME"):
        dataset_of("tiny")


@pytest.mark.parametrize("changes", [{"documents": 0}, {"max_gigabytes": float("nan")}, {"shard_megabytes": -1.0}])
def test_invalid_numbers_are_rejected(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="it must be a finite number above 0"):
        replace(SMALL, **changes)
