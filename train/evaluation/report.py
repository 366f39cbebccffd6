"""One evaluation of a model: everything that was asked for, as one report."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ...files import require_absent
from ...tokenizer.text.sources import resolve
from ..pretrained import load_text_model
from .core import read_bundle, score_core
from .multiple_choice import score_questions
from .scoring import Scorer
from .tasks import read_questions
from .texts import score_texts


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate a model on; several at once share one loading of it."""

    text: tuple[Path, ...] = ()
    """Files of text, for perplexity and bits per byte."""
    tasks: tuple[str, ...] = ()
    """Multiple-choice tasks, such as hellaswag,arc_easy,piqa."""
    data: Path | None = None
    """Folder with the items of each task, TASK.jsonl."""
    core: Path | None = None
    """Folder of nanochat's eval_bundle, for the CORE metric."""
    harness: tuple[str, ...] = ()
    """Tasks that lm-eval runs."""
    harness_path: Path | None = None
    """Folder with tasks for lm-eval of one's own, in YAML."""
    num_fewshot: int | None = None
    """Examples before each question of --tasks and --harness; by default none, or what lm-eval's task says."""
    limit: int | None = None
    """Most items of a task; by default all."""
    context_length: int | None = None
    """Most tokens that the model reads at once; by default all that it can."""
    stride: int | None = None
    """Tokens of text that each window scores; by default half of the context. Fewer give each more to see, and take longer."""
    join_documents: bool = False
    """Let windows reach from one document of a text into the next."""
    batch_tokens: int = 1 << 14
    """Tokens that the model reads in one batch, with padding."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; auto is bfloat16 on a GPU that has it."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto."""
    json: bool = False
    """Print JSON in place of tables."""
    out: Path | None = None
    """File for the JSON, beside the tables."""

    def __post_init__(self) -> None:
        if not (self.text or _names(self.tasks) or self.core or _names(self.harness)):
            raise UserError("there is nothing to evaluate: give --text, --tasks with --data, --core or --harness")
        if self.tasks and self.data is None:
            raise UserError("tasks are given without the folder of their items: name it with --data")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}: it must be at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"num_fewshot is {self.num_fewshot}: it must be at least 0")


def require_harness() -> None:
    """Raise a `UserError` where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install 'tilewright[eval]'")


def _names(values: tuple[str, ...]) -> list[str]:
    names = [name for value in values for name in value.split(",") if name]
    return list(dict.fromkeys(names))


def evaluate(folder: Path, config: EvalConfig) -> dict[str, Any]:
    """Return the report on the model in a run's folder or one in Hugging Face's manner: a part for each thing asked for.

    What can be wrong with the data is a `UserError` before the model is loaded.
    """
    if config.out is not None:
        require_absent(config.out)
    if config.text:
        resolve(list(config.text))
    shots = config.num_fewshot or 0
    questions = {}
    for name in _names(config.tasks):
        assert config.data is not None
        questions[name] = read_questions(config.data, name)
        if shots >= len(questions[name]):
            raise UserError(f"num_fewshot is {shots}: {name} has {len(questions[name])} items, and needs more than that")
    bundle = None if config.core is None else read_bundle(config.core, config.limit)
    harness = None
    if config.harness:
        require_harness()
        from .harness import find_tasks, run_tasks  # slow to import

        harness = find_tasks(_names(config.harness), config.harness_path), run_tasks

    scorer = Scorer(load_text_model(folder, config.device), config.dtype, config.batch_tokens, config.context_length)
    report: dict[str, Any] = {
        "model": str(folder),
        "device": str(scorer.device),
        "dtype": str(scorer.dtype).removeprefix("torch."),
        "context_length": scorer.context_length,
    }
    if config.text:
        report["text"] = score_texts(scorer, config.text, config.stride, config.join_documents)
    if questions:
        report["tasks"] = {name: score_questions(scorer, name, each, shots, config.limit) for name, each in questions.items()}
    if bundle is not None:
        report["core"] = score_core(scorer, bundle)
    if harness is not None:
        found, run = harness
        report["harness"] = run(scorer, found, config.num_fewshot, config.limit)
    return report
