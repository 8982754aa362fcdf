"""TokenBytes: every token's bytes, whatever the kind of tokenizer."""

import copy
import pickle
import subprocess
import sys
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gold_kernels import CompletionAligner
from gold_kernels.tokens.token_bytes import TokenBytes, as_id_tensor
from support.tiny_processors import FAMILIES, VLM_FAMILIES, tiny_processor, tiny_tokenizer
from support.tokenizers_cases import (
    REFUSED,
    TEXTS,
    TOKENIZERS,
    sentencepiece_model,
    table,
    word_piece,
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_spell_every_text_or_the_text_is_refused(name):
    for text_name, text in TEXTS.items():
        if text_name in REFUSED.get(name, set()):
            with pytest.raises(ValueError, match=r"TokenBytes\.encode: .* must spell the text"):
                table(name).encode(text)
            continue
        tokens = as_id_tensor(table(name).encode(text))
        assert not table(name).is_special[tokens].any(), text_name
        ends = table(name).byte_ends(tokens, text.encode()).tolist()
        assert ends == sorted(ends), text_name
        assert (ends or [0])[-1] == len(text.encode()), text_name
        if not table(name).is_spaced:
            assert text.encode() in table(name).texts(tokens), text_name


@pytest.mark.parametrize("name", ["qwen", "tekken", "gpt2", "mistral", "gemma", "unigram"])
def test_bytes_are_those_that_the_tokenizer_decodes(name):
    text = "".join(TEXTS[key] for key in ("a sentence", "line ends", "emoji sequence"))
    tokens = table(name).encode(text)
    decoded = table(name).tokenizer.decode(tokens)
    assert decoded.encode() == table(name).texts(as_id_tensor(tokens))[0]


def test_the_sentencepiece_tokenizer_gives_the_ids_of_sentencepiece_itself():
    for name, text in TEXTS.items():
        if name not in ("leading space", "leading spaces", "one space", "rare characters"):
            assert table("mistral").encode(text) == sentencepiece_model().encode(text), name


def test_the_gpt2_tokenizer_gives_known_ids():
    assert table("gpt2").encode("Hello world") == [15496, 995]


def test_a_multi_byte_character_may_be_split_across_tokens():
    split = table("gpt2").encode(TEXTS["emoji sequence"])
    pieces = [table("gpt2").pieces[token_id] for token_id in split]
    with pytest.raises(UnicodeDecodeError):
        [piece.decode() for piece in pieces]
    assert b"".join(pieces).decode() == TEXTS["emoji sequence"]


def test_the_space_that_sentencepiece_puts_before_a_text_is_no_byte_of_it():
    tokens = as_id_tensor(table("mistral").encode("\nA"))
    assert [table("mistral").pieces[i] for i in tokens.tolist()] == [b" ", b"\n", b"A"]
    assert table("mistral").byte_ends(tokens, b"\nA").tolist() == [0, 1, 2]
    assert table("mistral").texts(tokens) == [b"\nA", b" \nA"]


def test_a_leading_space_of_the_text_is_kept_where_the_tokenizer_adds_none():
    for name in ("mistral", "unigram"):
        assert table(name).encode(" The") == table(name).encode("The"), "no precondition"
        tokens = as_id_tensor(table(name).encode(" The"))
        assert table(name).byte_ends(tokens, b" The")[-1] == 4
        assert table(name).byte_ends(tokens, b"The")[-1] == 3


def test_a_byte_level_tokenizer_that_adds_a_space_adds_none_to_a_space():
    tokenizer = copy.deepcopy(TOKENIZERS["byte level"]())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    prefixed = TokenBytes(tokenizer)
    assert prefixed.encode("The") == prefixed.encode(" The"), "no precondition"
    for text in ("The", "  The", " ", "   "):
        tokens = as_id_tensor(prefixed.encode(text))
        assert prefixed.texts(tokens)[0].decode() == text
        teacher_ids = CompletionAligner(prefixed, table("gemma")).teacher_ids(tokens)
        assert table("gemma").spelled(as_id_tensor(teacher_ids)).decode() == text


def test_word_piece_ends_follow_the_text_where_it_has_spaces_and_where_not():
    tokens = as_id_tensor(table("word piece").encode("don't  stop"))
    text = table("word piece").texts(tokens)[0]
    assert text == b"don ' t stop"
    assert table("word piece").byte_ends(tokens, b"don't  stop")[-1] == 11
    assert table("word piece").byte_ends(tokens, b"don't stop")[-1] == 10
    assert table("word piece").byte_ends(tokens, b"done") is None
    cut = table("word piece").byte_ends(tokens, b"don't  sto")  # inside the last token
    assert cut is not None and cut[-1] == 11


@pytest.mark.parametrize(
    ("tokenizer", "text", "got"),
    [
        (lambda: word_piece(lowercase=True), "The Digit", "the digit"),
        (lambda: table("qwen").tokenizer, "cafe\u0301", "\u00e9"),  # NFC
        (lambda: table("mistral").tokenizer, "a\u2581b", " b"),
    ],
)
def test_text_that_the_tokenizer_changes_is_an_error_with_tokenizer_and_text(tokenizer, text, got):
    spelling = TokenBytes(tokenizer())
    with pytest.raises(ValueError) as error:
        spelling.encode(text)
    for part in (spelling.name, repr(text), repr(got.encode())[2:-1], "normalise the text"):
        assert part in str(error.value)


def test_text_with_characters_outside_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="must spell the text"):
        table("word piece").encode("a \u0e01 b")


