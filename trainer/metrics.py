"""Metrics of a logging window, summed on the device and read once per log."""

import math
import time

import torch
from torch import Tensor

from gold_trainer.objectives import Objective

POLICIES = ("off_policy", "on_policy")
AUX_LOSS, AUX_BATCHES = "aux_loss", "aux_batches"  # of routers: its sum over micro-batches


class MetricWindow:
    """Sums since the last log, by name, for each policy: counts on the host, values on the device.

    Every rank has the same names in the same order, also where it has seen no batch: the ranks'
    sums are added up as one tensor.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.count_names = ("tokens", "completions", AUX_BATCHES, *objective.counts)
        self.sum_names = (*objective.sums, AUX_LOSS)
        self.aux_coefficient = 0.0
        self.started: float | None = None
        self.reset()

    def names(self, *, has_aux_loss: bool) -> list[str]:
        """Names of the means that an evaluation has."""
        sums = (*self.count_names, *self.objective.sums)
        means = list(self.objective.means(dict.fromkeys(sums, 1.0)))
        return [*means, AUX_LOSS] if has_aux_loss else means

    def begin(self) -> None:
        """A run begins: what an earlier one has not logged is none of its own."""
        self.started = None
        self.reset()

    def start(self) -> None:
        """Start the clock unless it runs."""
        if self.started is None:
            self.started = time.perf_counter()

    def skip(self, seconds: float) -> None:
        """Leave time out that something else took, an evaluation for instance."""
        if self.started is not None:
            self.started += seconds

    def reset(self) -> None:
        self.counts = [dict.fromkeys(self.count_names, 0) for _ in POLICIES]
        self.values: list[Tensor | None] = [None for _ in POLICIES]  # in the order of the sums
        self.keep()

    def keep(self) -> None:
        """Remember the sums, for the case that the step in front is left out."""
        self.kept = [dict(part) for part in self.counts], list(self.values)

    def restore(self) -> None:
        """Forget what was added since they were kept."""
        self.counts, self.values = self.kept

    def add(self, counts: dict[str, int], sums: dict[str, Tensor], is_on_policy: bool) -> None:
        """Add one micro-batch; no host sync."""
        policy = int(is_on_policy)
        for name, count in counts.items():
            self.counts[policy][name] += count
        zero = torch.zeros_like(next(iter(sums.values())))  # of a sum that this batch has not
        values = torch.stack([sums.get(name, zero) for name in self.sum_names])
        before = self.values[policy]
        self.values[policy] = values if before is None else before + values

    def add_auxiliary(self, loss: Tensor, coefficient: float, is_on_policy: bool) -> None:
        """The routers' loss () of the micro-batch that was added last."""
        policy = int(is_on_policy)
        values = self.values[policy]
        assert values is not None, "a micro-batch was added"
        self.values[policy] = torch.cat([values[:-1], values[-1:] + loss.detach().to(values)])
        self.counts[policy][AUX_BATCHES] += 1
        self.aux_coefficient = coefficient

    def totals(self, device: torch.device) -> Tensor:
        """(len(POLICIES), number of counts and sums) of this rank, on the device."""
        zeros = torch.zeros(len(self.sum_names), device=device)
        values = torch.stack([zeros if part is None else part for part in self.values])
        counts = torch.tensor([list(part.values()) for part in self.counts]).float()
        return torch.cat([counts.to(device), values], dim=1)

    def means(self, totals: Tensor) -> dict[str, float]:
        """Means from the totals of all ranks; starts the next window."""
        now = time.perf_counter()
        seconds = now - (now if self.started is None else self.started)
        self.reset()
        self.started = now
        rows = totals.cpu().double()
        names = (*self.count_names, *self.sum_names)
        total, *policies = (
            dict(zip(names, row, strict=True)) for row in (rows.sum(0).tolist(), *rows.tolist())
        )
        result = self.objective.means(total)
        if not total["tokens"]:  # a mean over nothing is nothing to choose a checkpoint by
            result |= {name: math.nan for name in result if name not in self.count_names}
        for policy, row in zip(POLICIES, policies, strict=True):
            if row["tokens"]:
                result[f"{policy}_loss"] = self.objective.means(row)["loss"]
        if total[AUX_BATCHES]:
            result[AUX_LOSS] = total[AUX_LOSS] / total[AUX_BATCHES]
            result["loss"] += self.aux_coefficient * result[AUX_LOSS]
        num_completions = total["completions"]
        result["completion_length"] = (
            total["tokens"] / num_completions if num_completions else math.nan
        )
        if seconds > 0:
            result["tokens_per_second"] = total["tokens"] / seconds
        return result
