"""VocabOverlap: entries matched by bytes and by role, one with one."""

from itertools import product

import pytest
import torch

from gold_kernels.tokens.vocabulary import VocabOverlap
from support.tiny_processors import tiny_tokenizer
from support.tokenizers_cases import CORPUS, TOKENIZERS, table, word_piece


def overlap(student: str, teacher: str) -> VocabOverlap:
    return VocabOverlap.from_token_bytes(table(student), table(teacher))


def token_id(name: str, token: str) -> int:
    found = table(name).tokenizer.convert_tokens_to_ids(token)
    assert table(name).tokenizer.convert_ids_to_tokens(found) == token
    return found


def partner(pair: VocabOverlap, student_id: int) -> int | None:
    found = pair.teacher_ids[pair.student_ids == student_id].tolist()
    return found[0] if found else None


@pytest.mark.parametrize("names", list(product(TOKENIZERS, repeat=2)), ids=" to ".join)
def test_pairs_are_one_to_one_with_equal_bytes_or_roles(names):
    student, teacher = (table(name) for name in names)
    pair = overlap(*names)
    assert pair.num_matched > 0
    assert pair.student_ids.dtype == pair.teacher_ids.dtype == torch.int64
    assert pair.student_ids.unique().shape == pair.student_ids.shape
    assert pair.teacher_ids.unique().shape == pair.teacher_ids.shape
    assert pair.student_ids.tolist() == sorted(pair.student_ids.tolist())
    num_special = 0
    for a, b in zip(pair.student_ids.tolist(), pair.teacher_ids.tolist(), strict=True):
        assert student.pieces[a] == teacher.pieces[b]
        num_special += not student.pieces[a]
    has_other_eos = all(side.roles["eos"] != side.end_of_turn_id for side in (student, teacher))
    assert num_special == 1 + has_other_eos, "end of turn, and eos if it is another on both sides"
    assert partner(pair, student.end_of_turn_id) == teacher.end_of_turn_id
    # Nothing is left that could be matched.
    matched_ids = set(pair.student_ids.tolist())
    matched = {student.pieces[token_id] for token_id in matched_ids}
    left = {p for token_id, p in enumerate(student.pieces) if p and token_id not in matched_ids}
    assert not (left - matched) & set(teacher.pieces)


def test_the_swapped_pair_matches_the_same_entries():
    pair, swapped = overlap("qwen", "mistral"), overlap("mistral", "qwen")
    pairs = zip(pair.student_ids.tolist(), pair.teacher_ids.tolist(), strict=True)
    swapped_pairs = zip(swapped.teacher_ids.tolist(), swapped.student_ids.tolist(), strict=True)
    assert sorted(pairs) == sorted(swapped_pairs)


@pytest.mark.parametrize("token", ["the", "number"])
def test_a_word_after_a_space_matches_across_alphabets(token):
    byte_level, sentence_piece = (
        token_id("qwen", "\u0120" + token),
        token_id("mistral", "\u2581" + token),
    )
    assert partner(overlap("qwen", "mistral"), byte_level) == sentence_piece
    assert partner(overlap("gpt2", "mistral"), token_id("gpt2", "\u0120" + token)) == sentence_piece
    assert partner(overlap("qwen", "mistral"), token_id("qwen", token)) == token_id(
        "mistral", token
    )


def test_characters_beyond_ascii_match_by_their_bytes():
    word = "\u00e9t\u00e9"  # the byte-level token is other characters
    [qwen] = table("qwen").encode(word)
    [tekken] = table("tekken").encode(word)
    assert table("qwen").tokenizer.convert_ids_to_tokens(qwen) != word
    assert partner(overlap("qwen", "tekken"), qwen) == tekken


def test_equal_bytes_prefer_the_ordinary_token_to_byte_fallback():
    letter, fallback = token_id("mistral", "A"), token_id("mistral", "<0x41>")
    assert fallback < letter, "no precondition: the lowest id would be right"
    assert partner(overlap("qwen", "mistral"), token_id("qwen", "A")) == letter
    line_end = token_id("mistral", "<0x0A>")  # there is no other
    assert partner(overlap("qwen", "mistral"), token_id("qwen", "\u010a")) == line_end


def test_equal_bytes_take_the_lowest_id():
    student = word_piece()
    student.add_tokens(["##qq", " zz", "qq"])  # the last spells what the first does
    pair = VocabOverlap.from_tokenizers(student, student)
    first, other = student.convert_tokens_to_ids(["##qq", "qq"])
    assert partner(pair, first) == first
    assert partner(pair, other) == other  # WordPiece: " qq"
    letters = tiny_tokenizer("qwen3")
    spelled_twice = letters.convert_tokens_to_ids("\u0120is")
    letters.add_tokens([" is"])
    again = letters.convert_tokens_to_ids(" is")
    pair = VocabOverlap.from_tokenizers(letters, letters)
    assert (partner(pair, spelled_twice), partner(pair, again)) == (spelled_twice, None)


def test_special_tokens_match_by_role_and_not_by_their_text():
    """SmolVLM's pad token and Qwen's end of turn are both written <|im_end|>."""
    student, teacher = tiny_tokenizer("smolvlm"), tiny_tokenizer("qwen3")
    assert student.pad_token == teacher.eos_token == "<|im_end|>"
    pair = VocabOverlap.from_tokenizers(student, teacher)
    assert partner(pair, student.eos_token_id) == teacher.eos_token_id
    assert partner(pair, student.pad_token_id) is None
    assert student.convert_tokens_to_ids("<|im_start|>") not in pair.student_ids.tolist()


