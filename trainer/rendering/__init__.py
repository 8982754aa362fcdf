"""From rows to token ids: chat templates, tokens of an answer, tensors of a batch."""
