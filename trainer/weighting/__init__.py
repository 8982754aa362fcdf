"""Weights of tokens in the loss: a user's function of a micro-batch, or one that is built in."""
