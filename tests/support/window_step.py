"""One process of test_window: what its windows held in four steps; collected by rank 0.

torchrun --nproc_per_node 2 -m support.rank SECONDS
    support.window_step OUT_DIR BATCH_SIZE ACCUMULATION
"""

import sys

from accelerate.utils import gather_object

from gold_trainer import GOLDTrainer
from support.rank import leave_state
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer


def run(output_dir: str, batch_size: int, accumulation: int) -> tuple[GOLDTrainer, list[dict]]:
    """The trainer and, for each of its steps, what the window held."""
    trainer = make_trainer(
        output_dir,
        tiny_rows(8),
        "qwen3",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_generations=2,
        lmbda=0.5,
        max_steps=4,
        learning_rate=0.0,
        temperature=2.0,
        top_p=1.0,
    )
    steps, complete = [], trainer.rollouts.complete

    def record(*args):
        batches = complete(*args)
        examples = [example for batch in batches for example in batch.examples]
        steps.append(
            {
                "is_on_policy": [batch.is_on_policy for batch in batches],
                "rows": [example.index for example in examples],
                "completions": [example.completion_ids for example in examples],
            }
        )
        return batches

    trainer.rollouts.complete = record
    trainer.train()
    return trainer, steps


def main(output_dir: str, batch_size: int, accumulation: int) -> None:
    trainer, steps = run(output_dir, batch_size, accumulation)
    leave_state(trainer, output_dir, ranks=gather_object([steps]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
