"""The public functions of ULD: distillation between two vocabularies, from hidden states and heads
without full logits and without a sort on the GPU, and from logits.

N scored rows of a side (N_s, N_t), G aligned groups or pairs of rows, R rows of the student that
are projected, D hidden size (D_s, D_t), V vocabulary (V_s, V_t). P teacher, Q student.
"""

from typing import Literal, NamedTuple, overload

from torch import Tensor, nn
from typing_extensions import Unpack

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import linear_options, module_options, refuse_slices, told
from gold_kernels.engine.heads import label_weights_of, row_weights_of, unit_stride
from gold_kernels.engine.linear import RowPlan
from gold_kernels.engine.logits import run_logits_loss
from gold_kernels.engine.options import (
    CallTensors,
    LinearOptions,
    LogitsOptions,
    LossOptions,
    Options,
    PerSide,
    per_side,
    resolve_options,
)
from gold_kernels.engine.overwriting import check_in_place, refuse_overwritten
from gold_kernels.engine.row_loss import RowLoss
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.tokens.vocabulary import VocabOverlap
from gold_kernels.uld import checks as uld_checks
from gold_kernels.uld.group_call import GroupCall, GroupValues, run_group_call
from gold_kernels.uld.plan import matched_tables, overlap_weights, plan_rows
from gold_kernels.uld.row_loss import ULD


class ULDMetrics(NamedTuple):
    """Unweighted values, detached, float32: of every group or pair of rows, (G,) each.

    matched_loss is the JSD of matched entries, unmatched_loss the sorted L1 of the others (of all
    without an overlap); a mass is the probability of the matched entries. cross_entropy, (N_s,) of
    the labels in nats, is None without labels.
    """

    loss: Tensor
    matched_loss: Tensor  # generalized JSD of matched entries, without its weight
    unmatched_loss: Tensor  # sorted L1 of the others; without an overlap, of all
    student_matched_mass: Tensor  # probability of the matched entries
    teacher_matched_mass: Tensor
    cross_entropy: Tensor | None = None  # (N_s,) of the labels, nats; None without labels


class ULDSettings(NamedTuple):
    """What every form of the loss takes beside LinearOptions."""

    temperature: PerSide = 1.0  # of both sides, or (student, teacher)
    student_temperature: float | None = None  # in place of temperature
    teacher_temperature: float | None = None
    overlap: VocabOverlap | None = None  # matched entries, for the hybrid loss
    beta: float = 0.5  # of the generalized JSD of matched entries
    matched_weight: float | None = None  # None for both: the share of the vocabulary that matches
    unmatched_weight: float | None = None

    def row_loss(self, function: str) -> ULD:
        """Checked; without the tensors of a call."""
        checks.check_temperature(function, self.temperature)
        temperature = per_side(self.temperature)
        given = self.student_temperature, self.teacher_temperature
        sides = [side if own is None else own for side, own in zip(temperature, given, strict=True)]
        weights = overlap_weights(
            function, self.overlap, self.matched_weight, self.unmatched_weight
        )
        row_loss = ULD(self.beta, *weights, (sides[0], sides[1]))
        row_loss.check(function)
        return row_loss


def _linear_uld(
    function: str,
    settings: ULDSettings,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weights: Tensor | None,
    alignment: TokenAlignment | None,
    options: Options,
    has_metrics: bool,
) -> Tensor | tuple[Tensor, ULDMetrics]:
    """Validate, plan, run; behind the function and the module."""
    with told(options.process_group, student_hidden, student_weight):
        row_loss = settings.row_loss(function)

    def plan_of(call: GroupCall) -> tuple[RowPlan, RowLoss]:
        uld_checks.check_overlap(function, settings.overlap, *call.sizes)
        device = call.student.hidden.device
        return plan_rows(
            row_loss,
            None if alignment is None else alignment.to(device),
            call.row_weights,
            call.options.labels,
            call.label_weights,
            call.student.num_rows,
            matched_tables(settings.overlap, *call.sizes, device),
        )

    loss, values = run_group_call(
        function,
        *(student_hidden, student_weight, teacher_hidden, teacher_weight),
        row_weights,
        alignment,
        options,
        row_loss,
        has_metrics,
        plan_of,
        () if settings.overlap is None else settings.overlap[:2],
    )
    return (loss, ULDMetrics(**values.by_name(ULDMetrics._fields))) if has_metrics else loss


