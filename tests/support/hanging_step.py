"""One process of test_processes: the first waits for the second, which waits for nobody.

torchrun --nproc_per_node 2 -m support.rank SECONDS support.hanging_step
"""

import os
import time

import torch


def wait_for_nobody() -> None:
    time.sleep(1000)


def wait_for_the_other() -> None:
    torch.distributed.barrier()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    (wait_for_the_other if os.environ["RANK"] == "0" else wait_for_nobody)()
