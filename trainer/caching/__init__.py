"""The cache of a teacher: what it holds of a row, and the run that makes it."""
