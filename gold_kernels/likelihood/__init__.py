"""Likelihoods of aligned groups of two tokenizers, compared as two outcomes."""
