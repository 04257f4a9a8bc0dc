"""What keeps a run alive and whole: its processes, its folder, its checkpoints, what is said when it cannot go on."""
