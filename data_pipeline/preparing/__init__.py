"""The stages of `tidal prepare` as tasks that may be killed and repeated, on one machine, Slurm or Ray."""
