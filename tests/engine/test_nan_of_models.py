"""NaN of a model is NaN of the loss, on every backend: a guard behind the loss has to see it.

The kernels took NaN for a masked column, and gave a finite loss of a broken teacher.
"""

import pytest
import torch

from gold_kernels import (
    TokenAlignment,
    VocabOverlap,
    VocabProjection,
    fused_linear_chunk_likelihood,
    fused_linear_jsd,
    fused_linear_loss,
    fused_linear_projected_jsd,
    fused_linear_uld,
)
from gold_kernels.losses import SkewKL, SkewReverseKL, TotalVariation
from support.backends import on_every_backend

V, N = 6, 3
ROWS, NONE = torch.arange(N), torch.arange(0)
ALIGNMENT = TokenAlignment(*(ROWS, ROWS, NONE, NONE, NONE) * 2, "bayesian", N, N, 0, 0)
PROJECTION = VocabProjection.from_entries(torch.arange(V).unsqueeze(1), torch.ones(V, 1), V)
OVERLAP = VocabOverlap(ROWS, ROWS, V, V)
LOSSES = {
    "forward_kl": lambda *heads, **o: fused_linear_jsd(*heads, beta=0.0, **o),
    "jsd": fused_linear_jsd,
    "reverse_kl": lambda *heads, **o: fused_linear_jsd(*heads, beta=1.0, **o),
    "skew_kl": lambda *heads, **o: fused_linear_loss(SkewKL(), *heads, **o),
    "skew_reverse_kl": lambda *heads, **o: fused_linear_loss(SkewReverseKL(), *heads, **o),
    "total_variation": lambda *heads, **o: fused_linear_loss(TotalVariation(), *heads, **o),
    "uld": fused_linear_uld,
    "hybrid": lambda *heads, **o: fused_linear_uld(*heads, overlap=OVERLAP, **o),
    "likelihood": lambda *heads, **o: fused_linear_chunk_likelihood(*heads, ALIGNMENT, **o),
    "projected": lambda *heads, **o: fused_linear_projected_jsd(*heads, PROJECTION, **o),
}


@on_every_backend
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", LOSSES)
def test_nan_of_one_row_is_nan_of_the_loss(name, side, device, backend):
    student, teacher = (torch.randn(N, 4, device=device) for _ in range(2))
    heads = [torch.randn(V, 4, device=device) for _ in range(2)]
    (student if side == "student" else teacher)[1] = torch.nan
    loss = LOSSES[name](student, heads[0], teacher, heads[1], backend=backend)
    assert loss.isnan()


@on_every_backend
def test_nan_of_a_row_with_a_label_alone_is_nan_of_the_loss(device, backend):
    student, head = torch.randn(N, 4, device=device), torch.randn(V, 4, device=device)
    teacher, student[1] = student.clone(), torch.nan
    zeros, labels = torch.zeros(N, device=device), ROWS.to(device)
    options = {"labels": labels, "backend": backend}
    for fused in (fused_linear_jsd, fused_linear_uld):
        assert fused(student, head, teacher, head, zeros, **options).isnan()
