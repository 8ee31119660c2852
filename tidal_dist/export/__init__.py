"""From a training checkpoint to one folder of safetensors, proven equal."""
