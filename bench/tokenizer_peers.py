"""Run one job of one tokenizer library in its own process: `python -P tokenizer_peers.py JOB LIBRARY ARGUMENTS`.

Separate processes keep memory, caches and threads of the libraries apart, and a hang cannot block the bench. The script prints
a line of JSON. It runs as a file, because importing it as a module would load torch into the measured process.

    train TEXT VOCAB_SIZE     train a vocabulary: seconds, and a digest of the merges
    encode FOLDER TEXT FORM   encode a text with the tokenizer in the folder: seconds of a first and a second pass, a digest
    decode FOLDER IDS         decode the ids in an .npy file: seconds of a first and a second pass, a digest
"""

import base64
import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

Merges = list[tuple[bytes, bytes]]


class Library:
    """Interface of a library; methods that a subclass does not override are unsupported and skipped."""

    takes_lists = True
    tokenizer: Any

    def warm_up(self) -> None:
        """Load code that a short text does not load."""

    def train(self, path: Path, vocab_size: int) -> Callable[[], Merges]:
        """Train a vocabulary of this size, with one special token; return a function that returns the merges."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Read the tokenizer in the folder."""
        raise NotImplementedError

    def to_list(self, text: str) -> list[int]:
        """Return the ids of a document as a list."""
        raise NotImplementedError

    def to_array(self, text: str) -> np.ndarray:
        """Return the ids of a document as an array."""
        raise NotImplementedError

    def of_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of documents in one call, on all cores."""
        raise NotImplementedError

    def of_file(self, path: Path) -> list[np.ndarray]:
        """Return the ids of all documents of a file, on all cores, with or without special tokens."""
        raise NotImplementedError

    def decode(self, ids: Any) -> str | bytes:
        """Return the text of the ids, which are a list if `takes_lists`, else an array."""
        raise NotImplementedError


def _documents(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").split(END_OF_TEXT)


class Tilewright(Library):
    """This library with its own rule for ties."""

    ties = "cs336"
    takes_lists = False

    def warm_up(self) -> None:
        # The warm-up texts are too short to load machine code.
        import_module("tilewright.tokenizer")
        jit = import_module("tilewright.tokenizer.compiled.jit")
        jit.load(jit.ALL)

    def train(self, path: Path, vocab_size: int) -> Callable[[], Merges]:
        _, merges = import_module("tilewright.tokenizer").train_bpe(path, vocab_size, [END_OF_TEXT], ties=self.ties)
        return lambda: merges

    def load(self, folder: Path) -> None:
        self.tokenizer = import_module("tilewright.tokenizer").Tokenizer.load(folder / "tokenizer.json")
        self.tokenizer.expect(1 << 40)

    def to_list(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def to_array(self, text: str) -> np.ndarray:
        return self.tokenizer.encode_array(text)

    def of_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.tokenizer.encode_batch(texts).ids]

    def of_file(self, path: Path) -> list[np.ndarray]:
        return list(import_module("tilewright.tokenizer").iter_encoded(path, self.tokenizer))

    def decode(self, ids: Any) -> str | bytes:
        return self.tokenizer.decode(ids)


class TilewrightTiesAsHuggingFace(Tilewright):
    """This library with the rule for ties of tokenizers and gigatoken."""

    ties = "huggingface"


class Gigatoken(Library):
    """gigatoken."""

    takes_lists = False

    def train(self, path: Path, vocab_size: int) -> Callable[[], Merges]:
        gigatoken = import_module("gigatoken")
        source = gigatoken.TextFileSource([str(path)], separator=END_OF_TEXT)
        _, merges = gigatoken.train_bpe(source, vocab_size, [END_OF_TEXT])
        return lambda: merges

    def load(self, folder: Path) -> None:
        self.tokenizer = import_module("gigatoken").Tokenizer.from_json((folder / "huggingface.json").read_text())

    def to_list(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def to_array(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(text)

    def of_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(import_module("awkward").flatten(self.tokenizer.encode_batch(texts)))]

    def of_file(self, path: Path) -> list[np.ndarray]:
        gigatoken = import_module("gigatoken")
        ids = self.tokenizer.encode_files(gigatoken.TextFileSource([str(path)], separator=END_OF_TEXT))
        return [np.asarray(import_module("awkward").flatten(ids))]

    def decode(self, ids: Any) -> str | bytes:
        return self.tokenizer.decode(ids)


class Rustbpe(Library):
    """rustbpe; its encoder is not measured, because it is only an example."""

    def train(self, path: Path, vocab_size: int) -> Callable[[], Merges]:
        tokenizer = import_module("rustbpe").Tokenizer()
        tokenizer.train_from_iterator(iter(_documents(path)), vocab_size - 1, pattern=GPT2_PATTERN)

        def merges() -> Merges:
            recover_merges = import_module("tilewright.tokenizer.formats.ranks").recover_merges
            found, _ = recover_merges({bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()})
            return found

        return merges


class HuggingFace(Library):
    """Hugging Face's tokenizers."""

    def train(self, path: Path, vocab_size: int) -> Callable[[], Merges]:
        tokenizers = import_module("tokenizers")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=byte_level.alphabet(), show_progress=False
        )
        # From files, tokenizers would treat every line as a text and miss merges across newlines.
        tokenizer.train_from_iterator(_documents(path), trainer)

        def merges() -> Merges:
            from_printable = import_module("tilewright.tokenizer.formats").from_printable
            found = json.loads(tokenizer.to_str())["model"]["merges"]
            return [(from_printable(left), from_printable(right)) for left, right in found]

        return merges

    def load(self, folder: Path) -> None:
        self.tokenizer = import_module("tokenizers").Tokenizer.from_file(str(folder / "huggingface.json"))

    def to_list(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def of_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, np.uint32) for encoding in self.tokenizer.encode_batch(texts)]

    def of_file(self, path: Path) -> list[np.ndarray]:
        return self.of_batch(_documents(path))

    def decode(self, ids: Any) -> str | bytes:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class Tiktoken(Library):
    """tiktoken."""

    def load(self, folder: Path) -> None:
        # tiktoken's own reader caches a copy of every file.
        lines = map(bytes.split, (folder / "ranks.tiktoken").read_bytes().splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        specials = {END_OF_TEXT: special_id(folder)}
        self.tokenizer = import_module("tiktoken").Encoding(
            "bench", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )

    def to_list(self, text: str) -> list[int]:
        return self.tokenizer.encode_ordinary(text)

    def to_array(self, text: str) -> np.ndarray:
        return self.tokenizer.encode_to_numpy(text)

    def of_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in self.tokenizer.encode_ordinary_batch(texts)]

    def of_file(self, path: Path) -> list[np.ndarray]:
        return self.of_batch(_documents(path))

    def decode(self, ids: Any) -> str | bytes:
        return self.tokenizer.decode(ids)


