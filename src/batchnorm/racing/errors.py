"""What goes wrong because of what was asked for. The command line prints it in one line and exits with 2."""


class RaceError(ValueError):
    """The race cannot be run as asked: an unknown name, a wrong value, missing data."""
