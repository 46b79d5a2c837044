"""The one exception root.

A `FullweightError` is a user's mistake or the outside world's: its message says what was found, what was
expected and what to do, and the command line prints it without a traceback and exits non-zero. A
programmer's mistake is an `assert`, and keeps its traceback.
"""


class FullweightError(ValueError):
    """Root of every error that a user can cause or mend."""


class ConfigError(FullweightError):
    """A recipe, an override or a model config is wrong."""


class DataError(FullweightError):
    """A data file, a message or a sample is wrong; the message names the file and line."""


class CheckpointError(FullweightError):
    """A checkpoint is missing, incomplete, corrupt or of another model."""


class OperationError(FullweightError):
    """An operation's implementation was asked for by name and is absent here."""


class TrainingError(FullweightError):
    """Training cannot go on: non-finite loss, no data, disagreeing ranks."""


class ToldError(FullweightError):
    """Ends a rank quietly: the cause is known to all ranks, and one of them has printed it."""
