"""Block by block generation from an exported model."""
