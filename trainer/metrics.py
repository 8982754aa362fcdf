"""Metrics of a logging window, summed on the device and read once per log."""

import time

import torch
from torch import Tensor

from gold_kernels import JSDMetrics

COUNTS = ("tokens", "completions")
VALUES = JSDMetrics._fields
POLICIES = ("off_policy", "on_policy")


class MetricWindow:
    """Sums since the last log, one row a policy: counts on the host, values on the device."""

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
        self.counts = torch.zeros(len(POLICIES), len(COUNTS))
        self.values: list[Tensor | None] = [None for _ in POLICIES]  # (len(VALUES),) each

    def add(self, metrics: JSDMetrics, num_completions: int, is_on_policy: bool) -> None:
        """Add one micro-batch; no host sync."""
        policy = int(is_on_policy)
        self.counts[policy] += torch.tensor([metrics.loss.shape[0], num_completions])
        sums = torch.stack([value.sum() for value in metrics])
        before = self.values[policy]
        self.values[policy] = sums if before is None else before + sums

    def sums(self, device: torch.device) -> Tensor:
        """(len(POLICIES), len(COUNTS) + len(VALUES)) of this rank, on the device."""
        zero = torch.zeros(len(VALUES), device=device)
        values = torch.stack([zero if value is None else value for value in self.values])
        return torch.cat([self.counts.to(device), values], dim=1)

    def means(self, sums: Tensor) -> dict[str, float]:
        """Means over scored tokens from the sums of all ranks; starts the next window."""
        now = time.perf_counter()
        seconds = now - (now if self.started is None else self.started)
        self.reset()
        self.started = now
        rows = sums.cpu().double()
        tokens, completions, *values = rows.sum(0).tolist()
        result = dict(zip(VALUES, (value / max(tokens, 1) for value in values), strict=True))
        for policy, (num_tokens, _, loss, *_) in zip(POLICIES, rows.tolist(), strict=True):
            if num_tokens:
                result[f"{policy}_loss"] = loss / num_tokens
        result["completion_length"] = tokens / max(completions, 1)
        if seconds > 0:
            result["tokens_per_second"] = tokens / seconds
        return result
