"""The one exception that reaches the user as a single line instead of a traceback."""


class UserError(Exception):
    """Something the person at the command line can put right; the message says how."""


def one_line(error: Exception, length: int = 600) -> str:
    """What another library says, cut short, to stand inside the message of a `UserError`."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:length].rstrip(".")
