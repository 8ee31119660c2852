"""What the commands of `tidal` take and do."""
