"""`python -m tilewright.train PRESET [OPTIONS]`: what torchrun starts on each GPU."""

import sys

from ..errors import UserError
from .command import run_train_command
from .distributed import report_error, says_why_it_ends

if __name__ == "__main__":
    try:
        with says_why_it_ends():
            run_train_command(sys.argv[1:], "python -m tilewright.train")
    except (UserError, OSError) as error:
        report_error(str(error))
        sys.exit(2 if isinstance(error, UserError) else 1)
