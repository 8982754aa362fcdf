"""The forward KL as a row loss without a teacher's logits, and the row function that makes means.

C rows of a chunk, D student's hidden size, V vocabulary. See means/linear.py for the mathematics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.chunking import RowFunction
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.products import Projection
from gold_kernels.engine.row_loss import CROSS_ENTROPY, LOSS, RowLoss, Rows
from gold_kernels.uld.group_rows import token_rows_of


class HeadMeans(NamedTuple):
    """What the forward KL of a frozen student head W takes of the teacher P, whose likeliest token
    is y.

    means (N, D) are P W - W_y, entropies (N,) those of P in nats, bias_means (N,) P . bias - bias_y
    (0 without a bias), tokens (N,) int64 the y. Stored in float32: means are differences of nearly
    equal numbers where the student is close.
    """

    means: Tensor  # (N, D) P W - W_y
    entropies: Tensor  # (N,) of P, in nats
    bias_means: Tensor  # (N,) P . bias - bias_y; 0 without a bias
    tokens: Tensor  # (N,) int64 y


@dataclass(frozen=True)
class MeanKL(RowLoss):
    """KL(P || Q) of a frozen student head from HeadMeans of P.

    temperature is the student's; the teacher's is in the means.
    """

    temperature: float = 1.0
    targets: Sequence[Tensor] | None = None  # HeadMeans

    name: ClassVar[str] = "mean_kl"
    value_names: ClassVar[tuple[str, ...]] = (
        *(LOSS, CROSS_ENTROPY, "teacher_entropy", "forward_kl", "top1_agreement"),
    )
    tensor_sizes: ClassVar[dict[str, int]] = {"targets": len(HeadMeans._fields)}
    is_shared: ClassVar[bool] = False  # it is no loss of two heads

    def check(self, function: str) -> None:
        checks.check_one_temperature(function, self.temperature)

    def grad_bound(self) -> float:
        return max(1.0, 1.0 / self.temperature)

    @property
    def teacher(self) -> HeadMeans:
        assert self.targets is not None, "a call has its teacher's means"
        return HeadMeans(*self.targets)

    def projection(self) -> Projection:
        teacher, scale = self.teacher, 1.0 / self.temperature
        return Projection(minus=teacher.means, scale=scale, tokens=teacher.tokens)

    def start(self, rows: Rows) -> RowFunction:
        token_rows_ = token_rows_of(rows.backend)
        student, teacher = rows.student, self.teacher
        assert student is not None, "means belong to a head"

        def row_function(
            logits: Tensor, _: None, grad_logits: Tensor | None, chunk: slice, weights: Tensor
        ) -> None:
            values, tokens = rows.values[:, chunk], teacher.tokens[chunk]
            if rows.has_metrics:
                values[4] = logits.argmax(-1) == tokens
            if weights.shape[1] == 1:
                weights = torch.cat([weights, torch.zeros_like(weights)], 1)
            labels = tokens if rows.labels is None else rows.labels[chunk]
            options = {"temperature": self.temperature, "softcap": None}
            token_rows_(logits, grad_logits, tokens, labels, weights, values[:2], **options)
            hidden = student.rows_of(chunk).to(teacher.means.dtype)
            shift = (hidden * teacher.means[chunk]).sum(-1) + teacher.bias_means[chunk]
            shift = shift * (student.logit_scale / self.temperature)
            is_live = weights[:, 0] != 0  # a row of weight 0 may hold anything
            loss = values[0] - teacher.entropies[chunk] - shift
            values[0] = torch.where(is_live, loss, 0)
            if rows.has_metrics:
                values[2] = torch.where(is_live, teacher.entropies[chunk], 0)
                values[3] = values[0]
                values[4] = torch.where(is_live, values[4], 0)

        return row_function


def mean_rows(
    head: LinearHead,  # the teacher's
    backend: str,
    temperature: float,
    student_bias: Tensor | None,  # (V,)
    targets: HeadMeans,  # whose means are yet to be made; the others are overwritten
) -> RowFunction:
    """Makes P - onehot(y) of the teacher's logits, times the row weights.

    The row kernel's P adds up to 1 but for the rounding of a sum of V numbers: 2e-6 at V = 152k,
    which is 2e-5 nats in the entropy, and in the entry of y, where it is P - 1, as much as the
    gradient near convergence. log p(y) has a small error for any p(y). So that entry is made of it,
    and the other probabilities are divided by their sum.
    """
    token_rows_ = token_rows_of(backend)

    def row_function(
        logits: Tensor, _: None, grad_logits: Tensor | None, chunk: slice, weights: Tensor
    ) -> None:
        assert grad_logits is not None, "means are made of gradients"
        tokens = logits.argmax(-1)
        targets.tokens[chunk] = tokens
        index = tokens.unsqueeze(1)
        values = logits.new_empty(2, len(tokens), dtype=targets.entropies.dtype)
        both = torch.cat([weights, torch.zeros_like(weights)], 1)
        options = {"temperature": temperature, "softcap": None}
        token_rows_(logits, grad_logits, tokens, tokens, both, values, **options)
        log_p = -values[0].double()
        others = -torch.expm1(log_p)  # 1 - p(y)
        shares = grad_logits / (weights / temperature)  # P, without that of y
        shares.scatter_(1, index, 0)
        mass = shares.sum(-1, dtype=torch.float64)
        shares *= torch.where(mass > 0, others / mass, 0).to(shares.dtype).unsqueeze(1)
        entropies = torch.special.entr(shares).sum(-1, dtype=torch.float64)
        targets.entropies[chunk] = (entropies - log_p.exp() * log_p).to(values.dtype)
        shares.scatter_(1, index, -others.to(shares.dtype).unsqueeze(1))
        if student_bias is not None:
            targets.bias_means[chunk] = shares @ student_bias.to(shares.dtype)
        torch.mul(shares, weights / temperature, out=grad_logits)

    return row_function
