"""The doctor: ten suspects for a model whose loss falls while its text is bad, each a group of checks."""
