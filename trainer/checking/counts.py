"""What `gold-trainer check` counts: in data loader workers for each batch, then over a split."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gold_trainer.batches import Example, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.data.bad_rows import TolerantCollator
from gold_trainer.data.row_errors import BadRow
from gold_trainer.rendering.collator import GOLDCollator

NUM_PLACES = 5  # dataset rows that are named of a kind of refusal
SIDES = ("student", "teacher")
# What differs between two messages of one kind: numbers, and what is quoted.
DETAIL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\[[^\]]*\]|\d+")


class Tokens(NamedTuple):
    """Numbers of tokens of an example on one side."""

    prompt: int  # image tokens included
    completion: int | None  # None where it has to be written
    is_prompt_cut: bool
    is_completion_cut: bool
    of_pictures: int | None  # None without pictures


@dataclass
class Part:
    """What a worker finds in one batch."""

    refused: list[BadRow]
    tokens: dict[str, list[Tokens]]  # by side; the student's alone where both see the same
    pictures: list[list[tuple[int, int]]]  # width and height, by example
    sums: Counter[str]  # across tokenizers: groups, tokens, bytes, completions without a group


class PartCollator:
    """Rows -> what is counted of them. Pictures stay in the worker."""

    def __init__(self, collate: TolerantCollator, sides: dict[str, GOLDCollator]) -> None:
        self.collate, self.sides = collate, sides

    def __call__(self, rows: list[Any]) -> Part:
        batch = self.collate(rows)
        if batch.is_blank:
            return Part(batch.skipped, {}, [], Counter())
        examples = {"student": batch.examples}
        if batch.teacher_examples is not batch.examples:
            examples["teacher"] = batch.teacher_examples
        tokens = {
            side: [_tokens(self.sides[side], example) for example in own]
            for side, own in examples.items()
        }
        pictures = [[image.size for image in example.images] for example in batch.examples]
        return Part(batch.skipped, tokens, pictures, _alignment_sums(batch))


def _tokens(collator: GOLDCollator, example: Example) -> Tokens:
    ids, room = example.completion_ids, collator.room(example)
    # an answer that is whole ends with an end token
    is_cut = ids is not None and room is not None and len(ids) >= room
    is_cut = is_cut and not (ids and ids[-1] in collator.end_ids)
    of_pictures = None
    if example.images:
        text = collator.in_context.length(example.prompt_text)
        of_pictures = example.prompt_length - text + len(example.images)  # a placeholder each
    num_tokens = None if ids is None else len(ids)
    return Tokens(example.prompt_length, num_tokens, example.is_cut, is_cut, of_pictures)


def _alignment_sums(batch: WindowBatch) -> Counter[str]:
    if batch.alignment is None:
        return Counter()
    groups = batch.alignment.groups
    sums = Counter(
        groups=groups.num_groups,
        tokens=groups.num_student_rows,
        scored_bytes=groups.scored_bytes,
        completion_bytes=groups.completion_bytes,
    )
    sums.update(f"skipped_{reason}" for reason in batch.alignment.skip_reasons if reason)
    return sums


@dataclass
class Refusal:
    """Rows with one thing wrong."""

    reason: str
    message: str  # of the first
    count: int = 0
    rows: list[int] = field(default_factory=list)  # the first of them


@dataclass
class SplitReport:
    """What is found in all rows of a split."""

    name: str  # "train" or "eval"
    num_rows: int = 0  # examples: with train_on="all" a row may be several
    refusals: dict[str, Refusal] = field(default_factory=dict)
    tokens: dict[str, list[Tokens]] = field(default_factory=dict)
    pictures: list[list[tuple[int, int]]] = field(default_factory=list)
    sums: Counter[str] = field(default_factory=Counter)
    is_one: bool = True  # both sides see the same of every row

    def add(self, part: Part) -> int:
        """How many rows the part has."""
        for row in part.refused:
            kind = DETAIL.sub("...", row.message.partition(": ")[2] or row.message)
            refusal = self.refusals.setdefault(kind, Refusal(row.reason, row.message))
            refusal.count += 1
            if len(refusal.rows) < NUM_PLACES and row.index not in refusal.rows:
                refusal.rows.append(row.index)
        self.is_one &= "teacher" not in part.tokens
        for side in SIDES if part.tokens else ():
            tokens = part.tokens.get(side, part.tokens["student"])
            self.tokens.setdefault(side, []).extend(tokens)
        self.pictures += part.pictures
        self.sums += part.sums
        num_rows = len(part.refused) + len(part.tokens.get("student", ()))
        self.num_rows += num_rows
        return num_rows

    @property
    def num_refused(self) -> int:
        return sum(refusal.count for refusal in self.refusals.values())

    def sorted_refusals(self) -> list[Refusal]:
        return sorted(self.refusals.values(), key=lambda refusal: -refusal.count)

    def _sides(self) -> dict[str, list[Tokens]]:
        if self.is_one and self.tokens:
            return {"student and teacher": self.tokens["student"]}
        return self.tokens

    def distributions(self) -> dict[str, dict[str, float]]:
        """Min, median, 95th percentile and maximum by what is counted."""
        counted: dict[str, list[int]] = {}
        for side, tokens in self._sides().items():
            counted[f"{side}, prompt"] = [t.prompt for t in tokens]
            counted[f"{side}, completion"] = [
                t.completion for t in tokens if t.completion is not None
            ]
            counted[f"{side}, total"] = [t.prompt + (t.completion or 0) for t in tokens]
            counted[f"{side}, pictures of a row"] = [
                t.of_pictures for t in tokens if t.of_pictures is not None
            ]
        sizes = [size for row in self.pictures for size in row]
        counted["pictures, of a row"] = [len(row) for row in self.pictures] if sizes else []
        counted["pictures, width"] = [width for width, _ in sizes]
        counted["pictures, height"] = [height for _, height in sizes]
        return {name: _distribution(values) for name, values in counted.items() if values}

    def shares(self, args: GOLDConfig) -> dict[str, float]:
        """Shares of the rows that can be used, on each side."""
        shares = {}
        for side, tokens in self._sides().items():
            lengths = [t.completion for t in tokens if t.completion is not None]
            shares[f"{side}, completions cut by max_length={args.max_length}"] = _share(
                t.is_completion_cut for t in tokens
            )
            if args.cut_to is not None:
                shares[f"{side}, prompts cut to {args.cut_to} tokens"] = _share(
                    t.is_prompt_cut for t in tokens
                )
            limit = args.max_completion_length
            shares[f"{side}, completions above max_completion_length={limit}"] = _share(
                length > limit for length in lengths
            )
        return shares

    def alignment(self) -> dict[str, float]:
        if not self.sums:
            return {}
        return {
            "groups per token": self.sums["groups"] / max(self.sums["tokens"], 1),
            "bytes that are scored": (
                self.sums["scored_bytes"] / max(self.sums["completion_bytes"], 1)
            ),
            **{name: n for name, n in self.sums.items() if name.startswith("skipped_")},
        }

    def as_dict(self, args: GOLDConfig) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "rows": self.num_rows,
            "refused": self.num_refused,
            "refusals": [vars(refusal) for refusal in self.sorted_refusals()],
            "distributions": self.distributions(),
            "shares": self.shares(args),
            "alignment": self.alignment(),
        }


def _share(values: Any) -> float:
    values = list(values)
    return sum(values) / max(len(values), 1)


def _distribution(values: list[int]) -> dict[str, float]:
    low, median, p95, high = np.percentile(values, [0, 50, 95, 100]).tolist()
    return {"min": low, "median": median, "p95": p95, "max": high}
