"""One process of test_surviving_ranks: what one rank alone meets is decided by all of them.

torchrun --nproc_per_node 2 -m support.rank SECONDS
    support.surviving_step OUT_DIR BATCH_SIZE ACCUMULATION
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from gold_trainer.objectives import same_vocabulary
from gold_trainer.survival import checkpoints
from gold_trainer.survival.nonfinite import NonFiniteError
from gold_trainer.survival.run_lock import NAME
from support.rank import leave_together
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

fused_linear_loss = same_vocabulary.fused_linear_loss
FIELDS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(tiny_rows(24))


def spoil(call: int, action) -> None:
    """action before the loss of a micro-batch on rank 1, on which its loss depends."""
    calls = []

    def spoiled(*args, **options):
        calls.append(None)
        loss, values = fused_linear_loss(*args, **options)
        is_due = len(calls) == call and os.environ["RANK"] == "1"
        return (action(loss) if is_due else loss), values

    same_vocabulary.fused_linear_loss = spoiled


def ask_to_end(loss):
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def run(folder: Path, batch_size: int, accumulation: int, rows=None, resume=None, **options):
    """What the run came to, and how."""
    fields = FIELDS | options
    fields |= {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    trainer = make_trainer(folder, tiny_rows(24) if rows is None else rows, **fields)
    try:
        trainer.train(resume_from_checkpoint=resume)
        how = "done"
        if os.environ["RANK"] == "0":  # as scripts do, on the process that also writes files
            trainer.save_model(str(folder / "alone"))
    except (NonFiniteError, ValueError, SystemExit) as error:
        how = f"{type(error).__name__}: {error}"
    weights = [weight.sum().item() for weight in trainer.model.state_dict().values()]
    return {"how": how, "step": trainer.state.global_step, "weights": weights}


def main(output_dir: str, batch_size: int, accumulation: int) -> None:
    folder, sizes = Path(output_dir), (batch_size, accumulation)
    results = {}
    spoil(2 * accumulation, lambda loss: loss * float("nan"))
    results["error"] = run(folder / "error", *sizes)
    spoil(2 * accumulation, lambda loss: loss * float("nan"))
    results["skip"] = run(folder / "skip", *sizes, on_nonfinite="skip")
    spoil(2 * accumulation, ask_to_end)
    results["signal"] = run(folder / "signal", *sizes)
    same_vocabulary.fused_linear_loss = fused_linear_loss
    newest, _ = checkpoints.find_newest(folder / "signal", num_ranks=2)
    results["signal"]["newest"] = newest and newest.name
    results["resumed"] = run(folder / "signal", *sizes, resume=True)
    results["whole"] = run(folder / "whole", *sizes)
    results["whole"]["saved"] = (folder / "whole/alone/model.safetensors").is_file()
    results["stream"] = run(
        folder / "stream", *sizes, rows=Stream(), train_sampling_strategy="sequential"
    )
    (folder / "locked").mkdir(exist_ok=True)
    (folder / "locked" / NAME).write_text(json.dumps({"pid": 5, "host": "far", "since": "then"}))
    results["locked"] = run(folder / "locked", *sizes)
    torch.save(results, folder / f"rank_{os.environ['RANK']}.pt")
    torch.save(results, folder / "state.pt")
    leave_together()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
