"""Tables of tokens lie on the CPU, in their own dtypes, whatever torch's defaults are."""

from contextlib import contextmanager

import pytest
import torch

from gold_kernels import CompletionAligner, VocabOverlap, VocabProjection
from gold_kernels.tokens.token_bytes import TokenBytes
from support.tokenizers_cases import TOKENIZERS

TEXT = "The digit is 7, \u65e5\u672c and so on."


def made(tokenizers):
    """All that is made of two tokenizers, as tensors."""
    student, teacher = map(TokenBytes, tokenizers)
    aligner = CompletionAligner(student, teacher)
    ids = student.encode("The digit is 7." if student.is_spaced or teacher.is_spaced else TEXT)
    alignment = aligner.align(ids, aligner.teacher_ids(ids))
    overlap = VocabOverlap.from_token_bytes(student, teacher)
    projection = VocabProjection.from_token_bytes(student, teacher)
    relaxed = projection.relaxed_overlap(overlap)
    tensors = [student.lengths, *aligner.align([], [])[:10], *alignment[:10], *overlap[:2]]
    return [*tensors, *projection[:2], *projection.folds.tensors(), *relaxed[:2]]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("names", [("byte level", "gemma"), ("word piece", "byte level")])
def test_a_default_device_and_a_default_dtype_change_nothing(names):
    """On the meta device a tensor has no numbers; sums of weights in bfloat16 lost their digits."""
    tokenizers = [TOKENIZERS[name]() for name in names]
    expected = made(tokenizers)
    with torch.device("meta"):
        of_device = made(tokenizers)
    with default_dtype(torch.bfloat16):
        of_dtype = made(tokenizers)
    for actual in (of_device, of_dtype):
        assert all(map(torch.equal, actual, expected))
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
