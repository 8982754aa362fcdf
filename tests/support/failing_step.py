"""One process of test_failing_rank: the second step fails on rank 1 alone.

torchrun --nproc_per_node 2 -m support.rank SECONDS
    support.failing_step OUT_DIR
"""

import os
import sys

from gold_trainer.objectives import same_vocabulary
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

fused_linear_loss, calls = same_vocabulary.fused_linear_loss, []


def failing(*args, **options):
    calls.append(None)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        raise RuntimeError("out of memory")
    return fused_linear_loss(*args, **options)


if __name__ == "__main__":
    same_vocabulary.fused_linear_loss = failing
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    fields["per_device_train_batch_size"] = 2
    make_trainer(sys.argv[1], tiny_rows(16), **fields).train()
