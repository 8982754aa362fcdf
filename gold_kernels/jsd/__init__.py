"""Generalized JSD of two models with one vocabulary."""
