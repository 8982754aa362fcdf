"""How a run begins and ends: its lock, its checkpoints, NaN, signals and errors."""
