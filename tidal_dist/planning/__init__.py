"""What a run needs, on paper: parameters, memory, communication, time. No torch, no DeepSpeed."""
