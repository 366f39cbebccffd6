"""A Hugging Face hub on localhost: the routes that list a dataset's files and serve their content."""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pytest
from web_server import Site, serving


def parquet_bytes(texts: Sequence[str | None], row_group_size: int = 10, **columns: Sequence[Any]) -> bytes:
    """Return a Parquet file with the column `text` and other columns."""
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    others = {name: pyarrow.array(values) for name, values in columns.items()}
    parquet.write_table(
        pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string()), **others}),
        out,
        row_group_size=row_group_size,
    )
    return out.getvalue()


@dataclass
class Repository:
    """Files by commit, and the commit of each branch."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    card: dict[str, Any] = field(default_factory=dict)
    gated: bool = False


class Hub(Site):
    """Datasets by OWNER/NAME. `failures` lists the status codes of the next content requests, which get no content."""

    def __init__(self) -> None:
        super().__init__()
        self.repositories: dict[str, Repository] = {}
        self.failures: list[int] = []

    def add(self, name: str, files: dict[str, bytes], card: dict[str, Any] | None = None, **branches: dict[str, bytes]) -> None:
        """Add a dataset with the files of its main branch and of its conversion branches (refs/convert/NAME)."""
        commits = {"c0": files, **{f"c-{branch}": content for branch, content in branches.items()}}
        known = {"main": "c0", **{f"refs/convert/{branch}": f"c-{branch}" for branch in branches}}
        self.repositories[name] = Repository(commits, known, card or {})

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = unquote(path.partition("?")[0])
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            name, route, rest = match.groups()
            return self._api(name, route, rest or "main")
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._content(*match.groups())
        return 404, {}, b"{}"

    def is_cut(self, path: str, size: int) -> bool:
        return "/resolve/" in path and super().is_cut(path, size)

    def _api(self, name: str, route: str | None, rest: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.repositories.get(name)
        if repository is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if route == "tree":
            revision, _, folder = rest.partition("/")
        else:
            revision, folder = rest, ""
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"no revision {revision}"}, b"{}"
        if route != "tree":
            return 200, {}, json.dumps({"id": name, "sha": commit, "cardData": repository.card}).encode()
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in repository.commits[commit].items()
            if not folder or path.startswith(f"{folder}/")
        ]
        if folder and not entries:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        return 200, {}, json.dumps(entries).encode()

    def _content(self, name: str, commit: str, path: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.repositories[name]
        if repository.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if self.failures:
            return self.failures.pop(0), {}, b"{}"
        return 200, {}, repository.commits[commit][path]


@contextmanager
def serving_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub to `huggingface_hub`, without delays between its retries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with serving(Hub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        yield hub
