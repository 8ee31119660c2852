"""What a run has read: its rolling hash, its rows explained, two runs compared."""
