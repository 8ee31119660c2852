"""Text in, packed rows out: segmentation, tokeniser, layout, shards, order, stream."""
