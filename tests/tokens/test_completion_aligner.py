"""CompletionAligner: completions of all pairs of tokenizers, whole, cut, broken and as sampled."""

import time
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gold_kernels.tokens.alignment import CompletionAligner
from gold_kernels.tokens.token_bytes import as_id_tensor
from support.alignment_cases import SIDES, aligned, assert_groups_spell_the_same, rows_by_group
from support.tokenizers_cases import TEXTS, TOKENIZERS, table, texts_of

REAL = ("qwen", "tekken", "gpt2", "mistral")
PAIRS = list(product(TOKENIZERS, repeat=2))


@pytest.mark.parametrize("names", PAIRS, ids=" to ".join)
def test_all_pairs_of_tokenizers_align_every_byte_and_the_end_of_turn(names):
    for text_name, text in texts_of(*names).items():
        aligner, ids, alignment = aligned(names, text)
        assert alignment.scored_bytes == alignment.completion_bytes, text_name
        spelled = aligner.student.texts(as_id_tensor(ids["student"]))[0]
        if not aligner.student.is_spaced:  # " The" is "The" to a student who cannot tell
            assert spelled in (text.encode(), text.encode()[1:]), text_name
        covered = assert_groups_spell_the_same(aligner, ids, alignment)
        if not (aligner.student.is_spaced or aligner.teacher.is_spaced):
            assert covered in (spelled, b" " + spelled), text_name
        for side in SIDES:  # end of turn with end of turn, alone
            assert rows_by_group(alignment, side)[-1] == [len(ids[side]) - 1], text_name
            assert ids[side][-1] == getattr(aligner, side).end_of_turn_id, text_name


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_tokenizer_on_both_sides_aligns_token_by_token(name):
    _, ids, alignment = aligned((name, name), TEXTS["a sentence"])
    assert ids["student"] == ids["teacher"]
    assert alignment.student_base_rows.tolist() == list(range(len(ids["student"])))
    assert alignment.student_scalar_rows.numel() == 0


@pytest.mark.parametrize("names", [p for p in PAIRS if set(p) <= {*REAL, "gemma"}], ids=" to ".join)
def test_a_completion_cut_on_either_side_is_aligned_up_to_the_cut(names):
    text = TEXTS["a sentence"] + TEXTS["multi-byte characters"] + TEXTS["emoji sequence"]
    aligner, ids, whole = aligned(names, text)
    for side, other in (SIDES, SIDES[::-1]):
        for length in range(len(ids[side]) - 1):
            cut = {side: ids[side][:length], other: ids[other]}
            alignment = aligner.align(cut["student"], cut["teacher"])
            assert_groups_spell_the_same(aligner, cut, alignment)
            expected = [rows for rows in rows_by_group(whole, side) if max(rows) < length]
            assert rows_by_group(alignment, side) == expected
            is_student = side == "student"
            assert alignment.scored_bytes <= alignment.completion_bytes
            assert is_student or alignment.completion_bytes == whole.completion_bytes


@pytest.mark.parametrize("student", ["qwen", "gpt2", "mistral"])
@pytest.mark.parametrize("teacher", ["tekken", "mistral", "gemma"])
def test_a_completion_cut_inside_a_character_is_scored_up_to_that_character(student, teacher):
    aligner = CompletionAligner(table(student), table(teacher))
    whole = aligner.student.encode("ok \U0001f980")
    cut = whole[:-1]
    spelled = aligner.student.texts(as_id_tensor(cut))[0]
    with pytest.raises(UnicodeDecodeError):
        spelled.decode()
    teacher_ids = aligner.teacher_ids(cut)
    assert aligner.teacher.texts(as_id_tensor(teacher_ids))[0] == b"ok "
    alignment = aligner.align(cut, teacher_ids)
    assert alignment.completion_bytes == len(spelled)
    assert 2 <= alignment.scored_bytes <= 3  # a token may hold the space and a part of the crab
    assert_groups_spell_the_same(aligner, {"student": cut, "teacher": teacher_ids}, alignment)


