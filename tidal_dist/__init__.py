"""The TidalTransformer: configuration, model, training, export, generation and checks. `load` opens an export."""

from tidal_dist.loading import load

__all__ = ["load"]
