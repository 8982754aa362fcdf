"""One process of test_teacher_cache_ranks: caches the teacher with the others, trains from it.

torchrun --nproc_per_node 2 -m support.rank SECONDS support.cache_step FOLDER
"""

import sys
from pathlib import Path

from support.cache_cases import Pair, run_of
from support.rank import leave_state

FIELDS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,  # no row of an even number counts twice
    "max_steps": 2,
    "train_sampling_strategy": "random",
}


def main(folder: str) -> None:
    pair = Pair.load(Path(folder))
    pair.cache("cache", "--cache_shard_mib=0.001")
    losses, recorder, trainer = run_of(
        pair, pair.folder / "run", teacher_cache=str(pair.folder / "cache"), **FIELDS
    )
    evaluated = trainer.evaluate(pair.rows[:4])["eval_loss"]
    found = {"losses": losses, "gradients": recorder.steps, "eval_loss": evaluated}
    leave_state(trainer, pair.folder, **found)


if __name__ == "__main__":
    main(sys.argv[1])
