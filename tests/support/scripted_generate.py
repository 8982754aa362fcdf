"""A stand-in for generate that writes what a test says."""

import torch

from gold_trainer.collator import tokenizer_of


class Script:
    """Stands in for generate: rows of token ids, padded on the right as generate pads them; keeps
    what it was called with and how the model was then.
    """

    def __init__(self, model, completions, pad):
        self.completions = completions
        self.pad = pad
        self.model = model
        self.calls = []
        self.states = []
        model.generate = self

    def __call__(self, **inputs):
        self.calls.append(inputs)
        self.states.append((self.model.generation_config.repetition_penalty, self.model.training))
        width = max(map(len, self.completions))
        rows = [ids + [self.pad] * (width - len(ids)) for ids in self.completions]
        return torch.cat([inputs["input_ids"], torch.tensor(rows)], dim=1)


def ids_of(processor):
    tokenizer = tokenizer_of(processor)
    return tokenizer.eos_token_id, tokenizer.pad_token_id
