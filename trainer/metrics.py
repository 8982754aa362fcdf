"""Metrics of a logging window, summed on the device and read once per log."""

import time

import torch
from torch import Tensor

from gold_kernels import JSDMetrics

POLICIES = ("off_policy", "on_policy")


class MetricWindow:
    """Sums since the last log, one row a policy: counts on the host, values on the device."""

    COUNTS: tuple[str, ...] = ("tokens", "completions")
    VALUES: tuple[str, ...] = JSDMetrics._fields

    def __init__(self) -> None:
        self.started: float | None = None
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
        self.counts = torch.zeros(len(POLICIES), len(self.COUNTS))
        self.values: list[Tensor | None] = [None for _ in POLICIES]  # (len(self.VALUES),) each

    def add(self, metrics: JSDMetrics, num_completions: int, is_on_policy: bool) -> None:
        """Add one micro-batch; no host sync."""
        sums = torch.stack([value.sum() for value in metrics])
        self._add([metrics.loss.shape[0], num_completions], sums, is_on_policy)

    def _add(self, counts: list[int], sums: Tensor, is_on_policy: bool) -> None:
        policy = int(is_on_policy)
        self.counts[policy] += torch.tensor(counts)
        before = self.values[policy]
        self.values[policy] = sums if before is None else before + sums

    def sums(self, device: torch.device) -> Tensor:
        """(len(POLICIES), len(COUNTS) + len(VALUES)) of this rank, on the device."""
        zero = torch.zeros(len(self.VALUES), device=device)
        values = torch.stack([zero if value is None else value for value in self.values])
        return torch.cat([self.counts.to(device), values], dim=1)

    def means(self, sums: Tensor) -> dict[str, float]:
        """Means from the sums of all ranks; starts the next window."""
        now = time.perf_counter()
        seconds = now - (now if self.started is None else self.started)
        self.reset()
        self.started = now
        rows = sums.cpu().double()
        total, *rows = (
            dict(zip((*self.COUNTS, *self.VALUES), row, strict=True))
            for row in (rows.sum(0).tolist(), *rows.tolist())
        )
        result = self._means(total)
        for policy, row in zip(POLICIES, rows, strict=True):
            if row["tokens"]:
                result[f"{policy}_loss"] = self._means(row)["loss"]
        tokens, completions = total["tokens"], total["completions"]
        result["completion_length"] = tokens / max(completions, 1)
        if seconds > 0:
            result["tokens_per_second"] = tokens / seconds
        return result

    def _means(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over scored tokens."""
        return {name: sums[name] / max(sums["tokens"], 1) for name in self.VALUES}
