"""Random heads, alignments and overlaps for the ULD tests, and the oracle's answer to them."""

from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels import TokenAlignment, VocabOverlap, reference
from gold_kernels.tokens.alignment import SpanGroups
from gold_kernels.uld import reference as reference_uld

STUDENT_GROUPS = [0, 0, 1, -1, 2, 2, 2, 3, 4, 4]  # one token in no group
TEACHER_GROUPS = [0, 1, 1, 2, -1, 3, -1, 4]  # group 3 alone is one to one
KINDS = ("pairs", "bayesian", "observed", "late")
# Limits of the counting kernel, which orders what its counts leave open: what is left
# are values that agree to 2**-13 of a bin.
COUNTING_LOSS_ERROR, COUNTING_GRAD_ERROR = 1e-4, 2e-2


class ULDCase(NamedTuple):
    """Tensors of both heads, and the keyword arguments that fused loss and oracle share."""

    tensors: tuple[Tensor, ...]  # student hidden, weight, teacher hidden, weight, row weights
    bias: Tensor  # (V_s,)
    label_weights: Tensor  # (N_s,)
    options: dict

    def run(self, function, dtype: torch.dtype, device: str = "cpu", **options) -> list[Tensor]:
        """Loss and gradients of student hidden, weight and bias."""
        *tensors, row_weights = (t.to(device, dtype) for t in self.tensors)
        bias = self.bias.to(device, dtype).requires_grad_()
        for leaf in tensors[:2]:
            leaf.requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        options = {**self.options, "student_bias": bias, **options}
        if "labels" in options:
            options["labels"] = options["labels"].to(device)
            options["label_weights"] = self.label_weights.to(device, wide)
        loss = function(*tensors, row_weights.to(wide), **options)
        return [loss, *torch.autograd.grad(loss, (*tensors[:2], bias))]

    def hard_loss(self, student_logits: Tensor) -> Tensor:  # (N_s, V_s), to ()
        """The weighed cross-entropy of the labels."""
        labels = self.options["labels"]
        is_label = labels >= 0
        log_q = reference.log_probs(student_logits[is_label], 1.0)
        hard = log_q.gather(1, labels[is_label].unsqueeze(1)).squeeze(1)
        return -(hard * self.label_weights[is_label]).sum()

    def oracle(self) -> list[Tensor]:
        options = {"weight_hard": 1.0} if "labels" in self.options else {}
        return self.run(reference_uld.linear_uld, torch.float64, **options)


def alignment(kind: str, v_student: int, v_teacher: int, generator: torch.Generator):
    if kind == "pairs":
        return None
    groups = [torch.tensor(side) for side in (STUDENT_GROUPS, TEACHER_GROUPS)]
    ids = [
        torch.randint(size, side.shape, generator=generator)
        for size, side in zip((v_student, v_teacher), groups, strict=True)
    ]
    return TokenAlignment.from_groups(
        SpanGroups(*groups, 5, 50),
        *ids,
        50,
        merge="bayesian" if kind == "bayesian" else "observed",
        is_late=kind == "late",
    )


def uld_case(
    kind: str = "pairs",
    *,
    has_overlap: bool = False,
    has_labels: bool = False,
    beta: float = 0.5,
    sizes: tuple[int, int] = (301, 411),
    seed: int = 0,
) -> ULDCase:
    """Logits of standard deviation 1.5; values that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16().double()

    (v_student, v_teacher), (d_student, d_teacher) = sizes, (16, 24)
    align = alignment(kind, v_student, v_teacher, generator)
    num_student = len(STUDENT_GROUPS)
    num_teacher = num_student if align is None else len(TEACHER_GROUPS)
    row_weights = torch.rand(
        num_student if align is None else align.num_groups, generator=generator
    )
    row_weights[2] = 0
    options = {"student_temperature": 1.25, "teacher_temperature": 0.75, "alignment": align}
    if has_overlap:
        num_matched = min(sizes) * 2 // 3
        ids = torch.randperm(v_teacher - 6, generator=generator)[:num_matched]
        shared = VocabOverlap(torch.arange(num_matched), ids, v_student - 1, v_teacher - 6)
        options |= {"overlap": shared, "matched_weight": 0.75, "unmatched_weight": 0.5}
        options["beta"] = beta
    if has_labels:
        options["labels"] = torch.randint(-2, v_student, (num_student,), generator=generator)
    return ULDCase(
        (
            normal(num_student, d_student),
            normal(v_student, d_student, scale=1.5 * d_student**-0.5),
            normal(num_teacher, d_teacher),
            normal(v_teacher, d_teacher, scale=1.5 * d_teacher**-0.5),
            row_weights.double(),
        ),
        normal(v_student, scale=0.5),
        torch.rand(num_student, generator=generator).double(),
        options,
    )
