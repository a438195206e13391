"""The one exception that a user is meant to read."""


class FlapsamError(Exception):
    """Something is wrong with what the user gave: one clear sentence that says what, in which file, and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """
