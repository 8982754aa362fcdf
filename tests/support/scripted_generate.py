"""A stand-in for what samples a model's completions, which writes what a test says."""

from gold_trainer.rendering.prompts import tokenizer_of
from gold_trainer.writers import Completion, LocalWriter


class Script:
    """Writes for one model rows of token ids, padded behind their ends as a batch has them; keeps
    what it was asked for. Other models write as ever.
    """

    def __init__(self, monkeypatch, model, completions, pad):
        self.calls = []  # prompts and sampling
        write = LocalWriter.write_rows

        def write_rows(writer, module, rows, sampling):
            if module is not model:
                return write(writer, module, rows, sampling)
            self.calls.append((rows, sampling))
            width = max(map(len, completions))
            padded = [ids + [pad] * (width - len(ids)) for ids in completions]
            return [Completion(ids, [0.0] * width, 0) for ids in padded]

        monkeypatch.setattr(LocalWriter, "write_rows", write_rows)


def ids_of(processor):
    tokenizer = tokenizer_of(processor)
    return tokenizer.eos_token_id, tokenizer.pad_token_id