class Fastokens(Library):
    """fastokens."""

    def load(self, folder: Path) -> None:
        self.tokenizer = import_module("fastokens").Tokenizer.from_file(str(folder / "huggingface.json"))

    def to_list(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def to_array(self, text: str) -> np.ndarray:
        return np.frombuffer(self.tokenizer.encode_batch_flat([text])[0], np.uint32)

    def of_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(self.tokenizer.encode_batch_flat(texts)[0], np.uint32)]

    def of_file(self, path: Path) -> list[np.ndarray]:
        return self.of_batch(_documents(path))

    def decode(self, ids: Any) -> str | bytes:
        return self.tokenizer.decode(ids)


class Splintr(Library):
    """splintr."""

    def load(self, folder: Path) -> None:
        specials = {END_OF_TEXT: special_id(folder)}
        self.tokenizer = import_module("splintr").Tokenizer(str(folder / "ranks.tiktoken"), GPT2_PATTERN, specials)

    def to_list(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def to_array(self, text: str) -> np.ndarray:
        return np.frombuffer(self.tokenizer.encode_flat(text), np.uint32)

    def of_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(self.tokenizer.encode_batch_flat(texts)[0], np.uint32)]

    def of_file(self, path: Path) -> list[np.ndarray]:
        return self.of_batch(_documents(path))

    def decode(self, ids: Any) -> str | bytes:
        return self.tokenizer.decode_bytes(ids)


