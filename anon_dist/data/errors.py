"""What the data layer tells its user: every message names the file or option at fault and the remedy."""

from __future__ import annotations

from anon_dist.exits import FAILED, USAGE


class DataError(ValueError):
    """Something about the data, its source or its settings that the user can put right."""

    exit_code = USAGE


class SourceError(DataError):
    """A source that cannot be read as documents."""


class TokenizerError(DataError):
    """A tokenizer that cannot be made, loaded, or used for pretraining."""


class PreparationError(DataError):
    """A preparation that cannot start, go on, or end."""


class ShardError(DataError):
    """A prepared folder whose shards are missing, torn or altered."""

    exit_code = FAILED


class UnpreparedError(ShardError):
    """A folder that is no prepared one, or of another version."""

    exit_code = USAGE
