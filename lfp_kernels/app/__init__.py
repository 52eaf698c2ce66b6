"""The command line's training application: data, models, training loop, demo and its report.

It uses the library only through its public names; the library never imports it.
"""


class AppError(Exception):
    """A mistake of the user: shown as one line on stderr, exit code 2."""
