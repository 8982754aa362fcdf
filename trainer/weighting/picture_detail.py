"""Weights from what the detail of a picture tells the teacher: VA-OPD.

N scored tokens, B completions. Visual-Advantage On-Policy Distillation (Liu et al. 2026,
arXiv 2605.21924) was read in its abstract and in the notes that its authors publish with their code
(github.com/handsome-rich/VA-OPD, docs/reproduction.md), which number the equations; the equations
of the paper itself could not be read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from gold_trainer.batches import Example
from gold_trainer.weighting.tokens import ScoredTokens

EPS = 1e-6  # beside a standard deviation


@dataclass(frozen=True)
class PictureDetail:
    """A token's visual advantage is what the detail of the pictures adds to its log-probability:

        VA_t = max(0, log p(y_t | picture, y_<t) - log p(y_t | picture without detail, y_<t))

    p is the teacher. Of the T tokens of a completion the ceil(high_fraction T) with the largest VA
    are its high group, the others its low group. The high group gets high_weight of the weight of
    the completion, the low group the rest, each in even parts:

        w_t = T high_weight / T_high,    w_t = T (1 - high_weight) / T_low

    so that the mean of w over a completion is 1; where no token is low, all weights are 1. The
    completions of a prompt in the micro-batch (num_generations) share the weight of all their
    tokens by the softmax of (mean VA - m) / (s + 1e-6) / temperature, m and s the mean and the
    standard deviation of the mean VA over these completions; temperature=None leaves them alike.

    Taken from the paper: VA (eq. 2), the softmax over the completions of a prompt (eq. 3 and 4),
    the two groups (eq. 5 and 6), the numbers that are the defaults here, pictures that lose their
    detail by a bilinear reduction of each side to a tenth and a nearest enlargement. Chosen here:
    prompts count by their tokens, as in all of this trainer (in the paper each counts alike); rows
    without pictures have weight 1, and videos keep their detail; completions of another source than
    the student are weighed too; max_weight. Of equal VA the earlier token is the higher. With two
    tokenizers a group's VA is that of its bytes, in even parts to its tokens.
    """

    name: ClassVar[str] = "picture_detail"

    high_fraction: float = 0.2
    high_weight: float = 0.5
    temperature: float | None = 1.0
    scale: float = 0.1  # of each side of a picture that loses its detail
    max_weight: float | None = None  # what larger weights become

    def check(self) -> None:
        ranges = {
            "high_fraction": (0 < self.high_fraction <= 1, "in (0, 1]"),
            "high_weight": (0 <= self.high_weight <= 1, "in [0, 1]"),
            "temperature": (_is_positive_or_none(self.temperature), "positive, or None"),
            "scale": (0 < self.scale < 1, "in (0, 1)"),
            "max_weight": (_is_positive_or_none(self.max_weight), "positive, or None"),
        }
        for name, (is_fine, must_be) in ranges.items():
            if not is_fine:
                default = type(self).__dataclass_fields__[name].default
                raise ValueError(
                    f"GOLDConfig: token_weighting_kwargs: {name} of picture_detail must be "
                    f"{must_be}, got {getattr(self, name)!r}; the default is {default}."
                )

    def __call__(self, tokens: ScoredTokens) -> Tensor:  # (N,)
        detailed = tokens.teacher_log_probs()
        advantage = (detailed - tokens.teacher_log_probs_without_detail()).clamp_min(0)
        examples = tokens.batch.teacher.examples
        has_picture = tokens.to_device(torch.tensor([bool(e.images) for e in examples]))
        of = tokens.completions
        counts = torch.zeros(len(examples), dtype=torch.float64, device=of.device)
        counts.index_add_(0, of, tokens.is_compared.double())
        weights = self.groups(advantage, of, tokens.is_compared, counts)
        if self.temperature is not None:
            prompts = tokens.to_device(_prompts([(e.index, e.turn) for e in examples]))
            factors = self.shares(advantage, of, counts, prompts, has_picture)
            weights = weights * factors[of]
        weights = torch.where(has_picture[of] & tokens.is_compared, weights, 1)
        return weights if self.max_weight is None else weights.clamp_max(self.max_weight)

    def groups(
        self,
        advantage: Tensor,  # (N,)
        of: Tensor,  # (N,) the completion of each
        is_compared: Tensor,  # (N,)
        counts: Tensor,  # (B,) float64 tokens that are compared
    ) -> Tensor:  # (N,)
        """Weights of tokens by the high and the low group of each completion."""
        by_advantage = torch.where(is_compared, advantage, -1).argsort(stable=True, descending=True)
        order = by_advantage[of[by_advantage].argsort(stable=True)]
        lengths = torch.zeros_like(counts).index_add_(0, of, torch.ones_like(of).double())
        starts = lengths.cumsum(0) - lengths
        ranks = torch.empty_like(advantage, dtype=torch.float64)
        ranks[order] = torch.arange(len(of), device=of.device) - starts[of[order]]
        num_high = (self.high_fraction * counts - 1e-9).ceil()  # of 0.1 * 30 = 3.0000000000000004
        num_low = counts - num_high
        high = counts * self.high_weight / num_high.clamp_min(1)
        low = counts * (1 - self.high_weight) / num_low.clamp_min(1)
        weights = torch.where(ranks < num_high[of], high[of], low[of])
        return torch.where(num_low[of] > 0, weights, 1).to(advantage.dtype)

    def shares(
        self,
        advantage: Tensor,  # (N,)
        of: Tensor,  # (N,)
        counts: Tensor,  # (B,) float64
        prompts: Tensor,  # (B,) which prompt each completes, in [0, B)
        has_picture: Tensor,  # (B,)
    ) -> Tensor:  # (B,)
        """A completion's share of the weight of its prompt's tokens, over its share of these
        tokens.
        """
        temperature = self.temperature
        assert temperature is not None, "completions of a prompt are weighed"

        def over_siblings(values: Tensor) -> Tensor:  # (B,) -> (B,) the sum at each
            return torch.zeros_like(values).index_add_(0, prompts, values)[prompts]

        is_one = (counts > 0) & has_picture
        means = torch.zeros_like(counts).index_add_(0, of, advantage.double())
        means = means / counts.clamp_min(1)
        number = over_siblings(is_one.double()).clamp_min(1)
        centred = torch.where(is_one, means - over_siblings(means * is_one) / number, 0)
        deviation = (over_siblings(centred.square()) / number).sqrt()
        scores = centred / (deviation + EPS) / temperature
        there = torch.where(is_one, scores, -torch.inf)
        largest = torch.full_like(scores, -torch.inf).scatter_reduce(0, prompts, there, "amax")
        odds = torch.where(is_one, (scores - largest[prompts]).exp(), 0)
        softmax = odds / over_siblings(odds).clamp_min(1e-300)
        tokens = over_siblings(counts * is_one)
        return (softmax * tokens / counts.clamp_min(1)).to(advantage.dtype)

    def without_detail(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with pictures of the same sizes, of which the detail is gone. One that
        several have stays one: completions of a prompt share it (speed/shared_prompts.py).
        """
        found = {id(image): image for example in examples for image in example.images}
        made = {key: coarse(image, self.scale) for key, image in found.items()}
        return [replace(e, images=[made[id(image)] for image in e.images]) for e in examples]


def coarse(image: Image.Image, scale: float) -> Image.Image:
    """The picture in squares of one colour, 1 / scale pixels wide."""
    size = tuple(max(1, int(side * scale)) for side in image.size)
    small = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _prompts(keys: Sequence[tuple[int, int | None]]) -> Tensor:  # (B,) int64 in [0, B)
    numbers: dict[tuple[int, int | None], int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def _is_positive_or_none(value: float | None) -> bool:
    return value is None or 0 < value < math.inf
