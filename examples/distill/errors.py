"""The one exception that reaches the user as a single line instead of a traceback."""


class UserError(Exception):
    """Something the person at the command line can put right; the message says how."""