def test_special_tokens_spell_nothing_and_other_added_tokens_are_text():
    tokenizer = table("qwen").tokenizer
    end, think = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>"])
    assert table("qwen").pieces[end] == b""
    assert table("qwen").pieces[think] == b"<think>"
    assert table("qwen").encode("<think>") == [think]
    assert end not in table("qwen").encode("<|im_end|>")
    assert tokenizer("<|im_end|>")["input_ids"] == [end], "encode() must leave parsing as it was"


def test_added_tokens_of_a_byte_level_tokenizer_are_written_in_characters():
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.add_tokens(["caf\u00e9"])
    spelling = TokenBytes(tokenizer)
    tokens = spelling.encode("a caf\u00e9")
    assert tokens[-1] == tokenizer.convert_tokens_to_ids("caf\u00e9")
    assert spelling.pieces[tokens[-1]] == "caf\u00e9".encode()


def test_a_token_with_a_role_spells_nothing_even_if_it_was_added_as_text():
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.add_tokens(["<stop>"])
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    assert TokenBytes(tokenizer).pieces[stop] == b"<stop>"
    tokenizer.eos_token = "<stop>"
    assert not tokenizer.added_tokens_decoder[stop].special, "no precondition"
    assert TokenBytes(tokenizer).pieces[stop] == b""


def test_a_special_token_before_the_text_ends_at_its_first_byte():
    tokens = as_id_tensor([table("mistral").tokenizer.bos_token_id, *table("mistral").encode("A")])
    assert table("mistral").byte_ends(tokens, b"A").tolist() == [0, 1]


def test_ids_beyond_the_vocabulary_spell_nothing():
    tokens = as_id_tensor([*table("gemma").encode("one"), 10**6])
    assert table("gemma").texts(tokens) == [b"one"]
    assert table("gemma").is_text(tokens).tolist()[-1] is False


def test_byte_fallback_tokens_are_one_byte_each():
    fallback = table("mistral").fallback_ids
    assert sorted(table("mistral").pieces[i] for i in fallback) == [bytes([b]) for b in range(256)]
    assert table("qwen").fallback_ids == frozenset()


def test_byte_fallback_tokens_that_were_added_as_special_ones_are_bytes():
    """A tokenizer that is trained gets them so: texts with any of them were refused."""
    vocab = {"<unk>": 0, "a": 1, "\u2581": 2, "<0xC3>": 3, "<0xA9>": 4, "</s>": 5}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<0xC3>", "<0xA9>", "</s>"])
    spelling = TokenBytes(
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    )
    assert spelling.encode("a \u00e9") == [1, 2, 3, 4]
    assert spelling.is_text(torch.tensor([0, 3, 4, 5])).tolist() == [False, True, True, False]


