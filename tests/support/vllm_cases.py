"""Runs whose rollouts a vLLM server writes, and what they wrote."""

from typing import Any

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
    return run.rollouts._prompts_of(examples, "student", 0, {})


class Recorded:
    """What a writer wrote, in the order of its calls."""

    def __init__(self, writer: Any) -> None:
        self.steps: list[list[Any]] = []
        self.rows: list[dict[int, list[list[int]]]] = []  # token ids by row of the dataset
        self.start, writer.start = writer.start, self

    def __call__(self, prompts: Any, sampling: Any) -> Any:
        answer = self.start(prompts, sampling)
        return lambda: self._kept(prompts, answer())

    def _kept(self, prompts: Any, completions: Any) -> Any:
        self.steps.append([c for of_one in completions for c in of_one])
        self.rows.append(
            {
                prompt.example.index: [c.token_ids for c in of_one]
                for prompt, of_one in zip(prompts, completions, strict=True)
                if prompt.example.index >= 0  # others are written for the sake of other ranks
            }
        )
        return completions


def recorded_completions(run: Any) -> Recorded:
    return Recorded(run.rollouts.writers["student"])
