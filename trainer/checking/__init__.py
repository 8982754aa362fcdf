"""All rows of a run, read before it: `gold-trainer check`."""