def test_without_byte_fallback_its_tokens_are_text():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("<0x41>", -1.0), ("A", -1.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    spelling = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert spelling.encode("A<0x41>A") == [2, 1, 2]
    assert spelling.fallback_ids == frozenset()


def test_the_space_of_a_normalizer_is_no_byte_of_the_text_whatever_the_decoder_strips():
    """SentencePiece as older conversions write it."""
    vocab = {"<unk>": 0, "\u2581": 1, "a": 2, "\u2581a": 3}
    backend = Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    spelling = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    tokens = as_id_tensor(spelling.encode("a a"))
    assert tokens.tolist() == [3, 3]
    assert spelling.byte_ends(tokens, b"a a").tolist() == [1, 3]


def test_byte_level_entries_outside_the_alphabet_are_what_the_decoder_writes():
    backend = Tokenizer(models.BPE({"\u65e5": 0, "\u0120a": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    spelling = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    for token_id in (0, 1):
        assert spelling.pieces[token_id].decode() == backend.decode([token_id])


def test_end_of_turn_is_what_the_chat_template_writes_after_an_answer():
    gemma = table("gemma")
    assert gemma.end_of_turn_id == gemma.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert gemma.end_ids == {gemma.end_of_turn_id, gemma.tokenizer.eos_token_id}
    assert table("gpt2").end_of_turn_id == table("gpt2").tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_turn_is_found_for_contents_of_text_and_of_parts(family):
    tokenizer = tiny_tokenizer(family)
    assert TokenBytes(tokenizer).end_of_turn_id == tokenizer.eos_token_id


def test_end_tokens_can_be_given():
    spelling = TokenBytes(tiny_tokenizer("qwen3"), end_of_turn_id=7, end_ids=[8, 9])
    assert (spelling.end_of_turn_id, spelling.end_ids) == (7, {7, 8, 9})


def test_a_chat_template_that_renders_no_answer_asks_for_the_end_of_turn():
    tokenizer = tiny_tokenizer("qwen3")
    for template in ("{{ raise_exception('no') }}", "nothing"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=r"must render a question and its answer.*pass end_of"):
            TokenBytes(tokenizer)
        assert TokenBytes(tokenizer, end_of_turn_id=3).end_of_turn_id == 3


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_a_processor_is_refused_and_its_tokenizer_taken(family):
    processor = tiny_processor(family)
    with pytest.raises(ValueError, match=r"fast tokenizer .* is expected, got .*Processor"):
        TokenBytes(processor)
    assert TokenBytes(processor.tokenizer).vocab_size == len(processor.tokenizer)


@pytest.mark.parametrize("decoder", [None, decoders.CTC(), decoders.BPEDecoder()])
def test_other_kinds_of_tokenizers_are_refused(decoder):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(ValueError, match="must be byte-level BPE, SentencePiece or WordPiece"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@pytest.mark.parametrize("ids", [[3, -100], torch.tensor([[1, 2]]), torch.tensor([-1])])
def test_ids_that_are_no_completion_are_refused(ids):
    with pytest.raises(ValueError, match=r"one completion, .* are expected, got shape"):
        as_id_tensor(ids)


def test_a_table_travels_to_spawned_workers():
    copy = pickle.loads(pickle.dumps(table("gemma")))
    assert copy.encode("two  words") == table("gemma").encode("two  words")
    assert copy.pieces == table("gemma").pieces


def test_the_table_of_150k_tokens_takes_about_half_a_second():
    start = time.perf_counter()
    TokenBytes(table("qwen").tokenizer)
    assert time.perf_counter() - start < 4  # seen: 0.4 to 0.6 s; a busy machine takes longer


def test_alignment_and_vocabulary_import_no_tokenizer_package():
    code = (
        "import sys, gold_kernels.tokens.alignment, gold_kernels.tokens.vocabulary\n"
        "assert not {'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
