"""One document as the model sees it: its blocks and streams, and what a model says of them."""
