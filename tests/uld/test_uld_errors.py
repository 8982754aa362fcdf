"""Every wrong input of the ULD losses is a ValueError that names the function, what was expected,
what came and the remedy; and uld_loss, which takes logits.
"""

import pytest
import torch

from gold_kernels import (
    FusedLinearULDLoss,
    VocabOverlap,
    fused_linear_uld,
    uld_loss,
)
from gold_kernels.uld import reference as reference_uld
from support.error_budget import relative_error
from support.uld_cases import uld_case

LABELS = torch.arange(4)
OVERLAP = VocabOverlap(torch.arange(3), torch.arange(3), 10, 12)


def call(**changes):
    """fused_linear_uld on 4 pairs of rows with V_s = 10 and V_t = 12, changed."""
    tensors = {
        "student_hidden": torch.randn(4, 8),
        "student_weight": torch.randn(10, 8),
        "teacher_hidden": torch.randn(4, 6),
        "teacher_weight": torch.randn(12, 6),
    }
    return fused_linear_uld(**{**tensors, **changes})


@pytest.mark.parametrize(
    ("changes", "expected", "remedy"),
    [
        ({"teacher_hidden": torch.randn(5, 6)}, "got N_s=4 and N_t=5", "CompletionAligner"),
        ({"student_hidden": torch.randn(4, 7)}, "got D=7 and D=8", "lm_head.weight"),
        ({"teacher_hidden": torch.randn(4, 6).double()}, "float64 needs both sides", "cast the"),
        ({"row_weights": torch.ones(3)}, r"\(G,\) = \(4,\).*got \(3,\)", "student_base_rows"),
        ({"row_weights": torch.ones(4, dtype=torch.int64)}, "float tensor", "one weight"),
        ({"student_temperature": 0.0}, "temperature must be positive.*got 0.0", "1.0 leaves"),
        ({"teacher_temperature": -1.0}, "temperature must be positive.*got -1.0", "1.0 leaves"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\].*got 1.5", "0.5 is"),
        ({"matched_weight": 1.0}, "both or not at all, got 1.0 and None", "share"),
        ({"matched_weight": 1.0, "unmatched_weight": 1.0}, "without an overlap", "from_tokenizers"),
        (
            {"overlap": OVERLAP, "matched_weight": -1.0, "unmatched_weight": 1.0},
            r"matched_weight must be in \[0, 1e\+20\], got -1.0",
            "0 leaves",
        ),
        (
            {"overlap": OVERLAP._replace(student_vocab_size=11)},
            "11 and 12 entries, got heads of V_s=10 and V_t=12",
            "tokenizers of these models",
        ),
        ({"label_weights": torch.ones(4)}, "labels=None", "as labels"),
        (
            {"labels": torch.ones(3, dtype=torch.int64)},
            r"\(N,\) = \(4,\), one per row, already shifted, got \(3,\)",
            "use",
        ),
        (
            {"labels": torch.ones(4, dtype=torch.int64), "label_weights": torch.ones(3)},
            r"label_weights .* \(N,\) = \(4,\), got \(3,\)",
            "one weight per",
        ),
        (
            {"labels": LABELS, "label_weights": torch.ones(4, requires_grad=True)},
            "label_weights must not require a gradient, got requires_grad=True",
            r"label_weights\.detach",
        ),
        (
            {"labels": LABELS, "label_weights": torch.ones(4, device="meta")},
            "label_weights must be on cpu .* got meta",
            "move them",
        ),
        ({"labels": LABELS.to("meta")}, "labels must be on cpu .* got meta", "move them"),
        ({"chunk_size": 0}, "1 at least, got 0", "None"),
        ({"budget_bytes": 0}, "budget_bytes must be at least 1, got 0", "default"),
        ({"backend": "cuda"}, "backend", "triton"),
    ],
)
def test_wrong_input_is_an_error_with_a_remedy(changes, expected, remedy):
    call()
    with pytest.raises(ValueError, match=rf"(?s)^fused_linear_uld: .*{expected}.*{remedy}"):
        call(**changes)


def test_an_alignment_of_other_completions_is_an_error():
    alignment = uld_case("bayesian").options["alignment"]
    with pytest.raises(
        ValueError, match=r"of 10 student and 8 teacher rows, got.* 4 and 4; gather"
    ):
        call(alignment=alignment)


def test_the_module_checks_its_weights_when_it_is_built():
    with pytest.raises(ValueError, match=r"^FusedLinearULDLoss: .* without an overlap"):
        FusedLinearULDLoss(matched_weight=1.0, unmatched_weight=0.0)


@pytest.mark.parametrize("has_overlap", [False, True])
def test_uld_loss_on_logits_is_the_oracle(has_overlap):
    case = uld_case(has_overlap=has_overlap)
    hidden, weight, teacher, teacher_weight, row_weights = case.tensors
    options = {k: v for k, v in case.options.items() if k != "alignment"}
    logits = [(hidden @ weight.T).requires_grad_() for _ in range(2)]
    teacher_logits = teacher @ teacher_weight.T
    loss, metrics = uld_loss(logits[0], teacher_logits, row_weights, return_metrics=True, **options)
    oracle = reference_uld.uld_loss(logits[1], teacher_logits, row_weights, **options)
    torch.testing.assert_close((metrics.loss * row_weights).sum(), loss.detach())
    assert relative_error(loss, oracle) < 1e-12
    grads = [torch.autograd.grad(*pair)[0] for pair in ((loss, logits[0]), (oracle, logits[1]))]
    assert relative_error(*grads) < 1e-12


def test_uld_loss_checks_its_input():
    with pytest.raises(ValueError, match=r"^uld_loss: student_logits must be \(N, V\)"):
        uld_loss(torch.randn(2, 3, 4), torch.randn(6, 4))
    with pytest.raises(ValueError, match=r"^uld_loss: .*same N rows, got N=2 and N=3"):
        uld_loss(torch.randn(2, 4), torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"^uld_loss: .* one column, got V_s=4 and V_t=0"):
        uld_loss(torch.randn(2, 4), torch.randn(2, 0))


def test_a_second_derivative_is_refused():
    hidden = torch.randn(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(call(student_hidden=hidden), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="a loss has no second derivative"):
        grad.sum().backward()
