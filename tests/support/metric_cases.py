"""Rows of which some cannot be distilled, and the metrics of every row as the oracle has them: full
logits, float64, nothing of trainer/.
"""

from collections.abc import Collection
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from tokenizers import normalizers
from torch import Tensor

from gold_kernels import TokenAlignment, VocabOverlap
from gold_kernels.uld import reference as reference_uld
from support.cross_cases import Side, aligner_of, completions_of, rows_of, teacher_completion
from support.eager_step import prompt_inputs, scored_logits

WEIGHTS = (0.7, 0.4)  # of matched and other entries
CROSSENTROPY_WEIGHT = 0.3
FIELDS = {
    "uld_use_hybrid_loss": True,
    "uld_hybrid_matched_weight": WEIGHTS[0],
    "uld_hybrid_unmatched_weight": WEIGHTS[1],
    "uld_crossentropy_weight": CROSSENTROPY_WEIGHT,
}
MEANS = {  # metric -> what it is a sum of, over what
    "uld_loss": ("uld", "groups"),
    "matched_loss": ("matched", "groups"),
    "unmatched_loss": ("unmatched", "groups"),
    "student_matched_mass": ("student_mass", "groups"),
    "teacher_matched_mass": ("teacher_mass", "groups"),
    "crossentropy": ("crossentropy", "tokens"),
    "groups_per_token": ("groups", "tokens"),
    "scored_bytes": ("scored_bytes", "bytes"),
    "completion_length": ("tokens", "rows"),
}
SKIPS = ("skipped_unspelled", "skipped_no_common_end")


class SkipRows(NamedTuple):
    rows: list[dict[str, Any]]
    max_length: int
    unspelled: Collection[int]  # rows
    cut: int  # row


def rows_with_skips(
    student: Side, teacher: Side, count: int, unspelled: Collection[int], cut: int
) -> SkipRows:
    """The teacher spells lower case only. Row `cut` has a long question, after which max_length
    leaves the teacher one token, the first of several that spell the student's first.
    """
    teacher.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    rows = rows_of(student.family, count)
    assert not rows[cut].get("images") and cut not in unspelled
    for index, row in enumerate(rows):
        question, answer = row["messages"]
        if index not in unspelled:
            answer = {**answer, "content": answer["content"].lower()}
        if index == cut:
            question = {**question, "content": "What is this? " * 30}
            answer = {**answer, "content": "green is the circle."}
        row["messages"] = [question, answer]
    lengths = [prompt_inputs(teacher.processor, row)["input_ids"].shape[1] for row in rows]
    longest = max(length for i, length in enumerate(lengths) if i != cut)
    assert longest + 64 < lengths[cut], "other answers must fit"
    return SkipRows(rows, lengths[cut] + 1, unspelled, cut)


def row_sums(student: Side, teacher: Side, given: SkipRows) -> list[dict[str, float]]:
    """Sums of every row: groups, tokens, bytes, and metrics over groups or tokens."""
    aligner = aligner_of(student, teacher)
    overlap = VocabOverlap.from_tokenizers(student.tokenizer, teacher.tokenizer)
    models = deepcopy(student.model).double(), deepcopy(teacher.model).double()
    sums = []
    for index, ids in enumerate(completions_of(student, given.rows)):
        row = given.rows[index]
        teacher_ids = [] if index in given.unspelled else teacher_completion(student, teacher, ids)
        teacher_ids = teacher_ids[:1] if index == given.cut else teacher_ids
        inputs = [prompt_inputs(side.processor, row) for side in (student, teacher)]
        assert inputs[0]["input_ids"].shape[1] + len(ids) <= given.max_length
        alignment = aligner.align(ids, teacher_ids)
        is_skipped = index in (*given.unspelled, given.cut)
        assert (alignment.num_groups == 0) == is_skipped
        with torch.no_grad():
            logits = [
                scored_logits(*side)
                for side in zip(models, inputs, (ids, teacher_ids), strict=True)
            ]
        num_bytes = len(row["messages"][-1]["content"])
        log_q = logits[0].log_softmax(-1)
        sums.append(
            {
                "rows": 1,
                "tokens": len(ids),
                "groups": alignment.num_groups,
                "bytes": num_bytes,
                "scored_bytes": 0 if is_skipped else num_bytes,
                "crossentropy": -log_q[torch.arange(len(ids)), ids].sum().item(),
                "skipped_unspelled": index in given.unspelled,
                "skipped_no_common_end": index == given.cut,
            }
            | _losses(logits, alignment, overlap)
            | _masses(logits, (ids, teacher_ids), alignment, overlap)
        )
    return sums


def _losses(
    logits: list[Tensor], alignment: TokenAlignment, overlap: VocabOverlap
) -> dict[str, float]:
    weights = {"uld": WEIGHTS, "matched": (1.0, 0.0), "unmatched": (0.0, 1.0)}
    return {
        name: reference_uld.uld_loss(
            *logits,
            torch.ones(alignment.num_groups).double(),
            alignment=alignment,
            overlap=overlap,
            matched_weight=matched_weight,
            unmatched_weight=unmatched_weight,
        ).item()
        for name, (matched_weight, unmatched_weight) in weights.items()
    }


def _masses(
    logits: list[Tensor],
    ids: tuple[list[int], list[int]],
    alignment: TokenAlignment,
    overlap: VocabOverlap,
) -> dict[str, float]:
    """Probability of the matched entries; in a group of several tokens on a side, of its bytes."""
    merged = {g for side in alignment.sides for g in side[4].tolist()}
    masses = {}
    for name, logits_of_side, own, rows, matched in zip(
        ("student_mass", "teacher_mass"), logits, ids, alignment.sides, overlap[:2], strict=True
    ):
        probs, total = logits_of_side.softmax(-1), 0.0
        for group, base in enumerate(rows[0].tolist()):
            run = [base, *rows[2][rows[4] == group].tolist()]
            if group in merged:
                total += torch.stack([probs[row, own[row]] for row in run]).prod().item()
            else:
                total += probs[base, matched].sum().item()
        masses[name] = total
    return masses


def total_of(sums: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in sums) for name in sums[0]}


def loss_of(sums: list[dict[str, float]]) -> float:
    """The loss of an optimizer step on these rows."""
    total = total_of(sums)
    hard = CROSSENTROPY_WEIGHT * total["crossentropy"] / total["tokens"]
    return total["uld"] / max(total["groups"], 1) + hard


def metrics_of(sums: list[dict[str, float]]) -> dict[str, float]:
    """What a log over these rows must have, but for the loss."""
    total = total_of(sums)
    means = {name: total[part] / total[whole] for name, (part, whole) in MEANS.items()}
    return means | {name: total[name] for name in SKIPS}
