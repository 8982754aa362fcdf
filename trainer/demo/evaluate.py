"""Accuracy on held-out pictures: answers are generated greedily and read as a digit."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from gold_trainer.demo.digits import Digits, parse_answer
from gold_trainer.rendering.collator import Example
from gold_trainer.rendering.prompts import process_prompts
from gold_trainer.writers.generating import generation_mode

BATCH_SIZE = 120
MAX_ANSWER_TOKENS = 24  # an answer has about 10


def generate_answers(
    model: Any,  # a PreTrainedModel with GenerationMixin: there is no one type for both
    processor: ProcessorMixin,
    examples: Sequence[Example],
) -> list[str]:
    """The model's greedy answer to every example."""
    answers = []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        inputs = process_prompts(
            processor, [e.prompt_text for e in batch], [e.images for e in batch]
        )
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with generation_mode(model), torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        completions = output[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(completions, skip_special_tokens=True)
    return answers


def accuracy_of(answers: Sequence[str], digits: Digits) -> float:
    """Share of answers that are a whole sentence naming the digit shown."""
    pairs = zip(answers, digits.labels, strict=True)
    return sum(parse_answer(answer) == label for answer, label in pairs) / len(digits)