def test_bytes_that_are_not_utf8_leave_the_rest_and_the_end_of_turn_unscored():
    aligner = CompletionAligner(table("gpt2"), table("mistral"))
    one, two = aligner.student.encode("one"), aligner.student.encode(" two")
    stray = aligner.student.pieces.index(b"\x9f")
    student_ids = [*one, stray, *two, aligner.student.end_of_turn_id]
    teacher_ids = aligner.teacher_ids(student_ids)
    assert teacher_ids == aligner.teacher.encode("one")
    alignment = aligner.align(student_ids, teacher_ids)
    assert (alignment.scored_bytes, alignment.completion_bytes) == (3, 8)
    assert alignment.student_base_rows.tolist() == [len(one) - 1]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("names", [("byte level", "gemma"), ("gemma", "unigram")], ids=" to ".join)
def test_sampled_ids_are_aligned_as_they_are(names, data):
    """Not the tokens that the tokenizer would choose, special tokens and broken characters among
    them.
    """
    aligner = CompletionAligner(table(names[0]), table(names[1]))
    token_ids = st.integers(0, aligner.student.vocab_size + 2)
    student_ids = data.draw(st.lists(token_ids, max_size=30))
    try:
        teacher_ids = aligner.teacher_ids(student_ids)
    except ValueError as error:  # "\u2581" is a byte sequence that SentencePiece cannot spell
        assert (
            "must spell the text" in str(error)
            and b"\xe2" in aligner.student.texts(as_id_tensor(student_ids))[0]
        )
        return
    alignment = aligner.align(student_ids, teacher_ids)
    ids = {"student": student_ids, "teacher": teacher_ids}
    assert_groups_spell_the_same(aligner, ids, alignment)
    spelled = aligner.student.texts(as_id_tensor(student_ids))[0]
    assert alignment.completion_bytes == len(spelled)
    if spelled.decode(errors="ignore").encode() == spelled and alignment.num_groups:
        assert alignment.scored_bytes == len(spelled)


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=40))
@pytest.mark.parametrize("names", [("byte level", "gemma"), ("gemma", "byte level")])
def test_any_text_is_aligned_to_its_last_byte(names, text):
    if "\u2581" in text:  # SentencePiece's space
        return
    aligner, ids, alignment = aligned(names, text)
    assert alignment.scored_bytes == len(text.encode())
    assert assert_groups_spell_the_same(aligner, ids, alignment) == text.encode()


@pytest.mark.parametrize("teacher", ["qwen", "tekken", "gpt2", "mistral", "gemma", "word piece"])
@pytest.mark.parametrize("student", ["qwen", "mistral", "byte level"])
def test_the_literal_text_of_a_special_token_is_text(student, teacher):
    text = "<|im_end|>" + TEXTS["literal special tokens"]
    aligner, ids, alignment = aligned((student, teacher), text)
    for side in SIDES:
        spelling = getattr(aligner, side)
        assert not spelling.is_special[ids[side][:-1]].any()
        assert ids[side].count(spelling.end_of_turn_id) == 1
    assert alignment.scored_bytes == len(text)


def test_a_space_before_the_text_goes_with_the_first_byte():
    """SentencePiece writes a token "\u2581" before a line end; it spells nothing."""
    _, ids, alignment = aligned(("mistral", "gpt2"), "\nA", is_ended=False)
    assert len(ids["student"]) == 3
    assert rows_by_group(alignment, "student") == [[0, 1], [2]]
    assert rows_by_group(alignment, "teacher") == [[0], [1]]


@pytest.mark.parametrize("names", [p for p in PAIRS if set(p) <= set(REAL)], ids=" to ".join)
def test_an_empty_completion_has_its_end_of_turn_or_nothing(names):
    _, ids, alignment = aligned(names, "")
    assert [len(ids[side]) for side in SIDES] == [1, 1]
    assert rows_by_group(alignment, "student") == rows_by_group(alignment, "teacher") == [[0]]
    _, ids, alignment = aligned(names, "", is_ended=False)
    assert (ids["student"], ids["teacher"], alignment.num_groups) == ([], [], 0)
    assert alignment.student_base_rows.dtype == alignment.student_scalar_ids.dtype == torch.int64


def test_the_end_of_turn_is_a_group_only_if_both_sides_have_it():
    aligner, ids, alignment = aligned(("qwen", "gemma"), "one two")
    without = aligner.align(ids["student"][:-1], ids["teacher"])
    assert without.num_groups == alignment.num_groups - 1
    without = aligner.align(ids["student"], ids["teacher"][:-1])
    assert without.num_groups == alignment.num_groups - 1
    ended_early = [*aligner.teacher.encode("one"), ids["teacher"][-1]]
    early = aligner.align(ids["student"], ended_early)
    assert early.scored_bytes == 3, "two ends after different texts are no group"
    assert early.num_groups == aligner.align(ids["student"], ended_early[:-1]).num_groups
    skipped = aligned(("qwen", "gemma"), "one two", has_end_of_turn=False)[2]
    assert skipped.num_groups == alignment.num_groups - 1
    assert skipped.num_student_rows == alignment.num_student_rows


