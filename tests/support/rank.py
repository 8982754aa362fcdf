"""One process of several: runs a script of this folder, for so many seconds at most.

torchrun --nproc_per_node 2 -m support.rank SECONDS support.SCRIPT [ARGUMENT ...]
"""

import faulthandler
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch

GRACE = 5  # seconds in which all ranks print before the first one ends, and with it the others


def limit(seconds: int) -> None:
    """Give this process so many seconds from now. Then it prints all stacks and dies, whatever it
    waits for.
    """
    faulthandler.dump_traceback_later(seconds)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds + GRACE)


def leave_together() -> None:
    """A process that ends while another still talks to it would be an error there."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def leave_state(trainer: Any, folder: str | Path, **found: object) -> None:
    """The main process writes what was found, and the weights, into state.pt; then all leave."""
    if trainer.is_world_process_zero():
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        state = {"processes": trainer.args.world_size, "weights": weights, **found}
        torch.save(state, Path(folder) / "state.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # or threads of gloo may abort the exit


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    limit(int(sys.argv.pop(0)))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
