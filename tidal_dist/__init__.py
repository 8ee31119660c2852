"""Train and run the TidalTransformer at scale."""
