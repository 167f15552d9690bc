"""Errors a user can cause, each with the exit code that a command ends with, and the message of any other in a line."""


class AttnResError(Exception):
    """Base of the errors that the commands turn into one line on stderr and an exit code.

    The message says what is wrong, where, and the remedy, in one line.
    """

    code = 1


class ConfigError(AttnResError):
    """A configuration that cannot run: unknown key, impossible value, missing argument."""

    code = 2


class DataError(AttnResError):
    """Text or token shards that are missing, empty, too short or corrupt."""

    code = 3


class CheckpointError(AttnResError):
    """A checkpoint that is missing, unreadable or does not fit the configuration."""

    code = 4


class NumericsError(AttnResError):
    """A non-finite value, or a check that must hold before results are written and does not."""

    code = 5


class StorageError(AttnResError):
    """A disk that is full or a folder that cannot be written."""

    code = 6


class RankLost(AttnResError):
    """Another process of a distributed run is gone; the same command resumes."""


class Stopped(AttnResError):
    """Stopped by a signal after saving; the same command resumes."""

    code = 75


def one_line(error: Exception, most: int | None = 160) -> str:
    """The message of an error of another library, fit to stand inside one of ours.

    Args:
        error: whatever it raised.
        most: characters; None takes all of them.
    """
    return " ".join(str(error).split())[:most]
