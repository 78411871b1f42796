"""The one exception that the command line turns into a single line and exit status 2."""


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do, in one line."""
