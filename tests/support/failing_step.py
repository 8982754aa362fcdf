"""One process of test_failing_rank: the second step fails on rank 1 alone, in its loss or at a row
that is read for the next one.

torchrun --nproc_per_node 2 -m support.rank SECONDS support.failing_step OUT_DIR loss|row
"""

import os
import sys

from gold_trainer.objectives import same_vocabulary
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

BAD_ROW = 11  # of rank 1, in step 3
fused_linear_loss, calls = same_vocabulary.fused_linear_loss, []


def failing(*args, **options):
    calls.append(None)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        raise RuntimeError("out of memory")
    return fused_linear_loss(*args, **options)


if __name__ == "__main__":
    rows = tiny_rows(16)
    if sys.argv[2] == "loss":
        same_vocabulary.fused_linear_loss = failing
    else:
        rows[BAD_ROW]["messages"][1]["content"] = 7
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    fields["per_device_train_batch_size"] = 2
    make_trainer(sys.argv[1], rows, **fields).train()
