"""The memory of a run, by part, before any weights are read."""
