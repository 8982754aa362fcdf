"""NaN of a model is NaN of the loss, on every backend: a guard behind the loss has to see it.

The kernels took NaN for a masked column, and gave a finite loss of a broken teacher.
"""

from functools import partial

import pytest
import torch

from gold_kernels import (
    TokenAlignment,
    VocabOverlap,
    fused_linear_chunk_likelihood,
    fused_linear_jsd,
    fused_linear_loss,
    fused_linear_projected_jsd,
    fused_linear_uld,
)
from gold_kernels.losses import LOSSES, make_loss
from gold_kernels.tokens.alignment import SpanGroups
from support.backends import on_every_backend
from support.same_tokens import same_projection, same_tokens

V, N = 6, 3
ROWS = torch.arange(N)
CALLS = {
    **{name: partial(fused_linear_loss, make_loss(name)) for name in LOSSES},
    "forward_kl": partial(fused_linear_jsd, beta=0.0),
    "reverse_kl": partial(fused_linear_jsd, beta=1.0),
    "uld": fused_linear_uld,
    "hybrid": partial(fused_linear_uld, overlap=VocabOverlap(ROWS, ROWS, V, V)),
    "likelihood": partial(fused_linear_chunk_likelihood, alignment=same_tokens(ROWS)),
    "projected": partial(fused_linear_projected_jsd, projection=same_projection(V)),
}


@on_every_backend
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", CALLS)
def test_nan_of_one_row_is_nan_of_the_loss(name, side, device, backend):
    student, teacher = (torch.randn(N, 4, device=device) for _ in range(2))
    heads = [torch.randn(V, 4, device=device) for _ in range(2)]
    (student if side == "student" else teacher)[1] = torch.nan
    loss = CALLS[name](student, heads[0], teacher, heads[1], backend=backend)
    assert loss.isnan()


def merged(merge):
    """Two groups: of one token on either side, and of two of the student and one of the teacher."""
    groups = SpanGroups(torch.tensor([0, 1, 1]), torch.tensor([0, 1, -1]), 2, 9)
    return TokenAlignment.from_groups(groups, ROWS, ROWS, 9, merge=merge)


MERGED = {
    "uld": ("bayesian", fused_linear_uld),
    "observed": ("observed", CALLS["hybrid"]),
    "hybrid": ("bayesian", CALLS["hybrid"]),
    "matched alone": (
        "bayesian",
        partial(CALLS["hybrid"], matched_weight=1.0, unmatched_weight=0.0, beta=0.0),
    ),
    "likelihood": ("bayesian", fused_linear_chunk_likelihood),
    "projected": ("bayesian", CALLS["projected"]),
}


@on_every_backend
@pytest.mark.parametrize("name", MERGED)
def test_nan_of_any_token_of_a_merged_group_is_nan_of_the_loss(name, device, backend):
    """The least and the largest probability of a group's bytes stood in the place of NaN."""
    merge, function = MERGED[name]
    for side, row in (("student", 1), ("student", 2), ("teacher", 1)):
        hidden = {of: torch.randn(N, 4, device=device) for of in ("student", "teacher")}
        heads = [torch.randn(V, 4, device=device) for _ in range(2)]
        given = hidden["student"], heads[0], hidden["teacher"], heads[1]
        hidden[side][row] = torch.nan
        assert function(*given, alignment=merged(merge), backend=backend).isnan(), (side, row)


@on_every_backend
def test_nan_of_a_row_with_a_label_alone_is_nan_of_the_loss(device, backend):
    student, head = torch.randn(N, 4, device=device), torch.randn(V, 4, device=device)
    teacher, student[1] = student.clone(), torch.nan
    zeros, labels = torch.zeros(N, device=device), ROWS.to(device)
    options = {"labels": labels, "backend": backend}
    for fused in (fused_linear_jsd, fused_linear_uld):
        assert fused(student, head, teacher, head, zeros, **options).isnan()


@on_every_backend
@pytest.mark.parametrize("name", ["jsd", "uld", "hybrid", "likelihood", "projected"])
def test_values_of_a_row_of_weight_0_are_0_whatever_it_holds(name, device, backend):
    student, teacher = (torch.randn(N, 4, device=device) for _ in range(2))
    heads = [torch.randn(V, 4, device=device) for _ in range(2)]
    student[1] = teacher[1] = torch.nan
    given = student, heads[0], teacher, heads[1]
    options = {"row_weights": torch.tensor([1.0, 0.0, 1.0], device=device), "backend": backend}
    loss, rows = CALLS[name](*given, **options, return_metrics=True)
    rows = rows if isinstance(rows, dict) else rows._asdict()
    values = {key: part for key, part in rows.items() if part is not None}
    assert loss.isfinite() and len(values) >= 1
    for key, part in values.items():
        assert part.isfinite().all() and part[1] == 0, key
