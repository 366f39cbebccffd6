"""The command `eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from .options import Positional, parse


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluate a model: bits per byte of texts, multiple choice, CORE, lm-eval tasks."""
    from ..train.evaluation import EvalConfig

    def command(folder: Positional[Path], config: Annotated[EvalConfig, tyro.conf.arg(name="")]) -> None:
        """Evaluate a model: bits per byte of texts, multiple choice, CORE, lm-eval tasks.

        Args:
            folder: Folder of a run, or a Hugging Face model folder.
            config: What to evaluate.
        """
        import json

        from ..files import write_text
        from ..train.evaluation import evaluate as make_report
        from ..train.evaluation.tables import print_report

        report = make_report(folder, config)
        text = json.dumps(report, indent=2)
        print(text) if config.json else print_report(report)
        if config.out is not None:
            write_text(config.out, text + "\n")

    parse(command, "eval", arguments)
