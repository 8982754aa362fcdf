"""One process of test_cross_distributed: two steps across families, one log of both, weights and
log from rank 0. With two processes each has samples that cannot be distilled.

torchrun --nproc_per_node 2 -m support.rank SECONDS
    support.cross_distributed_step OUT_DIR BATCH_SIZE ACCUMULATION
"""

import sys
from pathlib import Path

import torch

from support.cross_cases import cross_trainer, make_sides
from support.metric_cases import FIELDS, MEANS, SKIPS, rows_with_skips


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
    if trainer.is_world_process_zero():
        names = ("loss", "off_policy_loss", *MEANS, *SKIPS)
        state = {
            "log": [
                {name: entry[name] for name in names}
                for entry in trainer.state.log_history
                if "loss" in entry
            ],
            "processes": trainer.args.world_size,
            "weights": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
        }
        torch.save(state, Path(output_dir) / "state.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # or threads of gloo may abort the exit


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
