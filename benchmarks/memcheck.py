"""Every kernel once on small shapes that fill no block, for NVIDIA's memory checker:

compute-sanitizer --tool memcheck python benchmarks/memcheck.py
"""

import sys

import torch

from gold_kernels import TokenAlignment, VocabOverlap, fused_linear_jsd, fused_linear_uld
from gold_kernels.alignment import SpanGroups

NUM_ROWS, SIZES = 37, ((1003, 1003), (2051, 2051), (1003, 2051))
D_STUDENT, D_TEACHER = 64, 96


def main() -> int:
    if not torch.cuda.is_available():
        sys.exit("memcheck: a CUDA GPU is expected, got none; the tests run the kernels elsewhere")
    torch.manual_seed(0)
    groups = torch.arange(NUM_ROWS) // 2
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for v_student, v_teacher in SIZES:
            options = {"device": "cuda", "dtype": dtype}
            hidden = torch.randn(NUM_ROWS, D_STUDENT, **options).requires_grad_()
            weight = (0.2 * torch.randn(v_student, D_STUDENT, **options)).requires_grad_()
            teacher = torch.randn(NUM_ROWS, D_TEACHER, **options)
            teacher_weight = 0.2 * torch.randn(v_teacher, D_TEACHER, **options)
            heads = hidden, weight, teacher, teacher_weight
            labels = torch.randint(v_student, (NUM_ROWS,))
            alignment = TokenAlignment.from_groups(
                SpanGroups(groups, groups, int(groups[-1]) + 1, NUM_ROWS), labels, labels, NUM_ROWS
            )
            ids = torch.randperm(v_student)[: v_student // 2].sort().values
            overlap = VocabOverlap(ids, ids, v_student, v_teacher)
            for logits_dtype in (None, torch.bfloat16):
                limits = {"chunk_size": 16, "logits_dtype": logits_dtype}
                if v_student == v_teacher:
                    for beta in (0.0, 0.1, 0.5, 1.0):
                        loss, _ = fused_linear_jsd(*heads, beta=beta, return_metrics=True, **limits)
                        loss.backward()
                for aligned in (None, alignment):
                    for matched in (None, overlap):
                        fused_linear_uld(
                            *heads,
                            alignment=aligned,
                            overlap=matched,
                            labels=labels.cuda(),
                            **limits,
                        ).backward()
    torch.cuda.synchronize()
    sys.stdout.write("every kernel ran\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
