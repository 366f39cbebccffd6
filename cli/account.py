"""The command `account`."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from .options import Positional, parse


def account(arguments: Sequence[str]) -> None:
    """Count a model's parameters, FLOPs, memory, time and cost."""
    from ..model.accounting_options import AccountConfig, model_of

    def command(
        preset: Positional[str],
        config: Annotated[AccountConfig, tyro.conf.arg(name="")] = AccountConfig(),  # noqa: B008
    ) -> None:
        """Count a model's parameters, FLOPs, memory, time and cost.

        Args:
            preset: Name of a model, such as gpt2-xl, or a Hugging Face model folder.
            config: Options of the accounting.
        """
        shape = model_of(preset, config)

        import json

        from ..model.accounting.plot import plot_account
        from ..model.accounting.report import account as make_report
        from ..model.accounting.tables import print_report

        report = make_report(preset, config)
        if config.plot is not None:
            plot_account(preset, shape, report["batch_size"], report["context_length"], config.policy, config.plot)
        print(json.dumps(report, indent=2)) if config.json else print_report(report)

    parse(command, "account", arguments)
