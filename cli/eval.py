"""The evaluation of a trained model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from .options import Positional, parse


def evaluate(arguments: Sequence[str]) -> None:
    """Measure a model: bits per byte of texts, multiple choice, CORE, lm-eval; see `tilewright eval --help`."""
    import json

    from ..files import write_text
    from ..train.evaluation import EvalConfig
    from ..train.evaluation import evaluate as make_report
    from ..train.evaluation.tables import print_report

    def command(folder: Positional[Path], config: Annotated[EvalConfig, tyro.conf.arg(name="")]) -> None:
        """Measure a model: bits per byte of texts, multiple choice, CORE, lm-eval.

        Args:
            folder: Folder of a run, or of a model in Hugging Face's manner.
            config: What to measure.
        """
        report = make_report(folder, config)
        text = json.dumps(report, indent=2)
        print(text) if config.json else print_report(report)
        if config.out is not None:
            write_text(config.out, text + "\n")

    parse(command, "eval", arguments)
