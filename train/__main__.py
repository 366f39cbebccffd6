"""Entry point for torchrun: `python -m tilewright.train PRESET [OPTIONS]`, one process for each GPU."""

import sys

from ..errors import UserError
from .command import run_train_command
from .distributed import ignore_sigterm_after_error, report_error

if __name__ == "__main__":
    try:
        with ignore_sigterm_after_error():
            run_train_command(sys.argv[1:], "python -m tilewright.train")
    except (UserError, OSError) as error:
        report_error(str(error))
        sys.exit(2 if isinstance(error, UserError) else 1)
