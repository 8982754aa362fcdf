"""Every kernel of losses of whole heads once, on small shapes that fill no block, for NVIDIA's
memory checker:

compute-sanitizer --tool memcheck python benchmarks/memcheck.py
"""

import sys

import torch
from record import say

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
from gold_kernels.losses import LOSSES, make_loss
from gold_kernels.tokens.alignment import SpanGroups

NUM_ROWS, V_STUDENT, V_TEACHER = 37, 1003, 2051
D_STUDENT, D_TEACHER = 64, 96
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
# dtype, logits_dtype, beta
JSD_CASES = ((BFLOAT16, None, 0.5), (BFLOAT16, BFLOAT16, 0.1), (FLOAT32, None, 0.0))
# dtype, logits_dtype, groups and hybrid or neither: gradients beside the logits and in their place
ULD_CASES = (
    (BFLOAT16, None, False),
    (BFLOAT16, None, True),
    (BFLOAT16, BFLOAT16, True),
    (FLOAT32, None, True),
)


def heads(dtype: torch.dtype, v_teacher: int) -> tuple[torch.Tensor, ...]:
    options = {"device": "cuda", "dtype": dtype}
    return (
        torch.randn(NUM_ROWS, D_STUDENT, **options).requires_grad_(),
        (0.2 * torch.randn(V_STUDENT, D_STUDENT, **options)).requires_grad_(),
        torch.randn(NUM_ROWS, D_TEACHER, **options),
        0.2 * torch.randn(v_teacher, D_TEACHER, **options),
    )


def main() -> int:
    if not torch.cuda.is_available():
        sys.exit("memcheck: a CUDA GPU is expected, got none; the tests run the kernels elsewhere")
    torch.manual_seed(0)
    limits = {"chunk_size": 16}
    for dtype, logits_dtype, beta in JSD_CASES:
        options = {"beta": beta, "logits_dtype": logits_dtype, "return_metrics": True}
        fused_linear_jsd(*heads(dtype, V_STUDENT), **options, **limits)[0].backward()
    targets = torch.arange(NUM_ROWS, device="cuda")
    for name in LOSSES:
        loss = make_loss(name, temperature=(0.7, 1.3))
        fused_linear_loss(loss, *heads(BFLOAT16, V_STUDENT), labels=targets, **limits).backward()
    groups = torch.arange(NUM_ROWS) // 2
    labels = torch.randint(V_STUDENT, (NUM_ROWS,))
    alignment = TokenAlignment.from_groups(
        SpanGroups(groups, groups, int(groups[-1]) + 1, NUM_ROWS), labels, labels, NUM_ROWS
    )
    ids = torch.randperm(V_STUDENT)[: V_STUDENT // 2].sort().values
    overlap = VocabOverlap(ids, ids, V_STUDENT, V_TEACHER)
    merged = {"alignment": alignment, "overlap": overlap, "labels": labels.cuda()}
    for dtype, logits_dtype, is_merged in ULD_CASES:
        options = merged if is_merged else {}
        tensors = heads(dtype, V_TEACHER)
        fused_linear_uld(*tensors, **options, logits_dtype=logits_dtype, **limits).backward()
    tensors = heads(BFLOAT16, V_TEACHER)
    fused_linear_chunk_likelihood(*tensors, alignment, labels=labels.cuda(), **limits).backward()
    columns = torch.randint(V_TEACHER, (V_STUDENT, 4))
    columns[:300, 0] = 5  # folds of folds
    projection = VocabProjection.from_entries(columns, torch.rand(V_STUDENT, 4) + 0.1, V_TEACHER)
    for options in ({}, {"alignment": alignment, "labels": labels.cuda()}):
        tensors = heads(BFLOAT16, V_TEACHER)
        fused_linear_projected_jsd(*tensors, projection, **options, **limits).backward()
    torch.cuda.synchronize()
    say("every kernel of whole heads ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
