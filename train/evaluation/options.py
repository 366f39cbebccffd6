"""Options of an evaluation. This module imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import UserError


@dataclass(frozen=True)
class EvalConfig:
    """Options of an evaluation. All evaluations of one command share one loaded model."""

    text: tuple[Path, ...] = ()
    """Text files, for perplexity and bits per byte."""
    tasks: tuple[str, ...] = ()
    """Multiple-choice tasks, such as hellaswag,arc_easy,piqa."""
    data: Path | None = None
    """Folder with the items of each task in TASK.jsonl."""
    core: Path | None = None
    """Folder of nanochat's eval_bundle, for the CORE metric."""
    harness: tuple[str, ...] = ()
    """Tasks to run with lm-eval."""
    harness_path: Path | None = None
    """Folder with additional lm-eval tasks in YAML."""
    num_fewshot: int | None = None
    """Number of examples before each question of --tasks and --harness; by default none, or the default of the lm-eval task."""
    limit: int | None = None
    """Maximum number of items per task; by default all."""
    context_length: int | None = None
    """Maximum number of tokens in a forward pass; by default the model's context length."""
    stride: int | None = None
    """Tokens scored per window; default: half of the context. Smaller values give each token more context but take longer."""
    join_documents: bool = False
    """Let windows span several documents of a text."""
    batch_tokens: int = 1 << 14
    """Maximum number of tokens in a batch, including padding."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the matrix products; auto is bfloat16 on GPUs that support it, else float32."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto."""
    tokenizer: Path | None = None
    """File of the tokenizer; default: tokenizer.json in the model's folder."""
    json: bool = False
    """Print JSON instead of tables."""
    out: Path | None = None
    """File to which the results are also written as JSON."""

    def __post_init__(self) -> None:
        if not (self.text or names_of(self.tasks) or self.core or names_of(self.harness)):
            raise UserError("nothing to evaluate: expected --text, --tasks with --data, --core or --harness")
        if self.tasks and self.data is None:
            raise UserError("tasks is set without data: pass the folder with their items as --data")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}: expected at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"num_fewshot is {self.num_fewshot}: expected at least 0")


def names_of(values: tuple[str, ...]) -> list[str]:
    """Return the distinct names in values such as ("hellaswag,piqa", "arc_easy")."""
    names = [name for value in values for name in value.split(",") if name]
    return list(dict.fromkeys(names))
