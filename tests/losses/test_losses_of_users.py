"""Losses that users write: what a class gets wrong is said in its name. Sums in place of entries
were broadcast, a pair in a field of one number moved the fields behind it, and log q that was
overwritten gave another gradient.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from gold_kernels import FusedLinearLoss, fused_linear_loss
from gold_kernels.engine.row_loss import RowLoss
from gold_kernels.losses import FormulaLoss

SIDES = [torch.randn(5, 8), torch.randn(20, 8), torch.randn(5, 6), torch.randn(20, 6)]


@dataclass(frozen=True)
class Power(FormulaLoss):
    power: float = 2.0
    name: ClassVar[str] = "power_of_a_user"

    def entries(self, log_q, log_p, log_ratio):
        gap = log_q.exp() - log_p.exp()
        return gap.abs() ** self.power, self.power * gap.abs() ** (self.power - 1) * log_q.exp()


def of_entries(tag, entries):
    """A loss of these entries."""
    attributes = {"name": f"of_a_user_{tag}", "entries": entries}
    return dataclass(frozen=True)(type(tag, (FormulaLoss,), attributes))()


@pytest.mark.parametrize("value", [True, "2", None, torch.tensor(2.0), (1.0, 2.0)])
def test_a_number_of_a_field_is_a_number_of_python(value):
    for call in (lambda loss: fused_linear_loss(loss, *SIDES), FusedLinearLoss):
        with pytest.raises(ValueError, match=r"power must be a number of Python, got .*; pass "):
            call(Power(value))
    assert torch.equal(fused_linear_loss(Power(2), *SIDES), fused_linear_loss(Power(), *SIDES))


@pytest.mark.parametrize(
    ("entries", "got"),
    [
        (lambda self, q, p, r: (q.sum(-1), q), r"\[\(5,\), \(5, 20\)\]"),
        (lambda self, q, p, r: (q, q.sum(-1, keepdim=True)), r"\[\(5, 20\), \(5, 1\)\]"),
        (lambda self, q, p, r: (q.exp(), 0.0), r"\[\(5, 20\), \(\)\]"),
        (lambda self, q, p, r: q.exp(), r"\[\(5, 20\)\]"),
        (lambda self, q, p, r: (q, q, q), r"\[\(\)\]"),
    ],
)
def test_entries_are_two_tensors_of_every_entry(entries, got):
    message = rf"Wrong\.entries: f and s of every entry .* \(5, 20\), got {got}; return both"
    with pytest.raises(ValueError, match=message):
        fused_linear_loss(of_entries("Wrong", entries), *SIDES, backend="torch")


def test_entries_leave_their_arguments_as_they_are():
    overwriting = of_entries("Overwriting", lambda self, q, p, r: (q.exp_(), p.exp()))
    for mode in (torch.enable_grad, torch.no_grad):
        with (
            mode(),
            pytest.raises(ValueError, match=r"Overwriting\.entries: log q, .* in place of"),
        ):
            fused_linear_loss(overwriting, *SIDES, backend="torch")


def test_what_a_class_must_define_is_said():
    class Empty(RowLoss):
        name = "empty_of_a_user"

    class Formless(FormulaLoss):
        name = "formless_of_a_user"

    for loss, method in ((Empty(), "start"), (Formless(), "entries")):
        with pytest.raises(NotImplementedError, match=f"must define {method}; see docs/add_a_loss"):
            fused_linear_loss(loss, *SIDES, backend="torch")
