"""What fused_linear_jsd takes of memory and what it reads of it.

N scored rows, V vocabulary, D_s and D_t hidden sizes.
"""

import pytest
import torch

from gold_kernels import fused_linear_jsd, fused_linear_uld, jsd_loss, peak_extra_bytes
from support.backends import IMPLEMENTATIONS, on_every_backend
from support.jsd_cases import (
    Case,
    random_case,
    run_fused,
)


@on_every_backend
def test_nothing_is_read_before_it_is_written(device, backend):
    case = random_case(n=11).to(torch.float32, device)
    expected = run_fused(case, chunk_size=4, backend=backend)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        assert torch.empty(3).isnan().all()
        actual = run_fused(case, chunk_size=4, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, truth in zip(actual, expected, strict=True):
        assert torch.equal(ours, truth)


def memory_bound(n: int, v: int, d_s: int, chunk_size: int, has_frozen_head: bool) -> int:
    """README's formula for float32 inputs: buffers, grad_hidden, grad_weight, row-function
    blocks.
    """
    buffers = chunk_size * v * (4 + 4)
    returned = 4 * n * d_s + (0 if has_frozen_head else 4 * v * d_s)
    row_function = 18 * 4 * max(v, 1 << 15) + 64 * n
    return buffers + 2 * returned + chunk_size * d_s * 4 + row_function


@pytest.mark.parametrize("has_frozen_head", [False, True])
@pytest.mark.parametrize("n", [256, 1024])
def test_peak_memory_stays_under_the_printed_formula(n, has_frozen_head):
    v, d = 4096, 32
    case = random_case(n, v, d, d).to(torch.float32)
    case.student_weight.requires_grad_(not has_frozen_head)

    def step() -> None:
        fused_linear_jsd(*case, chunk_size=64).backward()
        case.student_hidden.grad = case.student_weight.grad = None

    peak = peak_extra_bytes(step)
    assert peak <= memory_bound(n, v, d, 64, has_frozen_head)
    full_logits = 2 * 4 * n * v
    assert n == 256 or peak < full_logits, "the bound must be below what eager code needs"


@pytest.mark.parametrize("fused", [fused_linear_jsd, fused_linear_uld])
def test_the_gradient_of_a_padded_head_is_made_in_place(fused):
    """Not copied into a second one, which autograd does with the gradient of a slice."""
    v, padding = 4096, 64
    peaks = []
    for num_padded in (0, padding):
        sizes = (v + num_padded, 16, 16)
        case = random_case(8, *sizes).to(torch.float32)
        vocab_size = (v, v) if fused is fused_linear_uld else v

        def step(case: Case = case, vocab_size: object = vocab_size) -> None:
            fused(*case, vocab_size=vocab_size, backend="torch").backward()

        peaks.append(peak_extra_bytes(step))
    assert case.student_weight.grad[:v].any() and not case.student_weight.grad[v:].any()
    assert peaks[1] <= peaks[0] + 3 * padding * 16 * 4, "more than the rows that pad it"


# the interpreter works on copies of its tensors
@pytest.mark.parametrize(
    ("device", "backend"), [where for where in IMPLEMENTATIONS if where != ("cpu", "triton")]
)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_backward_pass_that_frees_the_graph_makes_no_second_gradient(scale, device, backend):
    case = random_case(8, 4096, 64, 64).to(torch.float32, device)
    expected = run_fused(case, backend=backend)
    loss = fused_linear_jsd(*case, backend=backend) * scale
    peak = peak_extra_bytes(loss.backward, device)
    assert peak < case.student_weight.nbytes // 2
    for leaf, grad in zip(case[:2], expected[1:], strict=True):
        assert torch.equal(leaf.grad, grad * scale)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_backward_pass_to_logits_makes_no_second_gradient(scale):
    student, teacher = torch.randn(2, 32, 1024).unbind(0)
    leaf = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(jsd_loss(leaf, teacher, backend="torch"), leaf)
    loss = jsd_loss(leaf, teacher, backend="torch") * scale
    assert peak_extra_bytes(loss.backward) < leaf.nbytes // 2
    assert torch.equal(leaf.grad, expected * scale)


@on_every_backend
def test_gradients_of_a_graph_that_is_kept_are_nobody_elses(device, backend):
    case = random_case().to(torch.float32, device)
    loss = fused_linear_jsd(*case, backend=backend)
    first = torch.autograd.grad(2 * loss, case[:2], retain_graph=True)
    for grad in first:  # as clipping does
        grad.mul_(0)
    last = torch.autograd.grad(4 * loss, case[:2])
    for ours, truth in zip(last, run_fused(case, backend=backend)[1:], strict=True):
        assert truth.any() and torch.equal(ours, 4 * truth)


@pytest.mark.gpu
def test_no_host_sync_on_the_gpu():
    case = random_case().to(torch.bfloat16, "cuda")
    run_fused(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_fused(case, chunk_size=10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_row_offsets_beyond_two_to_the_31():
    case = random_case(n=9000, v=250_000, d_s=8, d_t=8).to(torch.bfloat16, "cuda")
    loss, metrics = fused_linear_jsd(*case, chunk_size=9000, return_metrics=True)
    tail = Case(case[0][-4:], case[1], case[2][-4:], case[3])
    torch.testing.assert_close(metrics.loss[-4:].mean(), run_fused(tail)[0].detach())
    assert torch.isfinite(loss)
