"""Exceptions for invalid input from outside the program."""


class UserError(Exception):
    """A file, an option or a text is invalid.

    The message is one line. It names the value and what is allowed. The command line prints it without a traceback and exits
    with status 2. Wrong arguments between functions raise `ValueError` or `TypeError`.
    """


class DivergedError(UserError):
    """The loss of a training run is not finite, or spikes for too many consecutive steps: change the settings."""


def one_line(error: Exception) -> str:
    """Return the message of another library's error on one line, or the name of its class if it is empty."""
    return " ".join(str(error).split()) or type(error).__name__