@overload
def fused_linear_uld(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weights: Tensor | None = None,
    *,
    temperature: PerSide = 1.0,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
    alignment: TokenAlignment | None = None,
    overlap: VocabOverlap | None = None,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def fused_linear_uld(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weights: Tensor | None = None,
    *,
    temperature: PerSide = 1.0,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
    alignment: TokenAlignment | None = None,
    overlap: VocabOverlap | None = None,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    return_metrics: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, ULDMetrics]: ...


def fused_linear_uld(
    student_hidden: Tensor,  # (N_s, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N_t, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    row_weights: Tensor | None = None,  # (G,), float32; None means 1 / G each
    *,
    temperature: PerSide = 1.0,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
    alignment: TokenAlignment | None = None,  # None: row i with row i, G = N_s = N_t
    overlap: VocabOverlap | None = None,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    return_metrics: bool = False,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, ULDMetrics]:  # (), float32; (G,) with reduction="none"
    """Universal logit distillation between two vocabularies, without full logits.

    Shapes: student_hidden (N_s, D_s), student_weight (V_s, D_s), teacher_hidden (N_t, D_t),
    teacher_weight (V_t, D_t), row_weights (G,) float32, 1 / G each if None. Returns () float32;
    (G,) with reduction="none". G groups; without an alignment row i meets row i, and G = N.

        loss = sum_g row_weights[g] * sum_k |s_g(k) - t_g(k)| + sum_i label_weights[i] * CE_i

    s_g and t_g are the probabilities of group g, sorted in descending order, the shorter side
    padded with 0 (Boizard et al. 2024, arXiv 2402.12030, eq. 3). With an alignment they are those
    of the group's base rows times the probabilities of its scalar tokens, in log space (extended
    ULD, see TokenAlignment); gradients go to base and scalar rows alike. With an overlap the loss
    is hybrid,

        matched_weight * JSD_beta(matched entries) + unmatched_weight * sorted L1 of the others

    where JSD_beta is that of fused_linear_jsd on sub-distributions (KL with + sum q - sum p, so
    never negative). In a bayesian group of several tokens an entry is not the continuation that
    its bytes say, since other tokens of the group come before it: there the hybrid loss is
    matched_weight * JSD_beta of two outcomes, the bytes of the group follow or others do.
    merge="observed" matches entries there too, as TRL. Weights None take the share of the
    student's vocabulary that is matched, and one minus it. temperature divides the logits of both
    sides, or is a pair (student, teacher); student_temperature, teacher_temperature replace one.
    The cross-entropy is taken at temperature 1 on the student's own logits.

    Options as in fused_linear_loss, vocab_size as a pair (student, teacher). reduction="none"
    returns row_weights[g] * loss of each group, (G,); labels, one a token, then need rows that are
    pairs (alignment=None).

    backend "torch" sorts and is exact. "triton" counts on a grid and orders only the bins in which
    the sign may change: on its own float32 logits the loss is within 2e-5 and the gradient within
    1e-2, near convergence 2e-2. logits_dtype=torch.bfloat16 is faster and does not order:
    4 % off in the gradient for vocabularies of different sizes, 10 % for equal ones (40 % with the
    rounding of the GEMMs), and wrong near convergence. Between equal vocabularies near convergence
    ordering takes most of the time (benchmarks/NOTES.md); fused_linear_jsd is the loss for a shared
    tokenizer.

    Extra memory is at most budget_bytes, plus one float32 student_weight if a 16-bit one needs a
    gradient. Rows of weight 0 contribute exactly 0 and may hold anything. return_metrics=True
    returns (loss, ULDMetrics). Not supported: a second derivative, torch.func transforms. Raises
    ValueError for shapes, dtypes, devices and numbers that do not fit, with the remedy.
    """
    function = "fused_linear_uld"
    return _linear_uld(
        function,
        ULDSettings(
            *(temperature, student_temperature, teacher_temperature, overlap, beta),
            *(matched_weight, unmatched_weight),
        ),
        *(student_hidden, student_weight, teacher_hidden, teacher_weight, row_weights, alignment),
        linear_options(
            function, options, student_hidden, student_weight, return_metrics=return_metrics
        ),
        return_metrics,
    )


class FusedLinearULDLoss(nn.Module):
    """fused_linear_uld as a module: options once, heads and an alignment at every call."""

    def __init__(
        self,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        overlap: VocabOverlap | None = None,
        beta: float = 0.5,
        matched_weight: float | None = None,
        unmatched_weight: float | None = None,
        *,
        temperature: PerSide = 1.0,
        return_metrics: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        self.settings = ULDSettings(
            *(temperature, student_temperature, teacher_temperature, overlap, beta),
            *(matched_weight, unmatched_weight),
        )
        self.settings.row_loss("FusedLinearULDLoss")
        checks.check_module("FusedLinearULDLoss", options, return_metrics=return_metrics)
        self.options = options
        self.return_metrics = return_metrics

    def forward(
        self,
        student_hidden: Tensor,  # (N_s, D_s)
        student_weight: Tensor,  # (V_s, D_s)
        teacher_hidden: Tensor,  # (N_t, D_t)
        teacher_weight: Tensor,  # (V_t, D_t)
        row_weights: Tensor | None = None,  # (G,)
        alignment: TokenAlignment | None = None,
        **tensors: Unpack[CallTensors],
    ) -> Tensor | tuple[Tensor, ULDMetrics]:
        """Tensors, shapes and what is returned as in fused_linear_uld."""
        return _linear_uld(
            name := "FusedLinearULDLoss",
            self.settings,
            *(student_hidden, student_weight, teacher_hidden, teacher_weight),
            *(row_weights, alignment),
            module_options(name, self.options, tensors, student_hidden, student_weight),
            self.return_metrics,
        )


@overload
def uld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    row_weights: Tensor | None = None,
    *,
    temperature: PerSide = 1.0,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
    overlap: VocabOverlap | None = None,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    in_place: bool = False,
    return_metrics: Literal[False] = False,
    **options: Unpack[LogitsOptions],
) -> Tensor: ...


@overload
def uld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    row_weights: Tensor | None = None,
    *,
    temperature: PerSide = 1.0,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
    overlap: VocabOverlap | None = None,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    in_place: bool = False,
    return_metrics: Literal[True],
    **options: Unpack[LogitsOptions],
) -> tuple[Tensor, ULDMetrics]: ...


