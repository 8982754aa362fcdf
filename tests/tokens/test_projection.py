"""VocabProjection: which entries of the teacher an entry of the student begins with."""

import pytest
import torch

from gold_kernels import VocabOverlap, VocabProjection
from gold_kernels.projection.torch_rows import fold_rows
from support.tokenizers_cases import table


@pytest.fixture(scope="module")
def gpt2_to_qwen():
    """Numbers of several digits are entries of GPT-2 and not of Qwen."""
    return VocabProjection.from_token_bytes(table("gpt2"), table("qwen"))


def pieces_of(projection, student, teacher, piece):
    row = table(student).pieces.index(piece)
    entries = [i for i in projection.columns[row].tolist() if i >= 0]
    weights = projection.weights[row, : len(entries)].tolist()
    return [table(teacher).pieces[i] for i in entries], weights


def test_equal_entries_have_weight_one_and_others_their_first_pieces(gpt2_to_qwen):
    names = gpt2_to_qwen, "gpt2", "qwen"
    assert pieces_of(*names, b" the") == ([b" the"], [1.0])
    pieces, weights = pieces_of(*names, b"201")
    assert pieces == [b"2", b"0", b"1"]
    assert weights == pytest.approx([1 / 1.11, 0.1 / 1.11, 0.01 / 1.11])
    pieces, weights = pieces_of(*names, b"20439")
    assert pieces == [b"2", b"0", b"4", b"3"] and sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("names", [("gpt2", "qwen"), ("mistral", "qwen")])
def test_every_row_spells_the_beginning_of_its_entry(names):
    """Parts of characters too, and words behind SentencePiece's space."""
    student, teacher = map(table, names)
    projection = VocabProjection.from_token_bytes(student, teacher)
    exact = VocabOverlap.from_token_bytes(student, teacher)
    matched = dict(zip(exact.student_ids.tolist(), exact.teacher_ids.tolist(), strict=True))
    num_empty = 0
    for i, row in enumerate(projection.columns.tolist()):
        entries = [entry for entry in row if entry >= 0]
        if i in matched:
            assert entries == [matched[i]]
        elif student.pieces[i]:
            spelled = b"".join(teacher.pieces[entry] for entry in entries)
            assert entries and student.pieces[i].startswith(spelled)
            assert len(entries) == 4 or spelled == student.pieces[i]
        else:
            num_empty += 1
            assert entries == []
    assert num_empty < 2000
    sums = projection.weights.sum(1)
    torch.testing.assert_close(sums, (projection.columns[:, 0] >= 0).float())


def test_without_decay_to_later_pieces_the_first_has_all():
    projection = VocabProjection.from_token_bytes(table("gpt2"), table("qwen"), decay=0.0)
    assert pieces_of(projection, "gpt2", "qwen", b"201") == ([b"2"], [1.0])


def test_the_relaxed_overlap_adds_first_pieces_that_have_no_partner():
    """Of two rows for one entry the heavier counts, then the first."""
    columns = torch.tensor([[0, -1], [1, 2], [1, 2], [3, 4], [4, 0], [0, 1], [-1, -1]])
    weights = torch.tensor([[1, 0], [0.7, 0.3], [0.8, 0.2], [0.5, 0.5], [0.9, 0.1], [0.9, 0.1]])
    weights = torch.cat([weights, torch.zeros(1, 2)])
    projection = VocabProjection.from_entries(columns, weights, 5)
    exact = VocabOverlap(torch.tensor([0]), torch.tensor([0]), 7, 5)
    relaxed = projection.relaxed_overlap(exact)
    pairs = list(zip(relaxed.student_ids.tolist(), relaxed.teacher_ids.tolist(), strict=True))
    assert pairs == [(0, 0), (2, 1), (4, 4)]
    with_half = projection.relaxed_overlap(exact, least_weight=0.5)
    assert with_half.student_ids.tolist() == [0, 2, 3, 4]


def test_the_relaxed_overlap_of_real_vocabularies_holds_the_exact_one(gpt2_to_qwen):
    exact = VocabOverlap.from_token_bytes(table("gpt2"), table("qwen"))
    relaxed = gpt2_to_qwen.relaxed_overlap(exact)
    pairs, more = (
        set(zip(pair.student_ids.tolist(), pair.teacher_ids.tolist(), strict=True))
        for pair in (exact, relaxed)
    )
    assert pairs < more
    for i, partner in more - pairs:
        assert table("gpt2").pieces[i].startswith(table("qwen").pieces[partner])


@pytest.mark.parametrize("heavy", [1, 4, 5, 17, 300])
def test_folds_are_the_product_with_the_dense_matrix(heavy):
    """A column of any number of rows: 300 of them take five levels of folds of four."""
    generator = torch.Generator().manual_seed(heavy)
    columns = torch.randint(-1, 40, (310, 3), generator=generator)
    columns[:heavy, 0] = 41
    weights = torch.rand(310, 3, generator=generator) + 0.1
    projection = VocabProjection.from_entries(columns, weights, 50)
    matrix = torch.zeros(310, 50, dtype=torch.float64)
    matrix.scatter_add_(1, columns.clamp_min(0), projection.weights.double())
    folds = projection.folds
    assert folds.teacher_ids.tolist() == sorted(set(columns[columns >= 0].tolist()))
    assert len(folds.starts) - 1 >= {1: 1, 300: 5}.get(heavy, 1)
    q = torch.rand(6, 310, generator=generator).double()
    sums = fold_rows(q, folds)[:, folds.places.long()]
    torch.testing.assert_close(sums, (q @ matrix)[:, folds.teacher_ids.long()])
    assert type(folds).from_tensors(folds.tensors()).starts == folds.starts


@pytest.mark.parametrize(
    ("columns", "weights", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), torch.ones(3), r"\(3, 2\) and \(3,\); pass one"),
        (torch.tensor([[7]]), torch.ones(1, 1), "columns must be below 5, .* got 7; pass -1"),
        (torch.tensor([[1]]), torch.zeros(1, 1), "positive and finite, got 0.0; leave out"),
        (torch.tensor([[1]]), torch.full((1, 1), torch.nan), "positive and finite, got nan"),
    ],
)
def test_entries_that_are_no_projection_say_so(columns, weights, message):
    with pytest.raises(ValueError, match=f"^VocabProjection: .*{message}"):
        VocabProjection.from_entries(columns, weights, 5)


def test_a_decay_beyond_one_says_so():
    with pytest.raises(ValueError, match=r"^VocabProjection: .*decay in \[0, 1\], got 4 and 2.0;"):
        VocabProjection.from_token_bytes(table("gpt2"), table("qwen"), decay=2.0)
