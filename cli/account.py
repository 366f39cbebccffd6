"""The accounting of a model."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from .options import Positional, parse


def account(arguments: Sequence[str]) -> None:
    """Count a model's parameters, FLOPs, memory, time and money; see `tilewright account --help`."""
    import json

    from ..model.accounting.plot import plot_account
    from ..model.accounting.report import AccountConfig, model_of
    from ..model.accounting.report import account as make_report
    from ..model.accounting.tables import print_report

    def command(
        preset: Positional[str],
        config: Annotated[AccountConfig, tyro.conf.arg(name="")] = AccountConfig(),  # noqa: B008
    ) -> None:
        """Count a model's parameters, FLOPs, memory, time and money.

        Args:
            preset: A model by name, such as gpt2-xl, or a folder of Hugging Face's.
            config: What to account for.
        """
        report = make_report(preset, config)
        if config.plot is not None:
            shape = model_of(preset, config)
            plot_account(preset, shape, report["batch_size"], report["context_length"], config.policy, config.plot)
        print(json.dumps(report, indent=2)) if config.json else print_report(report)

    parse(command, "account", arguments)
