"""Errors of a race, apart from mistakes of ours."""


class RaceError(ValueError):
    """The race cannot be run as asked: an unknown name, a wrong value, missing data. The command exits with 2."""


class WorkerError(RuntimeError):
    """A training process was killed or raised; the race can be resumed. The command exits with 1."""


class UnreadableFile(RaceError):
    """A file is damaged: only the process that reads it knows, so that one tells of it, whichever it is."""
