"""One process of several: runs a script of this folder, for so many seconds at most.

torchrun --nproc_per_node 2 -m support.rank SECONDS support.SCRIPT [ARGUMENT ...]
"""

import atexit
import faulthandler
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

GRACE = 5  # seconds in which all ranks print before the first one ends, and with it the others


def limit(seconds: int) -> None:
    """Give this process so many seconds from now. Then it prints all stacks and dies, whatever it
    waits for. It also prints them where a signal ends it (SIGABRT of a C++ thread, say).
    """
    faulthandler.enable()
    faulthandler.dump_traceback_later(seconds)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds + GRACE)


def leave_together() -> NoReturn:
    """The last call of a rank. A process that ends while another still talks to it would be an
    error there.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    _leave()


def leave_state(trainer: Any, folder: str | Path, **found: object) -> None:
    """The main process writes what was found, and the weights, into state.pt; then all leave. A
    process without a group goes on: it may be that of the tests.
    """
    is_rank = torch.distributed.is_initialized()
    if trainer.is_world_process_zero():
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        state = {"processes": trainer.args.world_size, "weights": weights, **found}
        torch.save(state, Path(folder) / "state.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if is_rank:
        _leave()


def _leave() -> NoReturn:
    """Without Python's own exit: DeepSpeed refers to groups that were destroyed, whose threads of
    gloo live on. One that still holds a tensor of Python aborts the process where it waits for an
    interpreter that is ending (1 of 20 runs on a busy machine; pytorch's pull request 179291).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    limit(int(sys.argv.pop(0)))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
