"""Run all requested evaluations of a model, and collect the results in one report."""

import importlib.util
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import require_absent
from ...tokenizer.text.sources import resolve
from ..pretrained import load_text_model
from .core import read_bundle, score_core
from .multiple_choice import score_questions
from .options import EvalConfig, names_of
from .scoring import Scorer
from .tasks import read_questions
from .texts import score_texts


def require_harness() -> None:
    """Raise a `UserError` if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install 'tilewright[eval]'")


def evaluate(folder: Path, config: EvalConfig) -> dict[str, Any]:
    """Evaluate the model in a run's folder or a Hugging Face folder; return a report with one entry for each evaluation.

    Raise a `UserError` for invalid data before loading the model.
    """
    if config.out is not None:
        require_absent(config.out)
    if config.text:
        resolve(list(config.text))
    shots = config.num_fewshot or 0
    questions = {}
    for name in names_of(config.tasks):
        assert config.data is not None
        questions[name] = read_questions(config.data, name)
        if shots >= len(questions[name]):
            raise UserError(f"num_fewshot is {shots}: expected less than {len(questions[name])}, the number of items of {name}")
    bundle = None if config.core is None else read_bundle(config.core, config.limit)
    harness = None
    if config.harness:
        require_harness()
        from .harness import find_tasks, run_tasks  # slow to import

        harness = find_tasks(names_of(config.harness), config.harness_path), run_tasks

    scorer = Scorer(
        load_text_model(folder, config.device, config.tokenizer), config.dtype, config.batch_tokens, config.context_length
    )
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
