"""One process of test_evaluating_ranks: evaluations of rows that fill no batch of all ranks.

torchrun --nproc_per_node 2 -m support.rank SECONDS
    support.evaluating_step OUT_DIR BATCH_SIZE
"""

import sys

import datasets

from gold_trainer import GOLDConfig, GOLDTrainer
from support.rank import leave_state
from support.tiny_models import tiny

TEXTS = ("One.", "Two, and a few words more.", "None.", "A third answer.", "Four and five.")
ROWS = [{"prompt": "What?", "completion": text} for text in TEXTS]
ROWS[2]["prompt"] = ""  # which is skipped
NUM_ROWS = (1, 3, 5)


def main(output_dir: str, batch_size: int) -> None:
    student, tokenizer = tiny("qwen3")
    trainer = GOLDTrainer(
        model=student,
        teacher_model=tiny("qwen3", "teacher")[0],
        args=GOLDConfig(
            output_dir=output_dir,
            per_device_eval_batch_size=batch_size,
            dataloader_drop_last=True,
            on_bad_row="skip",
            max_steps=1,
            max_length=64,
            max_completion_length=32,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=ROWS,
        processing_class=tokenizer,
    )
    found = {}
    for count in NUM_ROWS:
        table = datasets.Dataset.from_list(ROWS[:count])
        forms = {"rows": ROWS[:count], "table": table, "stream": table.to_iterable_dataset()}
        for form, rows in forms.items():
            found[form, count] = trainer.evaluate(rows)
        metrics = trainer.predict(ROWS[:count]).metrics
        found["predict", count] = {k.replace("test_", "eval_"): v for k, v in metrics.items()}
    for metrics in found.values():
        for name in [name for name in metrics if name.endswith(("_second", "_time", "_runtime"))]:
            del metrics[name]
    leave_state(trainer, output_dir, found=found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
