"""Evaluation by others' programs: the model behind lm-evaluation-harness. `python -m tidal_dist.evaluation` runs it."""
