"""Training machinery: processes, signals, threads that read ahead, the run folder, checkpoints."""
