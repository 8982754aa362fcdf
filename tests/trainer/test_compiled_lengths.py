"""A run compiles its layers in its first step, however many lengths its rows have."""

from transformers import TrainerCallback

from support.tiny_models import tiny_rows, with_lengths
from support.trainer_cases import make_trainer, record_widths

NUM_STEPS, MOST = 5, 3  # pieces of code of a kind: with the first length, with any, without a mask


class Count(TrainerCallback):
    """Of graphs that there are at the end of each step."""

    def __init__(self, graphs):
        self.graphs, self.counts = graphs, []

    def on_step_end(self, *args, **kwargs):
        self.counts.append(len(self.graphs))


def test_rows_of_many_lengths_share_a_few_pieces_of_code(graphs, tmp_path):
    rows = tiny_rows(4 * NUM_STEPS, images="mixed")
    with_lengths(rows, [1 + 7 * i % 23 for i in range(len(rows))])
    count = Count(graphs)
    trainer = make_trainer(
        *(tmp_path, rows, "qwen3_vl"),
        eval_rows=rows[:3],
        callbacks=[count],
        max_steps=NUM_STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        compile_models="regional",
    )
    widths = record_widths(trainer)
    trainer.train()
    kinds = trainer.fast.compiled.kinds
    assert len(set(widths)) >= 8 and len(kinds) == 4 and all(kind.is_compiled for kind in kinds)
    assert count.counts == [count.counts[0]] * NUM_STEPS
    assert len(graphs) == count.counts[0] <= MOST * len(kinds)
