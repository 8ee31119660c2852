"""Errors a user can act on. All are `UserError`s: one line saying what, where and what to do; exit code 2."""

from data_pipeline.errors import CorpusError, ShardError, TokenizerError, UserError


class ConfigError(UserError):
    """A configuration file or override is wrong."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or of another run."""


class GuardError(UserError):
    """Training went wrong in a way that leaving rows out and going back does not mend."""


class ExportError(UserError):
    """An exported folder is missing files, torn, or does not repeat its checkpoint's loss."""


__all__ = [
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "ExportError",
    "GuardError",
    "ShardError",
    "TokenizerError",
    "UserError",
]
