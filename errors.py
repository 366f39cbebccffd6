"""The one exception that means: a value from outside is wrong, and here is what to do about it."""


class UserError(Exception):
    """A file, an option or a text that cannot be used.

    The message is one line, names the value and says what is allowed. The command prints it without a traceback and
    exits with status 2. Wrong arguments between functions stay plain `ValueError` and `TypeError`.
    """


class DivergedError(UserError):
    """A training run whose loss is not finite, or spikes for too many steps in a row: other settings are needed."""


def one_line(error: Exception) -> str:
    """Return what an error of another library says, in one line; its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
