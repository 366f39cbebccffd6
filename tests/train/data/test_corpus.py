"""Corpora on disk: whole or absent when written, resumable and honest when fetched. No network: the data sets are local."""

import errno
import hashlib
import json
import math
import os
import socket
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import config as datasets_config
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from tilewright.errors import UserError
from tilewright.train.data import corpus
from tilewright.train.data.corpus import END_OF_TEXT, SOURCES, Source, fetch, write_stories
from tilewright.train.data.stories import generate_stories

SEPARATOR = f"\n{END_OF_TEXT}\n"


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class TestWriteStories:
    def test_the_file_is_stories_and_separators(self, tmp_path: Path) -> None:
        path = tmp_path / "new folder" / "stories.txt"
        written = write_stories(path, 0.2, seed=5)
        text = path.read_text(encoding="utf-8")
        assert written == path.stat().st_size
        assert text.endswith(SEPARATOR)
        documents = text.split(SEPARATOR)[:-1]
        assert documents == list(islice(generate_stories(5), len(documents)))

    def test_it_ends_with_the_story_that_reaches_the_size(self, tmp_path: Path) -> None:
        for size in (1, 200_000, 200_001):
            path = tmp_path / f"{size}.txt"
            written = write_stories(path, size / 1e6)
            last = path.read_text(encoding="utf-8").split(SEPARATOR)[-2]
            assert size <= written < size + len((last + SEPARATOR).encode())

    def test_a_larger_corpus_begins_with_the_smaller(self, tmp_path: Path) -> None:
        write_stories(tmp_path / "small", 1)
        write_stories(tmp_path / "large", 2)
        assert (tmp_path / "large").read_bytes().startswith((tmp_path / "small").read_bytes())

    def test_another_seed_shares_no_story(self, tmp_path: Path) -> None:
        write_stories(tmp_path / "train", 1, seed=0)
        write_stories(tmp_path / "valid", 1, seed=1)
        train, valid = ((tmp_path / name).read_text(encoding="utf-8").split(SEPARATOR)[:-1] for name in ("train", "valid"))
        assert set(train).isdisjoint(valid)

    def test_an_error_in_the_middle_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(seed: int) -> Iterator[str]:
            yield from islice(generate_stories(seed), 10)
            raise KeyboardInterrupt

        monkeypatch.setattr(corpus, "generate_stories", broken)
        with pytest.raises(KeyboardInterrupt):
            write_stories(tmp_path / "stories.txt", 1)
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_file_is_refused_and_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "stories.txt"
        path.write_text("mine")
        with pytest.raises(UserError, match="exists already"):
            write_stories(path, 1)
        assert path.read_text() == "mine"

    @pytest.mark.parametrize("megabytes", [0, -1, math.nan, math.inf])
    def test_bad_sizes(self, tmp_path: Path, megabytes: float) -> None:
        with pytest.raises(UserError, match="positive number of megabytes"):
            write_stories(tmp_path / "stories.txt", megabytes)
        assert list(tmp_path.iterdir()) == []

    def test_a_negative_seed(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="-1"):
            write_stories(tmp_path / "stories.txt", 1, seed=-1)

    def test_no_progress_bar_off_a_terminal(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        write_stories(tmp_path / "stories.txt", 0.1)
        assert capfd.readouterr() == ("", "")


@pytest.fixture(autouse=True)
def _on_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    # It would ask the network even about a local file.
    monkeypatch.setattr(datasets_config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    datasets.disable_progress_bars()


def json_lines(path: Path, texts: list[str | None]) -> str:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def local(tmp_path: Path) -> Source:
    """Two splits: 100 documents, and 7."""
    train = json_lines(tmp_path / "a.jsonl", [f"Document {i}.\n\n" + "word " * (i % 17) for i in range(100)])
    valid = json_lines(tmp_path / "b.jsonl", [f"Other {i}." for i in range(7)])
    return Source("json", data_files={"train": train, "validation": valid})


@pytest.fixture
def held_out(local: Source) -> Source:
    """One split of 100 documents, every seventh of which is validation text."""
    return Source("json", valid=None, holdout=7, data_files={"train": (local.data_files or {})["train"]})


class Interrupted(Exception):
    """The power cut of these tests."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, documents: int) -> None:
    real = corpus._documents

    def broken(*arguments: Any) -> Iterator[str]:
        yield from islice(real(*arguments), documents)
        raise Interrupted

    monkeypatch.setattr(corpus, "_documents", broken)


class TestFetch:
    def test_two_splits(self, folder: Path, local: Source) -> None:
        fetch("local", folder, local)
        train, valid = ((folder / f"{name}.txt").read_text() for name in ("train", "valid"))
        assert train.split(SEPARATOR) == [f"Document {i}.\n\n{'word ' * (i % 17)}".strip() for i in range(100)] + [""]
        assert valid.split(SEPARATOR) == [f"Other {i}." for i in range(7)] + [""]
        assert sorted(path.name for path in folder.iterdir()) == ["train.txt", "valid.txt"]

    def test_every_seventh_document_is_held_out(self, folder: Path, held_out: Source) -> None:
        fetch("local", folder, held_out)
        train, valid = ((folder / f"{name}.txt").read_text().split(SEPARATOR)[:-1] for name in ("train", "valid"))
        assert [text.split(".")[0] for text in valid] == [f"Document {i}" for i in range(6, 100, 7)]
        assert [text.split(".")[0] for text in train] == [f"Document {i}" for i in range(100) if i % 7 != 6]

    def test_documents_are_stripped_and_cannot_forge_a_boundary(self, tmp_path: Path, folder: Path) -> None:
        forged = END_OF_TEXT[:5] + END_OF_TEXT + END_OF_TEXT[5:]
        texts = [" one \n", "", "  \n", None, f"t{END_OF_TEXT}wo", END_OF_TEXT, f"thr{forged}ee{END_OF_TEXT}", "Zoë"]
        source = Source("json", valid=None, data_files={"train": json_lines(tmp_path / "a.jsonl", texts)})
        fetch("local", folder, source)
        assert (folder / "train.txt").read_text(encoding="utf-8").split(SEPARATOR) == ["one", "two", "three", "Zoë", ""]

    @pytest.mark.parametrize("documents", [0, 1, 6, 7, 50, 99, 100])
    @pytest.mark.parametrize("kind", ["local", "held_out"])
    def test_an_interrupted_download_ends_with_the_same_bytes(
        self, kind: str, documents: int, tmp_path: Path, folder: Path, request: pytest.FixtureRequest
    ) -> None:
        source = request.getfixturevalue(kind)
        fetch("local", tmp_path / "whole", source)
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, documents)
            with pytest.raises(Interrupted):
                fetch("local", folder, source, save_every=300)
        assert not (folder / "train.txt").exists()
        # What was written after the last save is cut off and fetched again.
        if (part := folder / "train.txt.part").exists():
            with part.open("ab") as file:
                file.write(b"half a docum")
        fetch("local", folder, source, save_every=300)
        assert digest(folder) == digest(tmp_path / "whole")

    def test_a_download_interrupted_again_and_again(self, tmp_path: Path, folder: Path, held_out: Source) -> None:
        fetch("local", tmp_path / "whole", held_out)
        for _ in range(40):
            with pytest.MonkeyPatch.context() as patch:
                interrupt_after(patch, 9)
                with pytest.raises(Interrupted):
                    fetch("local", folder, held_out, save_every=200)
            if json.loads((folder / "train.txt.state").read_text())["documents"] > 90:
                break
        fetch("local", folder, held_out)
        assert digest(folder) == digest(tmp_path / "whole")

    def test_a_resumed_download_does_not_begin_again(
        self, folder: Path, local: Source, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 60)
            with pytest.raises(Interrupted):
                fetch("local", folder, local, save_every=1)
        seen: list[str] = []
        real = corpus._documents

        def counted(*arguments: Any) -> Iterator[str]:
            for text in real(*arguments):
                seen.append(text)
                yield text

        monkeypatch.setattr(corpus, "_documents", counted)
        fetch("local", folder, local)
        # The power was cut after the sixtieth was asked for, when 60 had been written and saved.
        assert len(seen) == 40 + 7

    @pytest.mark.parametrize("renamed", [0, 1, 2])
    def test_a_crash_between_the_renames(self, renamed: int, tmp_path: Path, folder: Path, held_out: Source) -> None:
        fetch("local", tmp_path / "whole", held_out)
        replace = Path.replace
        calls = iter(range(10))

        def crash(self: Path, target: Path) -> Path:
            if self.suffix == ".part" and next(calls) == renamed:
                raise Interrupted
            return replace(self, target)

        def crash_at_the_end(self: Path, missing_ok: bool = False) -> None:
            if self.suffix == ".state":
                raise Interrupted
            os.unlink(self) if self.exists() else None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", crash)
            patch.setattr(Path, "unlink", crash_at_the_end)
            with pytest.raises(Interrupted):
                fetch("local", folder, held_out)
        assert (folder / "train.txt.state").exists()
        fetch("local", folder, held_out)
        assert digest(folder) == digest(tmp_path / "whole")

    def test_finished_files_are_not_fetched_again(
        self, folder: Path, local: Source, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetch("local", folder, local)
        before = digest(folder)
        capsys.readouterr()
        monkeypatch.setattr(corpus, "_open", None)
        fetch("local", folder, local)
        assert digest(folder) == before
        assert capsys.readouterr().out.count("not fetched again") == 2

    def test_only_the_missing_split_is_fetched(self, folder: Path, local: Source) -> None:
        fetch("local", folder, local)
        before = digest(folder)
        (folder / "valid.txt").unlink()
        fetch("local", folder, local)
        assert digest(folder) == before

    def test_half_of_a_held_out_pair_is_not_overwritten(self, folder: Path, held_out: Source) -> None:
        fetch("local", folder, held_out)
        (folder / "valid.txt").unlink()
        with pytest.raises(UserError, match=r"train\.txt exists already: remove it"):
            fetch("local", folder, held_out)

    def test_a_part_without_a_state_is_begun_again(self, folder: Path, local: Source) -> None:
        folder.mkdir()
        (folder / "train.txt.part").write_text("left by a crash before the first save")
        fetch("local", folder, local)
        assert (folder / "train.txt").read_text().startswith("Document 0.")


class TestStates:
    @pytest.fixture
    def state(self, folder: Path, local: Source) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 50)
            with pytest.raises(Interrupted):
                fetch("local", folder, local, save_every=300)
        return folder / "train.txt.state"

    def test_of_another_source(self, state: Path, folder: Path, held_out: Source) -> None:
        before = digest(folder)
        with pytest.raises(UserError, match="another download") as error:
            fetch("other", folder, held_out)
        assert f"delete {state} and {folder / 'train.txt.part'}" in str(error.value)
        assert digest(folder) == before

    def test_of_another_version_of_datasets(self, state: Path, folder: Path, local: Source) -> None:
        content = json.loads(state.read_text())
        content["origin"]["datasets"] = "1.0"
        state.write_text(json.dumps(content))
        with pytest.raises(UserError, match="another version of datasets"):
            fetch("local", folder, local)

    @pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"documents": 3}', "\x00\x01"])
    def test_that_are_none(self, content: str, state: Path, folder: Path, local: Source) -> None:
        state.write_text(content)
        with pytest.raises(UserError, match=r"is not the state of a download: delete .*state and .*part to start again"):
            fetch("local", folder, local)

    def test_without_the_text(self, state: Path, folder: Path, local: Source) -> None:
        part = folder / "train.txt.part"
        os.truncate(part, 10)
        with pytest.raises(UserError, match=r"is shorter than .* says: delete"):
            fetch("local", folder, local)
        part.unlink()
        with pytest.raises(UserError, match=r"is shorter than .* says: delete"):
            fetch("local", folder, local)

    def test_never_promise_more_than_is_on_disk(self, state: Path, folder: Path) -> None:
        saved = json.loads(state.read_text())
        text = (folder / "train.txt.part").read_bytes()[: saved["sizes"][0]]
        assert text.endswith(SEPARATOR.encode())
        assert text.count(SEPARATOR.encode()) == saved["documents"] <= 50


def hub_errors() -> list[Exception]:
    """What `datasets` and `huggingface_hub` were seen to raise without a network, or with one that breaks."""
    return [
        ConnectionError("Couldn't reach 'roneneldan/TinyStories' on the Hub (LocalEntryNotFoundError)"),
        ConnectionError("Server Disconnected"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError("The read operation timed out"),
        socket.gaierror(-2, "Name or service not known"),
        LocalEntryNotFoundError("An error happened while trying to locate the file"),
        OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled"),
        httpx.ConnectError("[Errno -2] Name or service not known"),
        httpx.ReadTimeout("timed out"),
        httpx.RemoteProtocolError("peer closed connection without sending complete message body"),
        DatasetNotFoundError("Dataset doesn't exist on the Hub or cannot be accessed."),
    ]


class TestWithoutNetwork:
    @pytest.fixture(autouse=True)
    def _reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Session:
            def head(self, url: str, timeout: float) -> None: ...

        monkeypatch.setattr("huggingface_hub.get_session", Session)

    @pytest.mark.parametrize("error", hub_errors(), ids=lambda error: type(error).__name__)
    def test_the_message(self, error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*arguments: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(UserError) as caught:
            fetch("tinystories", folder)
        message = str(caught.value)
        assert "'tinystories' (roneneldan/TinyStories)" in message
        assert "the same command resumes" in message
        assert "`tilewright corpus stories`" in message
        assert "\n" not in message
        assert caught.value.__cause__ is error
        assert not folder.exists()

    def test_the_first_question_is_short(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Session:
            def head(self, url: str, timeout: float) -> None:
                assert timeout <= 10
                raise hub_errors()[7]

        monkeypatch.setattr("huggingface_hub.get_session", Session)
        monkeypatch.setattr(datasets, "load_dataset", None)
        with pytest.raises(UserError, match="Name or service not known"):
            fetch("openwebtext", folder)

    @pytest.mark.parametrize("error", hub_errors(), ids=lambda error: type(error).__name__)
    def test_a_connection_that_breaks_in_the_middle(
        self, error: Exception, tmp_path: Path, folder: Path, local: Source, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetch("local", tmp_path / "whole", local)
        real = datasets.load_dataset

        class Broken:
            def __init__(self, dataset: Any) -> None:
                self.dataset = dataset
                self.state_dict = dataset.state_dict

            def __iter__(self) -> Iterator[Any]:
                yield from islice(self.dataset, 50)
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(datasets, "load_dataset", lambda *a, **k: Broken(real(*a, **k)))
            with pytest.raises(UserError, match="what was fetched so far is kept"):
                fetch("local", folder, local, save_every=300)
        assert json.loads((folder / "train.txt.state").read_text())["documents"] > 30
        fetch("local", folder, local)
        assert digest(folder) == digest(tmp_path / "whole")

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EDQUOT])
    def test_a_full_disk_is_not_the_network(
        self, number: int, folder: Path, local: Source, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failure = OSError(number, os.strerror(number))

        def full(*arguments: Any, **options: Any) -> None:
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=os.strerror(number)):
                fetch("local", folder, local)
        # Nor is one that `datasets` itself meets.
        monkeypatch.setattr(datasets, "load_dataset", full)
        with pytest.raises(OSError, match=os.strerror(number)):
            fetch("local", folder, local)


def test_a_missing_package(folder: Path, local: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'tilewright\[hub\]'"):
        fetch("local", folder, local)


def test_an_unknown_name(folder: Path) -> None:
    with pytest.raises(UserError, match="'tiny': the known ones are tinystories, openwebtext"):
        fetch("tiny", folder)


def test_a_missing_column(folder: Path, local: Source) -> None:
    source = Source("json", text_column="story", data_files=local.data_files)
    with pytest.raises(UserError, match="no column 'story', only id, text"):
        fetch("local", folder, source)


def test_the_known_sources() -> None:
    assert SOURCES["tinystories"].valid == "validation"
    assert SOURCES["openwebtext"].valid is None
    assert SOURCES["openwebtext"].holdout == 2000
