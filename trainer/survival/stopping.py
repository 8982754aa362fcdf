"""A run that is asked to end, or meets an error, leaves a checkpoint that it can go on from.

SIGTERM and SIGINT (Ctrl-C) wait for the end of the step in flight. So do signals of a terminal that
closes (SIGHUP) and of a scheduler before a job's time is up (SIGUSR1), unless somebody else handles
or ignores them. An error comes within a step: the weights then are those of the step before, and so
are the random numbers that are saved.
"""

import logging
import os
import random
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Windows has none of them; nohup ignores the first.
IF_UNUSED = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Stopper(TrainerCallback):
    """Notes signals, and where in a step the run is."""

    def __init__(self) -> None:
        self.reset()
        self.before: dict[signal.Signals, Any] = {}

    def reset(self) -> None:
        """No run has begun."""
        self.signal: signal.Signals | None = None
        self.must_stop = False  # agreed on by all ranks
        self.weights_are_whole = False  # not while the optimizer changes them
        self.is_saving = False
        self.random_state: dict[str, Any] | None = None
        self.process = os.getpid()

    def install(self) -> None:
        """Signals reach Python in its main thread only."""
        self.reset()
        if threading.current_thread() is threading.main_thread():
            unused = [name for name in IF_UNUSED if signal.getsignal(name) is signal.SIG_DFL]
            self.before = {n: signal.signal(n, self._handle) for n in (*SIGNALS, *unused)}

    def uninstall(self) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)
        self.before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker of the data loader, which ends with its parent
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if hasattr(signal, "SIGCHLD"):
            # Workers of the data loader may get the signal too. Torch raises an error in this
            # process when one ends, at any line, which would break the checkpoint off.
            self.before.setdefault(signal.SIGCHLD, signal.getsignal(signal.SIGCHLD))
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        hint = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        # not the logging module: a signal may come while it holds its lock
        text = f"GOLDTrainer: {self.signal.name}: stopping at the end of this step{hint}\n"
        with suppress(OSError):
            os.write(2, text.encode())

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """transformers looks at max_steps behind a step: a run that has them would take one more"""
        control.should_training_stop |= state.global_step >= state.max_steps

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.weights_are_whole = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.weights_are_whole, self.random_state = True, None
        if self.signal is not None and args.world_size == 1:
            self.must_stop = True
        if self.must_stop:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"

    def remember(self) -> None:
        """Random numbers as a checkpoint at the end of this step would have them."""
        self.random_state = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def save_after(self, save: Callable[[], None]) -> bool:
        """Save the run as it was at the end of the last step; whether that was possible."""
        if not self.weights_are_whole or self.is_saving:
            return False
        state = self.random_state
        if state is not None:
            random.setstate(state["python"])
            np.random.set_state(state["numpy"])
            torch.random.set_rng_state(state["cpu"])
            if state["cuda"]:
                torch.cuda.set_rng_state_all(state["cuda"])
        try:
            save()
        except Exception as error:  # the first error is the one to report
            logger.warning("GOLDTrainer: no checkpoint could be saved after the error: %s", error)
            return False
        return True
