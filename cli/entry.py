"""Entry point of the command line: runs a command and turns errors into one line and an exit status.

The table of commands needs tyro and is imported late, so that `tilewright doctor` runs in every installation.
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
from .package_metadata import extra_of, requirements


def _remedy(package: str, command: str) -> str | None:
    """Return how to install a missing package, or None if Tilewright does not need it."""
    try:
        if package in requirements():
            return "`tilewright doctor` shows how to install it"
        extra = extra_of(package, command)
    except PackageNotFoundError:
        # Tilewright itself is not installed, so its requirements are unknown.
        return None if package.partition(".")[0] == "tilewright" else "`tilewright doctor` shows how to install it"
    return None if extra is None else f"pip install 'tilewright[{extra}]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 2 for a wrong argument or input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] in (["--version"], ["version"]):
        print(f"tilewright {__version__}")
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper) and codecs.lookup(sys.stdout.encoding).name != "utf-8":
        # Escape characters that the terminal's or file's encoding lacks. `reconfigure` asks for the position in the stream,
        # which fails on some pipes.
        with suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"tilewright: warning: {message}\n"
    try:
        if arguments[:1] == ["doctor"]:
            doctor(arguments[1:])
            return 0
        from .command_line import run, usage

        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(usage())
        else:
            run(arguments)
    except UserError as error:
        print(f"tilewright: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        remedy = error.name and _remedy(error.name, "".join(arguments[:1]))
        if not remedy:
            raise
        print(f"tilewright: error: {error.name} is missing: {remedy}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Closing stderr suppresses Python's own message at exit.
        sys.stderr.close()
        return 0
    except OSError as error:
        print(f"tilewright: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tilewright: interrupted", file=sys.stderr)
        return 130
    return 0
