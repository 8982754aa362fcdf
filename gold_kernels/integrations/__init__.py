"""Losses of this library in the training loops of others. Other packages are imported when they
are used, never with this one.
"""
