"""Arguments of another kind than a loss takes are a ValueError with function, name and remedy, in
every loss; they used to end in errors of torch and Python, or in NaN.

N = 5 rows, V = 20 entries, D = 8 and 6.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from gold_kernels import (
    FusedLinearJSDLoss,
    VocabOverlap,
    fused_linear_chunk_likelihood,
    fused_linear_jsd,
    fused_linear_loss,
    fused_linear_mean_kl,
    fused_linear_projected_jsd,
    fused_linear_top_k,
    fused_linear_uld,
    head_means,
    head_top_k,
    jsd_loss,
    uld_loss,
)
from gold_kernels.losses import LOSSES
from support.same_tokens import same_projection, same_tokens

N, V = 5, 20
HEADS = {
    "student_hidden": torch.randn(N, 8),
    "student_weight": torch.randn(V, 8),
    "teacher_hidden": torch.randn(N, 6),
    "teacher_weight": torch.randn(V, 6),
}
LOGITS = {"student_logits": torch.randn(N, V), "teacher_logits": torch.randn(N, V)}
ROWS = torch.arange(N)
OVERLAP = VocabOverlap(torch.arange(9), torch.arange(9), V, V)
STUDENT = {name: HEADS[name] for name in ("student_hidden", "student_weight")}
TOP = {"teacher_ids": ROWS.unsqueeze(1), "teacher_log_probs": -torch.ones(N, 1)}
TEACHER = {name: tensor for name, tensor in HEADS.items() if name != "student_hidden"}
OWN_TEACHER = {name: HEADS[name] for name in ("teacher_hidden", "teacher_weight")}
MEANS = {"teacher": head_means(**TEACHER)}


def of_one_file(name, temperature=1.0, **arguments):
    """A loss of one file, whose numbers are its own and whose tensors are those of all."""
    numbers = {"alpha": arguments.pop("alpha")} if "alpha" in arguments else {}
    row_loss = LOSSES[name](temperature=temperature, **numbers)
    return fused_linear_loss(row_loss, **arguments)


CALLS = {
    "jsd": (fused_linear_jsd, HEADS),
    **{name: (partial(of_one_file, name), HEADS) for name in LOSSES if name != "jsd"},
    "uld": (fused_linear_uld, HEADS),
    "hybrid": (fused_linear_uld, HEADS | {"overlap": OVERLAP}),
    "likelihood": (fused_linear_chunk_likelihood, HEADS | {"alignment": same_tokens(ROWS)}),
    "projected": (fused_linear_projected_jsd, HEADS | {"projection": same_projection(V)}),
    "top_k": (fused_linear_top_k, STUDENT | TOP),
    "mean_kl": (fused_linear_mean_kl, STUDENT | MEANS),
    "head_means": (head_means, TEACHER),
    "head_top_k": (partial(head_top_k, k=3), OWN_TEACHER),
    "jsd_loss": (jsd_loss, LOGITS),
    "uld_loss": (uld_loss, LOGITS),
}
OF_TEACHERS = ("head_means", "head_top_k")  # what losses take of them
ONE_SIDE = ("top_k", "mean_kl", *OF_TEACHERS)


def refused(name, message, **changes):
    function, arguments = CALLS[name]
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **changes})


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_tensor_is_refused_by_name(name):
    _, arguments = CALLS[name]
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor):
            for other in (value.tolist(), value.numpy(), nn.Linear(8, V), None):
                kind = type(other).__name__
                refused(name, f": {key} must be a tensor, got {kind}; pass ", **{key: other})
    if name not in OF_TEACHERS:
        message = "row_weights must be a tensor, got list; pass torch.as_tensor"
        refused(name, message, row_weights=[1.0] * N)
        refused(name, "labels must be a tensor, got list", labels=list(range(N)))
        refused(name, r"got \(5,\) torch.int32; use labels.long\(\)", labels=ROWS.int())
    if name not in ("jsd_loss", "uld_loss"):
        bias = "teacher_bias" if name == "head_top_k" else "student_bias"
        refused(name, f"{bias} must be a tensor, got list", **{bias: [0.0] * V})


NUMBERS = ("1.0", None, True, np.float32(0.5), torch.tensor(0.5), [1.0, None])


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_number_of_python_is_refused_by_name(name):
    for value in NUMBERS:
        refused(name, r"temperature must be a number of Python, got .*; pass ", temperature=value)
        if name not in ("jsd_loss", "uld_loss"):
            refused(name, "logit_scale must be a number of Python, got ", logit_scale=value)
            refused(name, "got None; pass one, or leave it out", logit_scale=None)
            if value is not None and name != "mean_kl" and not isinstance(value, list):
                refused(name, "softcapping must be a number", final_logit_softcapping=value)
    if name in ONE_SIDE:
        message = r"must be a number of Python, got \(1.0, 2.0\); pass one number, not a pair"
        for key in ("temperature", "logit_scale"):
            refused(name, f"{key} {message}", **{key: (1.0, 2.0)})


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [1e-300, 1e-30, 1e30, 1e300])
def test_numbers_that_float32_makes_zero_or_inf_of_are_refused_where_they_gave_nan(name, value):
    message = r"must be in \[1e-20, 1e\+20\], got .* which float32 cannot"
    refused(name, f"temperature {message}", temperature=value)
    if name not in ("jsd_loss", "uld_loss"):
        refused(name, f"logit_scale without its sign {message}", logit_scale=-value)
        if name != "mean_kl":
            refused(name, f"softcapping {message}", final_logit_softcapping=value)
    function, arguments = CALLS[name]
    for end in (1e-20, 1e20):
        loss = function(**arguments, temperature=end)
        assert torch.as_tensor(loss[0] if isinstance(loss, tuple) else loss).isfinite().all()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("jsd", {"beta": "0.5"}, "beta must be a number of Python, got '0.5'; pass float"),
        ("uld", {"beta": True}, "beta must be a number of Python, got True"),
        ("skew_kl", {"alpha": None}, "alpha must be a number of Python, got None"),
        ("skew_reverse_kl", {"alpha": "a"}, "alpha must be a number of Python"),
        ("likelihood", {"group_temperature": 1e-30}, r"group_temperature must be in \[1e-20"),
        (
            "hybrid",
            {"matched_weight": "1", "unmatched_weight": 1.0},
            "matched_weight must be a num",
        ),
        (
            "hybrid",
            {"matched_weight": 1.0, "unmatched_weight": 1e30},
            "unmatched_weight must be in",
        ),
        ("uld", {"overlap": {}}, "overlap must be a VocabOverlap, got dict; build it"),
        ("uld_loss", {"overlap": {}}, "overlap must be a VocabOverlap, got dict; build it"),
        ("uld", {"alignment": ROWS}, "alignment must be a TokenAlignment, got Tensor; build it"),
    ],
)
def test_numbers_and_tables_of_one_loss_are_refused_by_name(name, changes, message):
    refused(name, message, **changes)


def test_the_module_of_liger_checks_its_weights_and_its_index():
    for name in ("weight_hard_loss", "weight_soft_loss"):
        for value in (float("nan"), -1.0, 1e300):
            with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1e\+20\], got"):
                FusedLinearJSDLoss(**{name: value})
        with pytest.raises(ValueError, match=f"{name} must be a number of Python, got '1'"):
            FusedLinearJSDLoss(**{name: "1"})
    for value in (None, 1.5, 1 << 70):
        with pytest.raises(ValueError, match="ignore_index must be a whole number of 64 bits"):
            FusedLinearJSDLoss(ignore_index=value)
    with pytest.raises(ValueError, match="true_labels must be a tensor, got list"):
        FusedLinearJSDLoss()(*HEADS.values(), list(range(N)))


def test_a_chunk_or_a_budget_beyond_64_bits_is_all_rows_and_all_memory():
    expected = fused_linear_jsd(**HEADS)
    assert torch.equal(fused_linear_jsd(**HEADS, chunk_size=10**30), expected)
    assert torch.equal(fused_linear_jsd(**HEADS, budget_bytes=1e300), expected)
