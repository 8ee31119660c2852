"""The exception family whose text a user can act on: what, where, what to do."""


class UserError(Exception):
    """Something only the user can mend. Its text is one line; programs exit with code 2."""


class CorpusError(UserError):
    """A corpus file is missing, unreadable or malformed."""


class ShardError(UserError):
    """Shards are missing, torn, or belong to another tokeniser, segmentation or plan."""


class TokenizerError(UserError):
    """A tokeniser file is missing, broken or of a kind that cannot be used."""
