"""Losses over one vocabulary, by name. A file in this folder is a loss; nothing else lists it.

docs/add_a_loss.md shows how to write one.
"""

import dataclasses
import difflib
import importlib
import pkgutil
from typing import Any

import torch

from gold_kernels.engine.row_loss import ROW_LOSSES, RowLoss
from gold_kernels.jsd.row_loss import JSD
from gold_kernels.losses.formula import FormulaLoss

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

LOSSES: dict[str, type[RowLoss]] = {
    name: loss for name, loss in sorted(ROW_LOSSES.items()) if loss.is_shared
}

__all__ = ["JSD", "LOSSES", "FormulaLoss", "make_loss"]


def make_loss(name: str, **numbers: float | tuple[float, float]) -> RowLoss:
    """The loss of this name with its numbers, checked: make_loss("skew_kl", alpha=0.1)."""
    if not isinstance(name, str) or name not in LOSSES:
        near = difflib.get_close_matches(str(name), LOSSES, 1)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"make_loss: name must be one of {', '.join(LOSSES)}, got {name!r}{meant}")
    known = _numbers_of(name)
    for given in numbers:
        if given not in known:
            raise ValueError(
                f"make_loss: the numbers of {name} are {', '.join(known)}, got {given}=; leave it "
                "out."
            )
    loss = LOSSES[name](**numbers)
    loss.check(f"make_loss({name!r})")
    return loss


@torch.compiler.assume_constant_result  # torch.compile cannot ask a class for its fields
def _numbers_of(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(LOSSES[name])]


def __getattr__(name: str) -> Any:
    """The class of any loss in this folder: gold_kernels.losses.SkewKL."""
    for loss in LOSSES.values():
        if loss.__name__ == name:
            return loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
