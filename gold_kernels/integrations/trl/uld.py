"""trl's ULDLoss, from hidden states.

B sequences, L positions, N_s and N_t rows that are projected, G groups, V vocabulary.

Values are trl's, by its config: which positions a merge strategy reads, how tokens are grouped, the
mean over groups and then over samples. What differs is said in docs/integrations.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gold_kernels.engine.kinds import check_same_positions
from gold_kernels.integrations.trl.jsd import IGNORED
from gold_kernels.integrations.trl.losses import takes_pending_logits
from gold_kernels.integrations.trl.options import PatchOptions
from gold_kernels.integrations.trl.pending import (
    PendingLogits,
    head_options,
    head_weight,
    heads_at_hand,
)
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.tokens.vocabulary import VocabOverlap
from gold_kernels.uld.linear import fused_linear_uld

BYTES_NEEDED = "Byte offsets are required when `use_extended_uld=True`."


def uld_call(options: PatchOptions) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def of(original: Callable[..., Any]) -> Callable[..., Any]:
        @takes_pending_logits
        def __call__(
            self: Any,
            student_logits: Any,  # PendingLogits, or a tensor, which trl's own method takes
            teacher_logits: Any,
            student_labels: Tensor,  # (B, L_s)
            teacher_labels: Tensor,  # (B, L_t)
            student_input_ids: Tensor,
            teacher_input_ids: Tensor,
            student_byte_offsets: Tensor | None = None,  # (B, L_s, 2)
            teacher_byte_offsets: Tensor | None = None,  # (B, L_t, 2)
        ) -> Tensor:
            labels = student_labels, teacher_labels
            ids = student_input_ids, teacher_input_ids
            offsets = student_byte_offsets, teacher_byte_offsets
            if not isinstance(student_logits, PendingLogits):
                return original(self, student_logits, teacher_logits, *labels, *ids, *offsets)
            sides = [
                Side(own.cpu(), tokens.cpu(), None if ends is None else ends.cpu())
                for own, tokens, ends in zip(labels, ids, offsets, strict=True)
            ]
            return fused_uld(self, student_logits, teacher_logits, sides, options)

        return __call__

    return of


class Side(NamedTuple):
    """What a batch has of one tokenizer, on the CPU."""

    labels: Tensor  # (B, L), -100 where not scored
    ids: Tensor  # (B, L)
    offsets: Tensor | None  # (B, L, 2) bytes where each token starts and ends


class Group(NamedTuple):
    """Positions of a group's tokens in a sequence, on both sides."""

    sample: int
    student: list[int]
    teacher: list[int]


def fused_uld(
    loss_fn: Any,  # trl's ULDLoss
    student: PendingLogits,
    teacher: PendingLogits,
    sides: list[Side],  # of the student, of the teacher
    options: PatchOptions,
) -> Tensor:  # ()
    for name, side, logits in zip(("student", "teacher"), sides, (student, teacher), strict=True):
        positions = {f"{name}_logits": logits.hidden.shape[:-1]}
        check_same_positions("ULDLoss", **{f"{name}_labels": side.labels.shape}, **positions)
    groups, num_groups = find_groups(loss_fn, *sides)
    labels = _shifted_labels(loss_fn, sides[0])
    (student_rows, teacher_rows), alignment = rows_of_groups(loss_fn, groups, sides, labels)
    is_hybrid = loss_fn.use_hybrid_loss and loss_fn._vocab_mapping is not None
    student_hidden, teacher_hidden = student.rows(student_rows), teacher.rows(teacher_rows)
    device = student_hidden.device
    counts = [num_groups[group.sample] for group in groups]
    weights = torch.tensor(counts, dtype=torch.float64, device="cpu").reciprocal()
    weights *= loss_fn.distillation_weight / len(num_groups)
    with heads_at_hand(student, teacher):
        heads = head_weight(student), head_weight(teacher)
        given: dict[str, Any] = {**head_options(student, teacher), **options}
        if labels is not None:
            row_labels = labels.flatten()[student_rows]
            weight = loss_fn.crossentropy_weight / max(1, int((row_labels != IGNORED).sum()))
            given["labels"] = row_labels.to(device)
            given["label_weights"] = weights.new_full(row_labels.shape, weight).to(device)
        if is_hybrid:
            given |= hybrid_options(loss_fn, *(head.shape[0] for head in heads))
        loss, metrics = fused_linear_uld(
            *(student_hidden, heads[0], teacher_hidden, heads[1]),
            weights.to(device),
            student_temperature=loss_fn.student_temperature,
            teacher_temperature=loss_fn.teacher_temperature,
            alignment=alignment,
            return_metrics=True,
            **given,
        )
    if is_hybrid and groups:  # trl logs those of the last sample that has groups
        last = slice(len(groups) - num_groups[groups[-1].sample], None)
        unmatched = metrics.unmatched_loss[last].mean()
        loss_fn.last_matched_loss = metrics.matched_loss[last].mean()
        loss_fn.last_unmatched_loss = unmatched if given["unmatched_weight"] else 0 * unmatched
    return loss


def _shifted_labels(loss_fn: Any, side: Side) -> Tensor | None:  # (B, L): of the next token
    if loss_fn.crossentropy_weight <= 0:
        return None
    labels = torch.full_like(side.labels, IGNORED)
    labels[:, :-1] = side.labels[:, 1:]
    return labels