# Class, distribution and module of each library.
LIBRARIES: dict[str, tuple[type[Library], str, str]] = {
    "tilewright": (Tilewright, "tilewright", "tilewright"),
    "tilewright, ties as tokenizers": (TilewrightTiesAsHuggingFace, "tilewright", "tilewright"),
    "gigatoken": (Gigatoken, "gigatoken", "gigatoken"),
    "rustbpe": (Rustbpe, "rustbpe", "rustbpe"),
    "tokenizers": (HuggingFace, "tokenizers", "tokenizers"),
    "tiktoken": (Tiktoken, "tiktoken", "tiktoken"),
    "fastokens": (Fastokens, "fastokens", "fastokens"),
    "splintr": (Splintr, "splintr-rs", "splintr"),
}
# Every library processes this text once before it is timed, because some load tables or machine code on first use.
_WARM_UP = "Warming up, warming up: once and for all."
# Characters of a short document.
_SHORT = 60


def can(name: str, method: str) -> bool:
    """Return whether the library has this method of `Library`."""
    return getattr(LIBRARIES[name][0], method) is not getattr(Library, method)


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _peak_mb() -> float:
    """Return the peak memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage on Linux also counts memory from before exec.
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def special_id(folder: Path) -> int:
    """Return the id of the special token of the tokenizer in the folder."""
    return json.loads((folder / "tokenizer.json").read_bytes())["special_tokens"][END_OF_TEXT]


def _train(library: Library, text: str, vocab_size: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.txt"
        small.write_text(_WARM_UP)
        library.warm_up()
        library.train(small, 260)
    seconds, read = _timed(lambda: library.train(Path(text), int(vocab_size)))
    peak, merges = _peak_mb(), read()
    digest = _digest(left + b" " + right + b"\n" for left, right in merges)
    return {"seconds": seconds, "peak_mb": peak, "merges": len(merges), "digest": digest}


def _encode(library: Library, folder: str, text: str, form: str) -> dict[str, Any]:
    library.warm_up()
    library.load(Path(folder))
    if form == "file":
        small = Path(folder) / "small.txt"
        small.write_text(_WARM_UP)
        library.of_file(small)
        run: Callable[[], Any] = lambda: library.of_file(Path(text))  # noqa: E731
    elif form == "batch":
        documents = _documents(Path(text))
        library.of_batch([_WARM_UP])
        run = lambda: library.of_batch(documents)  # noqa: E731
    else:
        documents = _documents(Path(text))
        if form == "short":
            documents = [document[k : k + _SHORT] for document in documents for k in range(0, len(document), _SHORT)]
        encode = library.to_array if form == "array" else library.to_list
        encode(_WARM_UP)
        run = lambda: [encode(document) for document in documents]  # noqa: E731
    first, parts = _timed(run)
    peak = _peak_mb()
    second, _ = _timed(run)
    ids = np.concatenate([np.asarray(part, np.uint32) for part in parts])
    # Some libraries emit special tokens and some drop them.
    ids = ids[ids != special_id(Path(folder))]
    return {"seconds": first, "second": second, "peak_mb": peak, "tokens": len(ids), "digest": _digest([ids.tobytes()])}


def _decode(library: Library, folder: str, ids: str) -> dict[str, Any]:
    library.warm_up()
    library.load(Path(folder))
    array = np.load(ids)
    given = array.tolist() if library.takes_lists else array
    library.decode(given[:3])
    first, text = _timed(lambda: library.decode(given))
    peak = _peak_mb()
    second, _ = _timed(lambda: library.decode(given))
    data = text.encode() if isinstance(text, str) else text
    return {"seconds": first, "second": second, "peak_mb": peak, "digest": _digest([data])}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"train": _train, "encode": _encode, "decode": _decode}

if __name__ == "__main__":
    job, name, *arguments = sys.argv[1:]
    print("\n" + json.dumps(JOBS[job](LIBRARIES[name][0](), *arguments)))
