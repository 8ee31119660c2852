"""Training under DeepSpeed: loop, engine, checkpoints, validation, monitor."""
