"""Training machinery: processes, signals, loader workers, the run folder, checkpoints."""