def test_pad_is_never_matched():
    tokenizer = tiny_tokenizer("llama")
    pair = VocabOverlap.from_tokenizers(tokenizer, tokenizer)
    assert tokenizer.pad_token_id not in pair.student_ids.tolist()
    assert tokenizer.bos_token_id not in pair.student_ids.tolist()


def test_the_end_of_turn_matches_the_end_of_turn_where_eos_is_another_token():
    gemma, qwen = table("gemma"), table("qwen")
    assert gemma.end_of_turn_id != gemma.tokenizer.eos_token_id
    pair = overlap("gemma", "qwen")
    assert partner(pair, gemma.end_of_turn_id) == qwen.end_of_turn_id
    assert partner(pair, gemma.tokenizer.eos_token_id) is None
    both = VocabOverlap.from_tokenizers(
        gemma.tokenizer, qwen.tokenizer, teacher_end_of_turn_id=token_id("qwen", "<|endoftext|>")
    )
    assert partner(both, gemma.tokenizer.eos_token_id) == qwen.tokenizer.eos_token_id
    assert partner(both, gemma.end_of_turn_id) == token_id("qwen", "<|endoftext|>")


def test_an_end_of_turn_that_is_text_is_in_one_pair():
    student = tiny_tokenizer("qwen3")
    line_end = student.convert_tokens_to_ids("\u010a")
    pair = VocabOverlap.from_tokenizers(student, student, student_end_of_turn_id=line_end)
    assert partner(pair, line_end) == student.eos_token_id
    assert pair.student_ids.unique().shape == pair.student_ids.shape


def test_one_tokenizer_matches_all_its_text_with_itself():
    pair = overlap("tekken", "tekken")
    assert torch.equal(pair.student_ids, pair.teacher_ids)
    num_special = int(table("tekken").is_special[:-1].sum())
    assert pair.num_matched == table("tekken").vocab_size - num_special + 1


def test_vocabularies_without_a_common_entry_are_an_empty_overlap():
    student, teacher = word_piece(), word_piece()
    disjoint = [f"x{i}" for i in range(3)]
    student = type(student)(
        tokenizer_object=_only(student, disjoint), unk_token="x0", chat_template=None
    )
    pair = VocabOverlap.from_tokenizers(student, teacher)
    assert (pair.num_matched, pair.student_share, pair.teacher_share) == (0, 0.0, 0.0)
    assert pair.student_mass(torch.full((2, 3), 1 / 3)).tolist() == [0.0, 0.0]


def _only(tokenizer, tokens):
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="x0"))
    backend.decoder = decoders.WordPiece()
    return backend


def test_shares_and_report_are_of_each_vocabulary():
    pair = overlap("qwen", "mistral")
    assert pair.student_share == pair.num_matched / len(table("qwen").tokenizer)
    assert pair.teacher_share == pair.num_matched / len(table("mistral").tokenizer)
    assert 0.15 < pair.student_share < 0.25 < 0.9 < pair.teacher_share
    assert pair.report() == (
        f"{pair.num_matched} entries matched: {pair.student_share:.1%} of the student's 151648, "
        f"{pair.teacher_share:.1%} of the teacher's 32000"
    )
    counts = torch.zeros(pair.teacher_vocab_size, dtype=torch.int64)
    counts[pair.teacher_ids[0]] = 3
    counts[(~torch.isin(torch.arange(32000), pair.teacher_ids)).nonzero()[0]] = 1
    assert pair.report(teacher_weights=counts) == (
        f"{pair.report()}, 75.0% of the teacher's probability mass"
    )
    probabilities = torch.zeros(2, pair.student_vocab_size)
    probabilities[:, pair.student_ids[0]] = torch.tensor([1.0, 0.5])
    probabilities[1, (~torch.isin(torch.arange(151648), pair.student_ids)).nonzero()[0]] = 0.5
    assert pair.report(probabilities) == (
        f"{pair.report()}, 75.0% of the student's probability mass"
    )


def test_matched_mass_of_probabilities_and_of_token_counts():
    pair = overlap("qwen", "gpt2")
    logits = torch.randn(5, pair.student_vocab_size + 64)  # a padded head
    probabilities = logits.softmax(-1)
    expected = torch.zeros(5)
    for student_id in pair.student_ids.tolist():
        expected += probabilities[:, student_id]
    torch.testing.assert_close(pair.student_mass(probabilities), expected)

    tokens = [token for text in CORPUS for token in table("gpt2").encode(text)]
    counts = torch.bincount(torch.tensor(tokens), minlength=pair.teacher_vocab_size)
    matched = set(pair.teacher_ids.tolist())
    share = sum(token in matched for token in tokens) / len(tokens)
    assert pair.teacher_mass(counts).item() == pytest.approx(share)
    assert 0.9 < share < 1


def test_mass_of_bfloat16_probabilities_is_summed_in_float32():
    pair = overlap("qwen", "gpt2")
    uniform = torch.full((pair.student_vocab_size,), 1 / 4096, dtype=torch.bfloat16)
    assert pair.student_mass(uniform).item() == pytest.approx(pair.student_share, rel=1e-4)


def test_an_overlap_moves_to_a_device():
    moved = overlap("qwen", "gpt2").to("meta")
    assert moved.student_ids.device.type == moved.teacher_ids.device.type == "meta"
    assert moved.student_vocab_size == table("qwen").vocab_size
