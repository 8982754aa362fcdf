"""Tables of tokens lie on the CPU, in their own dtypes, whatever torch's defaults are."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import gold_kernels
from gold_kernels import CompletionAligner, VocabOverlap, VocabProjection
from gold_kernels.tokens.token_bytes import TokenBytes
from support.tokenizers_cases import TOKENIZERS

MAKERS = {
    *("arange", "empty", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randn", "randperm", "tensor", "zeros"),
}
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


def test_every_tensor_is_made_on_a_device_that_is_named():
    """One in pinned memory, of which a GPU's are not, was on the default device."""
    unnamed, makers = [], 0
    for path in Path(gold_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if ast.unparse(node.func.value) == "torch" and node.func.attr in MAKERS:
                makers += 1
                if "device" not in {keyword.arg for keyword in node.keywords}:
                    unnamed.append(f"{path.name}:{node.lineno}")
    assert makers > 20 and not unnamed
