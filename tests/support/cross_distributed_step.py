"""One process of test_cross_distributed: two steps across families, one log of both, weights and
log from rank 0. With two processes each has samples that cannot be distilled.

torchrun --nproc_per_node 2 -m support.rank SECONDS
    support.cross_distributed_step OUT_DIR BATCH_SIZE ACCUMULATION
"""

import sys

from support.cross_cases import cross_trainer, make_sides
from support.metric_cases import FIELDS, MEANS, SKIPS, rows_with_skips
from support.rank import leave_state


def main(output_dir: str, batch_size: int, accumulation: int) -> None:
    sides = make_sides("lfm2_vl", "qwen3_vl")
    given = rows_with_skips(*sides, count=8, unspelled=(0, 3, 5), cut=2)
    trainer, _ = cross_trainer(
        output_dir,
        given.rows,
        *sides,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_length=given.max_length,
        max_steps=2,
        logging_steps=2,
        learning_rate=0.1,
        token_weighting="support.weightings:graded",
        **FIELDS,
    )
    trainer.train()
    names = ("loss", "off_policy_loss", *MEANS, *SKIPS)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    log = [{name: entry[name] for name in names} for entry in entries]
    leave_state(trainer, output_dir, log=log)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
