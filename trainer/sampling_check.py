"""Whether who writes the student's completions samples from the student as it is.

The log-probabilities that come with sampled tokens are compared with the learner's own, at the same
temperature, top_p and bans. Old weights, other pictures and other prompts show there.

N scored rows of a micro-batch, n of them that are compared, V entries of the head, D hidden size.
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional
from transformers.utils import logging

from gold_trainer.batches import SideInputs
from gold_trainer.logit_form import LogitForm
from gold_trainer.models import Head, whole
from gold_trainer.writers.sampling import logprobs_of
from gold_trainer.writers.writer import Sampling

logger = logging.get_logger(__name__)

NAME = "sampling/sampling_logp_difference"  # TRL's
MOST_ROWS = 64  # of a micro-batch, evenly spread: full rows of logits are made of these alone
LARGE = 0.1  # nats on average; other kernels in bfloat16 make some hundredths


class SamplingCheck:
    """Sums since the last log, on the device."""

    def __init__(self, device: torch.device, *, is_noisy: bool = False) -> None:
        """is_noisy: the learner has dropout or noise that no writer has, so it differs anyway."""
        self.device, self.is_banned = device, torch.empty(0)
        self.is_told = is_noisy
        self.reset()

    def reset(self) -> None:
        self.total = torch.zeros((), device=self.device)
        self.largest = torch.zeros((), device=self.device)
        self.count = 0

    @torch.no_grad()
    def add(
        self,
        hidden: Tensor,  # (N, D) at the scored rows
        head: Head,
        form: LogitForm,
        inputs: SideInputs,
        sampling: Sampling,
    ) -> None:
        """One on-policy micro-batch; no host sync. What cannot be compared is left out: a penalty
        of repetition, or arguments of the writer's own, make another distribution of each token.
        """
        parts = [example.logprobs for example in inputs.examples if not example.is_blank]
        is_known = all(part is not None for part in parts)
        logprobs = [logprob for part in parts for logprob in part or ()]
        num_rows = len(inputs.labels)
        is_other = sampling.repetition_penalty != 1.0 or sampling.generation_kwargs
        if not is_known or len(logprobs) != num_rows or num_rows == 0 or is_other:
            return
        size = min(num_rows, MOST_ROWS)
        places = [i * num_rows // size for i in range(size)]
        theirs = torch.tensor([logprobs[i] for i in places], device=hidden.device)
        rows = torch.tensor(places, device=hidden.device)
        weight, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
        logits = functional.linear(hidden[rows].to(weight.dtype), weight, bias).float()
        logits = form(logits)
        if len(self.is_banned) != logits.shape[1]:
            self.is_banned = sampling.is_banned(logits.shape[1]).to(hidden.device)
        own = logprobs_of(logits, inputs.labels[rows], sampling, self.is_banned)
        difference = (own - theirs).abs()
        self.total += difference.sum()
        self.largest = torch.maximum(self.largest, difference.max())
        self.count += size

    def logs(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean and largest difference on all ranks; starts again."""
        counts = torch.full((), float(self.count), device=self.device)
        sums = accelerator.reduce(torch.stack([self.total, counts]), reduction="sum")
        largest = accelerator.gather(self.largest.reshape(1)).max()
        total, count, most = torch.cat([sums, largest.reshape(1)]).tolist()
        self.reset()
        if not count:
            return {}
        self._warn(total / count)
        return {f"{NAME}/mean": total / count, f"{NAME}/max": most}

    def _warn(self, mean: float) -> None:
        if (mean > LARGE or math.isnan(mean)) and not self.is_told:
            self.is_told = True
            logger.warning(
                "GOLDTrainer: the log-probabilities of rollouts should be the student's own, got "
                "a mean difference of %.3f nats over sampled tokens (sampling_logp_difference): "
                "they were written with other weights, other pictures or another prompt.",
                mean,
            )
