"""The rows that a model takes."""

from data_pipeline.rows import RowFormat, row_format_of
from tidal_dist.config import Config


def row_format(config: Config) -> RowFormat:
    """The rows of a configuration as its model takes them, with places that are not shifted."""
    model = config.model
    return row_format_of(config.data, model.char_positions, writes=model.writes, char_order=model.char_order)
