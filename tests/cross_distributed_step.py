"""One process of test_cross_distributed: two steps across families, weights and log from rank 0.

torchrun --nproc_per_node 2 cross_distributed_step.py OUT_DIR BATCH_SIZE ACCUMULATION
"""

import sys
from pathlib import Path

import torch
from cross_cases import cross_trainer, make_sides, rows_of


def main(output_dir: str, batch_size: int, accumulation: int) -> None:
    trainer, _ = cross_trainer(
        output_dir,
        rows_of("lfm2_vl", count=8),
        *make_sides("lfm2_vl", "qwen3_vl"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        learning_rate=0.1,
        uld_use_hybrid_loss=True,
        uld_crossentropy_weight=0.3,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        names = ("loss", "uld_loss", "crossentropy", "groups_per_token", "scored_bytes")
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
    trainer.accelerator.end_training()  # or threads of gloo may abort the exit


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
