"""The TidalTransformer: two streams, one attention function, positions and places."""
