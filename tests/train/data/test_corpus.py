"""The corpus of stories: contents, atomic writes and errors."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tilewright.errors import UserError
from tilewright.tokenizer import END_OF_TEXT
from tilewright.train.data import corpus
from tilewright.train.data.corpus import write_stories
from tilewright.train.data.stories import generate_stories

SEPARATOR = f"\n{END_OF_TEXT}\n"


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

    def test_an_existing_file_is_rejected_and_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "stories.txt"
        path.write_text("mine")
        with pytest.raises(UserError, match="exists already"):
            write_stories(path, 1)
        assert path.read_text() == "mine"

    @pytest.mark.parametrize("megabytes", [0, -1, math.nan, math.inf])
    def test_bad_sizes(self, tmp_path: Path, megabytes: float) -> None:
        with pytest.raises(UserError, match="the size of the corpus is"):
            write_stories(tmp_path / "stories.txt", megabytes)
        assert list(tmp_path.iterdir()) == []

    def test_a_negative_seed(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="-1"):
            write_stories(tmp_path / "stories.txt", 1, seed=-1)

    def test_no_progress_bar_off_a_terminal(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        write_stories(tmp_path / "stories.txt", 0.1)
        assert capfd.readouterr() == ("", "")