def uld_loss(
    student_logits: Tensor,  # (N, V_s)
    teacher_logits: Tensor,  # (N, V_t)
    row_weights: Tensor | None = None,  # (N,), float32; None means 1 / N each
    *,
    temperature: PerSide = 1.0,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
    overlap: VocabOverlap | None = None,  # matched entries, for the hybrid loss
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    in_place: bool = False,
    return_metrics: bool = False,
    **options: Unpack[LogitsOptions],
) -> Tensor | tuple[Tensor, ULDMetrics]:  # (), float32; (N,) with reduction="none"
    """Universal logit distillation from logits, the meaning of fused_linear_uld without groups.

    Shapes: student_logits (N, V_s), teacher_logits (N, V_t), row_weights (N,) float32, 1 / N each
    if None. Returns () float32; (N,) with reduction="none".

        loss = sum_i row_weights[i] * sum_k |s_i(k) - t_i(k)|

    over probabilities in descending order, the shorter side padded with 0 (Boizard et al. 2024,
    arXiv 2402.12030, eq. 3); with an overlap the hybrid loss. Gradients go to student_logits only.
    Softmax and loss are float32. Prefer fused_linear_uld, which needs no logits: both lines that
    make them go, and the loss gets hidden states and heads. On a GPU logits whose row stride is no
    multiple of 16 are slower, and an overlap takes (N, K) of the teacher's dtype for a copy of its
    matched logits. Options: vocab_size as a pair (student, teacher), labels, label_weights,
    backend, reduction; in_place as in jsd_loss. Not supported: a second derivative. Raises
    ValueError for shapes, dtypes, devices and numbers that do not fit.
    """
    function = "uld_loss"
    given = resolve_options(
        function, options, LogitsOptions, in_place=in_place, return_metrics=return_metrics
    )
    settings = ULDSettings(
        *(temperature, student_temperature, teacher_temperature, overlap, beta),
        *(matched_weight, unmatched_weight),
    )
    row_loss = settings.row_loss(function)
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    refuse_slices(function, given, row_weights=row_weights, **logits)
    checks.check_logits(function, student_logits, teacher_logits, row_weights)
    refuse_overwritten(function, **logits)
    given = checks.check_options(function, given, student_logits)
    v_student, v_teacher = student_logits.shape[1], teacher_logits.shape[1]
    uld_checks.check_columns(function, v_student, v_teacher)
    sizes = uld_checks.check_vocab_sizes(function, v_student, v_teacher, given.vocab_size)
    uld_checks.check_overlap(function, overlap, *sizes)
    checks.check_label_weights(function, given, student_logits)
    check_in_place(function, in_place, student_logits, sizes[0], teacher_logits)
    num_rows = student_logits.shape[0]
    plan, row_loss = plan_rows(
        row_loss,
        None,
        row_weights_of(row_weights, num_rows, student_logits, given),
        given.labels,
        label_weights_of(sizes[0], student_logits, given),
        num_rows,
        matched_tables(overlap, *sizes, student_logits.device),
    )
    loss, values = run_logits_loss(
        row_loss,
        unit_stride(student_logits[:, : sizes[0]]),
        unit_stride(teacher_logits[:, : sizes[1]]),
        plan.weights,
        given,
        return_metrics,
        in_place,
    )
    if not return_metrics:
        return loss
    rows = GroupValues(row_loss.value_names, values, num_rows, given.labels, None)
    return loss, ULDMetrics(**rows.by_name(ULDMetrics._fields))
