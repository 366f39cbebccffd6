"""Log of the texts generated during training: JSON lines in `samples.jsonl`."""

import json
from pathlib import Path

from ..files import atomic_file, named_errors, sync

FILE_NAME = "samples.jsonl"


class SampleLog:
    """Appends texts to a run's `samples.jsonl` and flushes each to disk."""

    def __init__(self, run: Path, resume_step: int = 0) -> None:
        """Drop the texts after `resume_step`, which a resumed run writes again, and a truncated last line."""
        self._path = run / FILE_NAME
        written = self._path.read_bytes() if self._path.exists() else b""
        kept = b"".join(line + b"\n" for line in written.split(b"\n")[:-1] if not _is_later(line, resume_step))
        if kept != written:
            with atomic_file(self._path) as file:
                file.write(kept)

    def write(self, step: int, prompt: str, text: str) -> None:
        """Write the continuation of a prompt by the model after `step` steps."""
        with named_errors(self._path):
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
            sync(self._path)


def _is_later(line: bytes, step: int) -> bool:
    # Damaged lines are kept.
    try:
        return json.loads(line)["step"] > step
    except (ValueError, TypeError, LookupError, RecursionError):
        return False
