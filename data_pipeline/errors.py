"""The exception family whose text a user can act on: what, where, what to do."""


class UserError(Exception):
    """Something only the user can mend. Its text is one line; programs exit with code 2."""


class CorpusError(UserError):
    """A corpus file is missing, unreadable or malformed."""


class ShardError(UserError):
    """Shards are missing, torn, or belong to another tokeniser, segmentation or plan."""


class TokenizerError(UserError):
    """A tokeniser file is missing, broken or of a kind that cannot be used."""


class BadShardError(ShardError):
    """One shard cannot be read as it was written: `shard` is its index in its split's list, `name` its name."""

    def __init__(self, message: str, shard: int, name: str):
        super().__init__(message)
        self.shard, self.name = shard, name

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.shard, self.name)


def one_line(error: BaseException) -> str:
    """An exception's text without its line breaks; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
