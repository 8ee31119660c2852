"""Entry points that launchers start."""