def find_groups(
    loss_fn: Any, student: Side, teacher: Side
) -> tuple[list[Group], list[int]]:  # in the order of samples; how many of each sample
    """trl's groups: of bytes with extended ULD, else of one token each, up to the shorter side."""
    skips = loss_fn.skip_student_eos, loss_fn.skip_teacher_eos
    answers = [
        zip(*loss_fn._get_start_and_size_answers(side.labels), strict=True)
        for side in (student, teacher)
    ]
    groups: list[Group] = []
    counts = []
    for sample, spans in enumerate(zip(*answers, strict=True)):
        ranges = [
            range(start, start + size - skip)
            for (start, size), skip in zip(spans, skips, strict=True)
        ]
        found = _sample_groups(loss_fn, sample, ranges, student, teacher) if all(ranges) else []
        if loss_fn.token_merge_strategy == "bayesian" and any(0 in span for span in ranges):
            found = found[1:]  # no position comes before the first token
        groups += [Group(sample, *pair) for pair in found]
        counts.append(len(found))
    return groups, counts


def _sample_groups(
    loss_fn: Any, sample: int, ranges: list[range], student: Side, teacher: Side
) -> list[tuple[list[int], list[int]]]:
    if not loss_fn.use_extended_uld:
        return [([s], [t]) for s, t in zip(*ranges, strict=False)]
    both = student.offsets, teacher.offsets
    if both[0] is None or both[1] is None:
        raise ValueError(BYTES_NEEDED)
    offsets = [
        side[sample, span.start : span.stop].tolist()
        for side, span in zip(both, ranges, strict=True)
        if side is not None
    ]
    pairs = zip(*loss_fn._align_by_byte_offsets(*offsets), strict=False)
    return [
        ([ranges[0][i] for i in own], [ranges[1][i] for i in other])
        for own, other in pairs
        if own and other
    ]


def rows_of_groups(
    loss_fn: Any,
    groups: list[Group],
    sides: list[Side],
    labels: Tensor | None,  # (B, L_s)
) -> tuple[tuple[Tensor, Tensor], TokenAlignment]:
    """Flat positions that are projected, (N_s,) and (N_t,), and the alignment of their rows.

    A "bayesian" group has the distribution of its last token, from the position before it, and
    an "observed" one that of its first token's own position, which predicts the next. The merge is
    called "observed" in both cases: "bayesian" would change what the hybrid loss compares.
    """
    is_bayesian = loss_fn.token_merge_strategy == "bayesian"
    rows, fields = [], []
    for name, side in zip(("student", "teacher"), sides, strict=True):
        length = side.labels.shape[1]
        tokens = [(g, p) for g, group in enumerate(groups) for p in getattr(group, name)]
        owners, positions = (
            torch.tensor(tokens, dtype=torch.int64, device="cpu").reshape(-1, 2).unbind(1)
        )
        samples = torch.tensor([group.sample for group in groups], dtype=torch.int64, device="cpu")
        flat = samples[owners] * length + positions
        used = flat - int(is_bayesian)
        is_row = torch.zeros(side.labels.numel(), dtype=torch.bool, device="cpu").index_fill_(
            0, used, True
        )
        if labels is not None and name == "student":
            is_row |= labels.flatten() != IGNORED
        index = is_row.cumsum(0)[used] - 1
        is_base = torch.ones_like(owners, dtype=torch.bool)
        is_change = owners[1:] != owners[:-1]
        is_base[slice(-1) if is_bayesian else slice(1, None)] = is_change
        ids, is_scalar = side.ids.flatten()[flat], ~is_base
        rows.append(is_row.nonzero().squeeze(1))
        fields += [index[is_base], ids[is_base]]
        fields += [index[is_scalar], ids[is_scalar], owners[is_scalar]]
    counts = rows[0].shape[0], rows[1].shape[0]
    return (rows[0], rows[1]), TokenAlignment._make((*fields, "observed", *counts, 0, 0))


_OVERLAPS: WeakKeyDictionary[Any, VocabOverlap] = WeakKeyDictionary()  # made once a loss


def hybrid_options(loss_fn: Any, v_student: int, v_teacher: int) -> dict[str, Any]:
    """trl's matched entries and the weights of both parts."""
    if loss_fn not in _OVERLAPS:
        pairs = sorted((student, teacher) for teacher, student in loss_fn._vocab_mapping.items())
        ids = torch.tensor(pairs, dtype=torch.int64, device="cpu").reshape(-1, 2)
        device = loss_fn.mapping_tensor.device
        own, other = (column.contiguous().to(device) for column in ids.unbind(1))
        _OVERLAPS[loss_fn] = VocabOverlap(own, other, v_student, v_teacher)
    overlap = _OVERLAPS[loss_fn]
    matched, unmatched = loss_fn.hybrid_matched_weight, loss_fn.hybrid_unmatched_weight
    if matched is None:
        matched = overlap.num_matched / max(1, v_teacher)
        unmatched = 1.0 - matched
    if overlap.num_matched in (v_student, v_teacher):  # trl then compares no others
        unmatched = 0.0
    return {
        "overlap": overlap,
        "beta": loss_fn.beta,
        "matched_weight": matched,
        "unmatched_weight": unmatched,
    }
