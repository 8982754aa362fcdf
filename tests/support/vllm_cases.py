"""Runs whose rollouts a vLLM server writes, and what they wrote."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from gold_trainer.collator import build_inputs
from support.tiny_models import tiny_processor, tiny_rows
from support.trainer_cases import make_trainer

ROWS = tiny_rows(8, images="mixed")
PROMPTS = [{**row, "messages": row["messages"][:1]} for row in ROWS]


def make_run(output_dir: Any, server: dict[str, Any], student: Any, **fields: Any) -> Any:
    """server: the fields that name it."""
    options = {"lmbda": 1.0} | server | fields
    processor = tiny_processor("qwen3_vl")
    return make_trainer(output_dir, PROMPTS, student=student, processor=processor, **options)


def prompts_of(run: Any, num_completions: int = 1) -> list[Any]:
    """Of the rows, as the window of step 0 has them."""
    rows = [run.train_dataset[i] for i in range(len(run.train_dataset))]
    examples = [e for e in run.data_collator(rows).examples for _ in range(num_completions)]
    return run.rollouts._prompts(examples, "student", 0, {})


class Recorded:
    """What a writer wrote, in the order of its calls."""

    def __init__(self, writer: Any) -> None:
        self.steps: list[list[Any]] = []
        self.rows: list[dict[int, list[list[int]]]] = []  # token ids by row of the dataset
        self.listen: Callable[[Any, Any], None] = lambda prompts, completions: None
        self.complete, writer.complete = writer.complete, self

    def __call__(self, prompts: Any, sampling: Any) -> Any:
        completions = self.complete(prompts, sampling)
        self.steps.append([c for of_one in completions for c in of_one])
        self.rows.append(
            {
                prompt.example.index: [c.token_ids for c in of_one]
                for prompt, of_one in zip(prompts, completions, strict=True)
                if prompt.example.index >= 0  # others are written for the sake of other ranks
            }
        )
        self.listen(prompts, completions)
        return completions


def recorded_completions(run: Any) -> Recorded:
    return Recorded(run.rollouts.writers["student"])


def on_policy_logprobs(run: Any, prompts: Any, completions: Any) -> float:
    """The largest difference of the writer's log-probabilities and the student's own."""
    sampling, processor = run.rollouts.sampling["student"], run.processing_class
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    largest = 0.0
    for prompt, of_one in zip(prompts, completions, strict=True):
        for completion in of_one:
            example = prompt.example.with_completion(completion.token_ids)
            inputs = build_inputs(processor, [example])
            with torch.no_grad():
                logits = run.model(**inputs.tensors).logits[0][inputs.scored_rows]
            logits[:, sampling.banned_ids(logits.shape[1])] = -torch.inf
            logprobs = warpers(inputs.tensors["input_ids"], logits).log_softmax(-1)
            own = logprobs[torch.arange(len(logits)), completion.token_ids]
            largest = max(largest, (own - torch.tensor(completion.logprobs)).abs().max().item())
    return largest
