"""Metrics of a logging window, summed on the device and read once per log."""

import time

import torch
from torch import Tensor

from gold_kernels import JSDMetrics

SUMS = (
    "tokens",
    "completions",
    "on_policy_tokens",
    "on_policy_loss",
    "off_policy_tokens",
    "off_policy_loss",
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
)
PER_TOKEN = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl", "top1_agreement")


class MetricWindow:
    """Sums over scored tokens since the last log."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (len(SUMS),) float64 on the device
        self.started = time.perf_counter()

    def add(self, metrics: JSDMetrics, num_completions: int, is_on_policy: bool) -> None:
        """Add one micro-batch; no host sync."""
        num_tokens = metrics.loss.shape[0]
        loss = metrics.loss.sum()
        zero = torch.zeros_like(loss)
        counts = metrics.loss.new_tensor(
            [
                num_tokens,
                num_completions,
                num_tokens * is_on_policy,
                num_tokens * (not is_on_policy),
            ]
        )
        on_loss, off_loss = (loss, zero) if is_on_policy else (zero, loss)
        parts = [counts[0], counts[1], counts[2], on_loss, counts[3], off_loss]
        parts += [getattr(metrics, name).sum() for name in PER_TOKEN]
        sums = torch.stack(parts).double()
        self.sums = sums if self.sums is None else self.sums + sums

    def means(self, sums: Tensor) -> dict[str, float]:
        """Means of the window from sums over all ranks; starts the next window."""
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        now = time.perf_counter()
        tokens = max(total["tokens"], 1.0)
        result = {name: total[name] / tokens for name in PER_TOKEN}
        for policy in ("on_policy", "off_policy"):
            if total[f"{policy}_tokens"]:
                result[f"{policy}_loss"] = total[f"{policy}_loss"] / total[f"{policy}_tokens"]
        result["completion_length"] = total["tokens"] / max(total["completions"], 1.0)
        result["tokens_per_second"] = total["tokens"] / max(now - self.started, 1e-9)
        self.sums, self.started = None, now
        return result
