"""Callbacks that count: a resumed run goes on counting, as it does with its rows and rollouts."""

from collections.abc import Sequence
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState


class CallbackStates(TrainerCallback):
    """Gives callbacks the counts that their checkpoint has. What they were made with stays, which
    restore_callback_states_from_checkpoint would take from the checkpoint too.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback]) -> None:
        self.callbacks = callbacks  # those of the run, now and later

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.global_step or args.restore_callback_states_from_checkpoint:
            return
        of_checkpoint: Any = state.stateful_callbacks
        kept = {
            name: list(states) if isinstance(states, list) else [states]
            for name, states in of_checkpoint.items()
        }
        for callback in self.callbacks:
            states = kept.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and states:
                for name, value in states.pop(0).get("attributes", {}).items():
                    setattr(callback, name, value)


def check_early_stopping(callbacks: Sequence[Any], args: TrainingArguments) -> None:
    """Refuse what transformers would answer with an AssertionError, after models are loaded."""
    if not any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks):
        return
    for name, is_missing, value in (
        ("eval_strategy", args.eval_strategy in (None, "no"), "'steps' or 'epoch'"),
        ("metric_for_best_model", args.metric_for_best_model is None, "'eval_loss'"),
    ):
        if is_missing:
            raise ValueError(
                f"GOLDTrainer: {name} must be set with an EarlyStoppingCallback, got "
                f"{getattr(getattr(args, name), 'value', None)!r}, with which it has nothing to "
                f"look at; set {name} to {value}, or leave the callback out."
            )
