"""Completions of a pair of tokenizers aligned, and the checks that every alignment must pass."""

from gold_kernels.tokens.alignment import CompletionAligner, TokenAlignment
from gold_kernels.tokens.token_bytes import TokenBytes
from support.tokenizers_cases import table

SIDES = ("student", "teacher")


def rows_by_group(alignment: TokenAlignment, side: str) -> list[list[int]]:
    """The rows of every group; the last one listed is the base."""
    rows = [[] for _ in range(alignment.num_groups)]
    scalar_rows = getattr(alignment, f"{side}_scalar_rows").tolist()
    scalar_groups = getattr(alignment, f"{side}_scalar_groups").tolist()
    for row, group in zip(scalar_rows, scalar_groups, strict=True):
        rows[group].append(row)
    for group, row in enumerate(getattr(alignment, f"{side}_base_rows").tolist()):
        rows[group].append(row)
    return rows


def assert_groups_spell_the_same(
    aligner: CompletionAligner, ids: dict[str, list[int]], alignment: TokenAlignment
) -> bytes:
    """Checks every group of a bayesian alignment; returns the bytes that are covered."""
    is_spaced = aligner.student.is_spaced or aligner.teacher.is_spaced
    spelled = {}
    for side in SIDES:
        spelling: TokenBytes = getattr(aligner, side)
        groups = rows_by_group(alignment, side)
        rows = [row for group in groups for row in group]
        assert rows == sorted(set(rows)), "a row is in one group, the base is the last of its run"
        assert getattr(alignment, f"num_{side}_rows") == len(ids[side])
        scalar_rows = getattr(alignment, f"{side}_scalar_rows").tolist()
        scalar_ids = [ids[side][row] for row in scalar_rows]
        assert getattr(alignment, f"{side}_scalar_ids").tolist() == scalar_ids
        spelled[side] = [b"".join(spelling.pieces[ids[side][row]] for row in g) for g in groups]
    for group, (a, b) in enumerate(zip(spelled["student"], spelled["teacher"], strict=True)):
        if is_spaced:
            assert a.replace(b" ", b"") == b.replace(b" ", b"")
        elif group == 0:  # one side may put a space before the text
            assert a == b or a == b" " + b or b == b" " + a
        else:
            assert a == b
    return min((b"".join(pieces) for pieces in spelled.values()), key=len)


def aligned(names: tuple[str, str], text: str, *, is_ended: bool = True, **options):
    aligner = CompletionAligner(table(names[0]), table(names[1]), **options)
    end = [aligner.student.end_of_turn_id] if is_ended else []
    student_ids = aligner.student.encode(text) + end
    teacher_ids = aligner.teacher_ids(student_ids)
    ids = {"student": student_ids, "teacher": teacher_ids}
    return aligner, ids, aligner.align(student_ids, teacher_ids)
