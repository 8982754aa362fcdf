"""Logits of both heads a chunk at a time, and the gradients of a row loss; knows no loss."""
