"""What a run needs from the machine: processes, signals, memory, streams, CUDA graphs, progress,
and what is installed."""
