"""A run that writes ahead ends with an error in its first step, while the server is answering.

python -m support.vllm_leaving_step OUT_DIR ERROR
"""

import sys
import time

from gold_trainer import GOLDTrainer
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer
from support.vllm_stub import GENERATE, stub_server

NUM_ROWS = 4  # of a window
SECONDS = 60


def main(output_dir: str, name: str) -> None:
    with stub_server() as stub:
        fields = {"lmbda": 1.0, "max_steps": 3, "async_rollouts": 1} | stub.fields
        run = make_trainer(output_dir, tiny_rows(12), "qwen3", **fields)
        answered = iter([None] * NUM_ROWS)
        stub.answers[GENERATE] = lambda body: next(answered, 1) and time.sleep(SECONDS)

        def failing(*args: object, **options: object) -> None:
            while len(stub.bodies(GENERATE)) <= 2 * NUM_ROWS:  # and one at the start
                time.sleep(0.01)
            raise {"RuntimeError": RuntimeError, "KeyboardInterrupt": KeyboardInterrupt}[name](name)

        GOLDTrainer.training_step = failing  # type: ignore[method-assign]
        try:
            run.train()
        finally:
            assert run.window_source.asked is None
            sys.stdout.write("LEAVING\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