def test_any_end_token_ends_and_the_teacher_gets_its_end_of_turn():
    aligner = CompletionAligner(table("gemma"), table("qwen"))
    text, eos = aligner.student.encode("one two"), aligner.student.tokenizer.eos_token_id
    assert eos != aligner.student.end_of_turn_id
    teacher_ids = aligner.teacher_ids([*text, eos])
    assert teacher_ids[-1] == aligner.teacher.end_of_turn_id
    alignment = aligner.align([*text, eos], teacher_ids)
    assert alignment.student_base_rows[-1] == len(text)


def test_end_tokens_of_the_caller_are_taken():
    tokenizer = table("gemma").tokenizer
    stop = tokenizer.convert_tokens_to_ids("<start_of_turn>")
    aligner = CompletionAligner.from_tokenizers(tokenizer, tokenizer, student_end_ids=[stop])
    ids = [*aligner.student.encode("one"), stop]
    assert aligner.teacher_ids(ids)[-1] == aligner.teacher.end_of_turn_id
    assert aligner.align(ids, aligner.teacher_ids(ids)).student_base_rows[-1] == len(ids) - 1


def test_special_tokens_inside_a_completion_are_in_no_group():
    aligner = CompletionAligner(table("qwen"), table("mistral"))
    special = aligner.student.tokenizer.convert_tokens_to_ids("<|im_start|>")
    one, two = aligner.student.encode("one"), aligner.student.encode(" two")
    student_ids = [*one, special, *two]
    teacher_ids = aligner.teacher_ids(student_ids)
    assert teacher_ids == aligner.teacher.encode("one two")
    alignment = aligner.align(student_ids, teacher_ids)
    assert len(one) not in [row for rows in rows_by_group(alignment, "student") for row in rows]
    assert alignment.scored_bytes == alignment.completion_bytes == 7


def test_teacher_tokens_of_a_text_with_a_leading_space_align_with_a_student_who_cannot_tell():
    aligner = CompletionAligner(table("mistral"), table("gpt2"))
    student_ids, teacher_ids = aligner.student.encode(" The"), aligner.teacher.encode(" The")
    alignment = aligner.align(student_ids, teacher_ids)
    assert alignment.scored_bytes == alignment.completion_bytes == 4


def test_word_piece_takes_the_spaces_from_the_other_side():
    text = TEXTS["no space after punctuation"]
    for names in (("word piece", "gpt2"), ("gpt2", "word piece")):
        aligner = CompletionAligner(table(names[0]), table(names[1]))
        alignment = aligner.align(aligner.student.encode(text), aligner.teacher.encode(text))
        assert alignment.scored_bytes == alignment.completion_bytes == len(text)


def test_tensors_of_ids_are_taken_like_lists():
    aligner, ids, alignment = aligned(("qwen", "gemma"), TEXTS["a sentence"])
    tensors = [torch.tensor(ids[side]) for side in SIDES]
    assert aligner.teacher_ids(tensors[0]) == ids["teacher"]
    for a, b in zip(aligner.align(*tensors)[:10], alignment[:10], strict=True):
        assert torch.equal(a, b)


def test_sides_that_spell_different_texts_are_refused_with_both_names():
    aligner = CompletionAligner(table("qwen"), table("gemma"))
    with pytest.raises(ValueError, match=r"one text, got b'one' from Qwen.* b'two' from Gemma"):
        aligner.align(aligner.student.encode("one"), aligner.teacher.encode("two"))


def test_aligning_2000_tokens_takes_milliseconds():
    text = (TEXTS["a sentence"] + TEXTS["line ends"] + TEXTS["multi-byte characters"]) * 60
    aligner = CompletionAligner(table("qwen"), table("mistral"))
    student_ids = aligner.student.encode(text)[:2000]
    assert len(student_ids) == 2000
    teacher_ids = aligner.teacher_ids(student_ids)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        aligner.align(student_ids, teacher_ids)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02  # seen: 0.001 to 0.002 s; a busy machine takes longer
