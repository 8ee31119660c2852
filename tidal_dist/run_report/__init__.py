"""What became of a run, on one page that needs nothing else."""
