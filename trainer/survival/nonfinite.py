"""NaN and inf: found before the optimizer's step, so that they never reach the weights.

Flags stay on the device while micro-batches run. Once a step, after the gradient norm is known,
the ranks add up their flags and read the sum: all of them decide alike.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gold_trainer import sharding
from gold_trainer.config import GOLDConfig
from gold_trainer.models import whole

WEIGHTS, TEACHER, LOSS, GRADIENT, STOP, EMPTY = range(6)  # places of the flags
MOST_NAMED = 16  # rows in a message
SIDES = {
    WEIGHTS: "token_weighting",
    TEACHER: "the teacher's hidden states",
    LOSS: "the student's loss",
    GRADIENT: "the student's gradient",
}
REMEDIES = {
    TEACHER: "float16 overflows: load the teacher with another dtype, or drop these rows",
    LOSS: "lower learning_rate, warm up, or look at these rows",
    GRADIENT: "lower learning_rate, warm up, or look at these rows",
}


class NonFiniteError(FloatingPointError):
    """Training met NaN or inf; weights and checkpoints are those of before."""


@dataclass
class Verdict:
    """What all ranks do with the step."""

    is_skipped: bool = False  # of NaN or inf, or because all its rows were left out
    must_stop: bool = False  # one of the ranks was asked to end


class NonFiniteGuard:
    """Watches the micro-batches of a window, and decides about its step."""

    def __init__(self, args: GOLDConfig, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.can_skip = args.on_nonfinite == "skip"
        self.can_be_empty = bool(args.skipped_reasons)
        self.num_items: Tensor | None = None  # (2,) of the window, what its loss is a mean over
        self.start()
        self.start_log()

    def start(self) -> None:
        """A window begins."""
        self.rows: list[list[int]] = []  # of each micro-batch
        self.flags: list[Tensor] = []  # (3,) bool: weights, teacher, loss
        self.losses: list[Tensor] = []

    def start_log(self) -> None:
        self.skipped = self.empty = self.accepted = 0
        self.accepted_loss = torch.zeros((), device=self.args.device)

    def add(
        self,
        rows: Iterable[int],
        teacher_is_bad: Tensor,
        loss: Tensor,
        weights_are_bad: Tensor | None = None,  # those of token_weighting; None: they are fine
    ) -> None:
        """One micro-batch; no host sync."""
        loss = loss.detach()
        weights = torch.zeros_like(teacher_is_bad) if weights_are_bad is None else weights_are_bad
        flags = [flag.to(loss.device) for flag in (weights, teacher_is_bad)]
        self.rows.append(list(rows))
        self.flags.append(torch.stack([*flags, ~torch.isfinite(loss)]))
        self.losses.append(loss.to(self.args.device))

    def decide(
        self, model: nn.Module, step: int, grad_norm: Tensor | float | None, wants_stop: bool
    ) -> Verdict:
        """Called once a step; the one wait for the device. NonFiniteError where a step cannot be
        taken and may not be left out.
        """
        device = self.args.device
        bad = torch.zeros(6, device=device)
        if self.flags:
            bad[:GRADIENT] = torch.stack([flags.to(device) for flags in self.flags]).any(0)
        # a scaler of float16 gradients meets inf as a matter of course, and skips the step itself
        if grad_norm is not None and self.accelerator.scaler is None:
            bad[GRADIENT] = ~torch.isfinite(whole(torch.as_tensor(grad_norm))).to(device)
        bad[STOP].fill_(float(wants_stop))  # an assignment would copy it, and wait
        # the scaler of float16 gradients takes no step without gradients
        can_be_empty = self.can_be_empty and self.accelerator.scaler is None
        if can_be_empty and self.num_items is not None:
            bad[EMPTY] = self.num_items.sum() == 0
        counts = self.accelerator.reduce(bad, reduction="sum").tolist()
        verdict = Verdict(any(counts[:STOP]), must_stop=counts[STOP] > 0)
        if verdict.is_skipped:
            weights_are_bad = has_nonfinite(trained(model), self.accelerator, device)
            if weights_are_bad or counts[WEIGHTS] or not self.can_skip:
                raise self._error(step, counts, weights_are_bad)
            self.skipped += 1
        elif counts[EMPTY]:  # nothing was learnt: momentum and decay move no weight either
            self.empty += 1
            verdict.is_skipped = True
        elif (self.can_skip or self.can_be_empty) and self.losses:
            self.accepted += 1
            self.accepted_loss = self.accepted_loss + torch.stack(self.losses).sum()
        return verdict

    def _error(self, step: int, counts: list[float], weights_are_bad: bool) -> Exception:
        kind = next(kind for kind in SIDES if counts[kind])
        own = {
            row
            for rows, flags in zip(self.rows, self.flags, strict=True)
            if kind == GRADIENT or bool(flags[kind])
            for row in rows
        }
        rows = sorted(set(gather_object(list(own))))
        if kind == WEIGHTS:
            return ValueError(
                "GOLDTrainer: token_weighting must return weights that are finite and not "
                f"negative, got others in step {step}, dataset rows {_some(rows)}; the step was "
                "not taken: clamp them."
            )
        side, remedy = SIDES[kind], REMEDIES[kind]
        if weights_are_bad:
            side = "the student's weights"
            remedy = "lower learning_rate and resume from a checkpoint of before"
        return NonFiniteError(
            f"GOLDTrainer: step {step} must have finite values, got NaN or inf in {side}, dataset "
            f"rows {_some(rows)}; the step was not taken. {remedy[0].upper()}{remedy[1:]}; "
            "on_nonfinite='skip' leaves such steps out and counts them."
        )

    def loss_to_log(self, loss: Tensor) -> Tensor:
        """The Trainer sums losses up: a step that is left out must not make the sum NaN."""
        return torch.where(torch.isfinite(loss), loss, 0) if self.can_skip else loss

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        """The log with what it says of steps left out; its loss is the mean of the others. Where
        there are no others it has none.
        """
        if self.can_skip:
            logs = {**logs, "nonfinite_steps": float(self.skipped)}
        if self.skipped or self.empty:
            loss = self.accelerator.reduce(self.accepted_loss, reduction="mean").item()
            mean = {"loss": loss / self.accepted} if self.accepted else {}
            logs = {name: value for name, value in logs.items() if name != "loss"} | mean
        self.start_log()
        return logs

    def check_weights(self, model: nn.Module, target: Any) -> None:
        """NonFiniteError instead of saving what no one can use. Whole weights are the same on all
        ranks, one of which may save them by itself.
        """
        is_in_parts = sharding.is_sharded(model) or sharding.tp_size(model) > 1
        accelerator = self.accelerator if is_in_parts else None
        if has_nonfinite(trained(model), accelerator, self.args.device):
            raise NonFiniteError(
                f"GOLDTrainer: weights must be finite to be saved, got NaN or inf; {target} was "
                "not written. Lower learning_rate and resume from a checkpoint of before."
            )


def is_bad(values: Tensor) -> Tensor:
    """(): whether there is a NaN or inf; in one pass, without a tensor of their size."""
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=values.device)
    return ~torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all()


def has_nonfinite(
    tensors: Iterable[Tensor],
    accelerator: Accelerator | None,  # None: this rank is not asked together with others
    device: torch.device,
) -> bool:
    """Whether any rank has a NaN or inf; waits for the device."""
    bad = [is_bad(tensor).to(device) for tensor in tensors]
    count = torch.stack(bad).any().float() if bad else torch.zeros((), device=device)
    if accelerator is not None:
        count = accelerator.reduce(count, reduction="sum")
    return count.item() > 0


def trained(model: nn.Module) -> Iterator[Tensor]:
    """What training changes; of sharded weights the part of this rank."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            yield parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _some(rows: list[int]) -> str:
    text = ", ".join(map(str, rows[:MOST_NAMED])) or "unknown"
    return text if len(rows) <= MOST_NAMED else f"{text} and {len(rows) - MOST_NAMED} more"
