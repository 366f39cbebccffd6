"""Where the command begins, and what becomes of errors.

The table of commands is imported late, as it needs tyro: an installation without its packages still has its doctor.
"""

import codecs
import io
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError

from .. import __version__
from ..errors import UserError
from .doctor import doctor
from .doctor_checks import requirements


def _is_needed(package: str | None) -> bool:
    try:
        return package in requirements()
    except PackageNotFoundError:
        # Tilewright itself is not installed, so that nothing says what it needs.
        return package is not None and package.partition(".")[0] != "tilewright"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 2 for a value that cannot be used, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--version"]:
        print(f"tilewright {__version__}")
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper) and codecs.lookup(sys.stdout.encoding).name != "utf-8":
        # Tokens are of all languages, this terminal or file is not: what it cannot show is escaped. It asks where it stands,
        # which some pipes do not know.
        with suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"tilewright: warning: {message}\n"
    try:
        if arguments[:1] == ["doctor"]:
            doctor(arguments[1:])
            return 0
        from .command_line import run, usage

        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
        else:
            run(arguments)
    except UserError as error:
        print(f"tilewright: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not _is_needed(error.name):
            raise
        print(f"tilewright: error: {error.name} is missing: `tilewright doctor` says how to get what is", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted; closing stderr keeps Python from complaining as it exits.
        sys.stderr.close()
        return 0
    except OSError as error:
        print(f"tilewright: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tilewright: interrupted", file=sys.stderr)
        return 130
    return 0
