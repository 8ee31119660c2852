"""Experiments: what the TidalTransformer is good for, measured against baselines of the same code."""
