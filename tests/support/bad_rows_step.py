"""One process of test_bad_rows: two steps, in the first of which a rank has no row left.

torchrun --nproc_per_node 2 -m support.rank SECONDS
    support.bad_rows_step OUT_DIR BATCH_SIZE ACCUMULATION
"""

import sys

from support.bad_rows import BAD, skips_of, text_rows, with_bad
from support.rank import leave_state
from support.streams import Stream
from support.trainer_cases import losses_of, make_trainer


def main(output_dir: str, batch_size: int, accumulation: int) -> None:
    rows = with_bad(text_rows(5), {2: BAD["other"], 3: BAD["long_prompt"], 5: BAD["no_answer"]})
    fields = {
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "on_bad_row": "skip",
        "max_steps": 2,
        "optim": "adamw_torch",
    }
    streamed = make_trainer(f"{output_dir}/stream", Stream(rows), "qwen3", **fields)
    streamed.train()
    written = make_trainer(f"{output_dir}/written", rows, "qwen3", **fields | {"lmbda": 1.0})
    written.train()  # a rank without a row left writes nothing
    trainer = make_trainer(output_dir, rows, "qwen3", eval_rows=rows, **fields)
    trainer.train()
    metrics = trainer.evaluate()
    leave_state(
        trainer,
        output_dir,
        losses=losses_of(trainer),
        streamed_losses=losses_of(streamed),
        written=skips_of(written)[:2],
        skips=skips_of(trainer)[:2],
        eval={k: v for k, v in metrics.items() if "skipped" in k or k == "eval_loss"},
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
