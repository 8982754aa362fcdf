"""What a call has beside tensors and numbers: flags, and tables of tokens that were made by hand.

Any text is true in Python; a row in two groups has the gradient of one; an index of another group
or row ends in a loss of other tokens.
"""

from functools import partial

import pytest
import torch

from gold_kernels import (
    FusedLinearJSDLoss,
    FusedLinearLoss,
    FusedLinearULDLoss,
    HeadMeans,
    fused_linear_chunk_likelihood,
    fused_linear_jsd,
    fused_linear_mean_kl,
    fused_linear_top_k,
    fused_linear_uld,
    head_means,
    head_top_k,
    jsd_loss,
    uld_loss,
)
from gold_kernels.losses import JSD, make_loss
from support.uld_cases import uld_case

SIDES = [torch.randn(5, 8), torch.randn(20, 8), torch.randn(5, 8), torch.randn(20, 8)]
TOP = torch.zeros(5, 1, dtype=torch.int64), -torch.ones(5, 1)
CASE = uld_case("bayesian")
ALIGNMENT = CASE.options["alignment"]
OTHERS = "False", None, 1, 0.0


@pytest.mark.parametrize("value", OTHERS)
def test_a_flag_that_is_neither_true_nor_false_is_refused_by_name(value):
    means = head_means(*SIDES[2:], SIDES[1])
    calls = {
        fused_linear_jsd: SIDES,
        fused_linear_uld: SIDES,
        fused_linear_top_k: (*SIDES[:2], *TOP),
        fused_linear_mean_kl: (*SIDES[:2], means),
        jsd_loss: SIDES[1::2],
        uld_loss: SIDES[1::2],
        partial(FusedLinearLoss, JSD()): (),
        FusedLinearULDLoss: (),
    }
    for function, arguments in calls.items():
        with pytest.raises(ValueError, match=r"return_metrics must be True or False, got .*; pass"):
            function(*arguments, return_metrics=value)
    for loss in (jsd_loss, uld_loss):
        with pytest.raises(ValueError, match="in_place must be True or False, got"):
            loss(*SIDES[1::2], in_place=value)
    with pytest.raises(ValueError, match="return_soft_hard_loss must be True or False, got"):
        FusedLinearJSDLoss(return_soft_hard_loss=value)


def test_true_is_no_index_and_a_list_no_name():
    with pytest.raises(ValueError, match=r"ignore_index must be a whole number .* got True"):
        FusedLinearJSDLoss(ignore_index=True)
    with pytest.raises(ValueError, match=r"name must be one of jsd, .* got \['jsd'\]"):
        make_loss(["jsd"])
    with pytest.raises(
        ValueError, match=r"numbers of jsd are beta, temperature, got alpha=; leave"
    ):
        make_loss("jsd", alpha=0.1)


def test_a_bias_that_is_a_mask_or_quantised_is_refused_by_name():
    for dtype in (torch.bool, torch.int64, torch.float8_e4m3fn):
        bias = torch.zeros(20).to(dtype)
        for loss in (fused_linear_jsd, fused_linear_uld):
            with pytest.raises(ValueError, match=f"student_bias must be a float .* got {dtype}; "):
                loss(*SIDES, student_bias=bias)
        for function, arguments in (
            (head_means, (*SIDES[:2], SIDES[3])),
            (head_top_k, (*SIDES[:2], 3)),
        ):
            with pytest.raises(ValueError, match=r"must be a float tensor, .* of a mask torch\.z"):
                function(*arguments, teacher_bias=bias)


def test_a_weight_that_torchao_has_quantised_is_refused_by_name():
    """It says that it is bfloat16, and knows the operators of torch alone."""
    quantization = pytest.importorskip("torchao.quantization")
    head = torch.nn.Linear(8, 20, bias=False).bfloat16()
    quantization.quantize_(head, quantization.Int8WeightOnlyConfig())
    assert head.weight.dtype == torch.bfloat16
    hidden, weight = (t.bfloat16() for t in SIDES[:2])
    with pytest.raises(ValueError, match=r"teacher_weight must be a plain .* its dequantize\(\)"):
        fused_linear_jsd(hidden, weight, hidden, head.weight)
    fused_linear_jsd(hidden, weight, hidden, head.weight.dequantize())


def set_first(value, tensor):
    changed = tensor.clone()
    changed[0] = value
    return changed


ROWS = ("student_base_rows", "student_scalar_rows", "teacher_base_rows", "teacher_scalar_rows")
GROUPS = ("student_scalar_groups", "teacher_scalar_groups")


@pytest.mark.parametrize("loss", [fused_linear_uld, fused_linear_chunk_likelihood])
def test_rows_and_groups_that_are_none_are_refused_by_side(loss):
    heads = [tensor.float() for tensor in CASE.tensors[:4]]

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            loss(*heads, alignment=ALIGNMENT._replace(**changes))

    for name in (*ROWS, *GROUPS):
        side, kind = name.partition("_")[0], name.rpartition("_")[2]
        for value in (-1, 1000):
            changes = {name: set_first(value, getattr(ALIGNMENT, name))}
            refused(rf"the {side}'s {kind} in the alignment must be in \[0, \d+\), got", **changes)
    for side in ("student", "teacher"):
        rows = getattr(ALIGNMENT, f"{side}_base_rows")
        message = f"a row of the {side} must be in one group .* got row {int(rows[1])} in several"
        refused(message, **{f"{side}_base_rows": set_first(rows[1], rows)})
    groups = ALIGNMENT.student_scalar_groups.flip(0)
    refused(
        "the student's scalar groups in the alignment must ascend", student_scalar_groups=groups
    )


@pytest.mark.parametrize("name", ALIGNMENT._fields[:10])
def test_indices_of_other_kinds_are_refused_by_name(name):
    field = getattr(ALIGNMENT, name)
    for other, got in (
        (field.tolist(), "list"),
        (None, "NoneType"),
        (field.int(), "torch.int32"),
        (field.unsqueeze(1), r"\(\d, 1\) torch.int64"),
    ):
        with pytest.raises(ValueError, match=rf"{name} of the alignment must be .* got .*{got}; "):
            CASE.run(fused_linear_uld, torch.float32, alignment=ALIGNMENT._replace(**{name: other}))


def test_an_unknown_merge_is_refused():
    with pytest.raises(ValueError, match=r"merge of the alignment must be .* got 'Bayesian'"):
        CASE.run(fused_linear_uld, torch.float32, alignment=ALIGNMENT._replace(merge="Bayesian"))


def test_means_of_other_kinds_and_of_other_vocabularies_are_refused():
    """A token beyond the head was clamped: the divergence was negative."""
    student, weight, teacher, head = SIDES
    means = head_means(teacher, head, weight)
    for other in (None, tuple(means), means._asdict()):
        with pytest.raises(ValueError, match=r"teacher must be HeadMeans, got .*; pass what head"):
            fused_linear_mean_kl(student, weight, other)
    for name in HeadMeans._fields:
        with pytest.raises(ValueError, match=f"{name} of the teacher must be a tensor, got NoneT"):
            fused_linear_mean_kl(student, weight, means._replace(**{name: None}))
    for tokens in (means.tokens + 20, means.tokens - 20):
        with pytest.raises(ValueError, match=r"tokens of the teacher must be in \[0, 20\), .* got"):
            fused_linear_mean_kl(student, weight, means._replace(tokens=tokens))
