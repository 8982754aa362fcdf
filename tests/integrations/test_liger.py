"""Liger's JSD losses and ours under their names, on Liger's own calls."""

import inspect
import types

import pytest
import torch

from gold_kernels.integrations import liger

chunked = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss", reason="of the extra dev")


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((6, 8), (11, 8), (6, 12), (11, 12))
    values = [torch.randn(*size, generator=generator, dtype=dtype) for size in sizes]
    values[0].requires_grad_()
    values[1].requires_grad_()
    return values, torch.tensor([3, -100, 7, 1, 10, -100])


def evaluate(module, given, *rest):
    for tensor in given[:2]:
        tensor.grad = None
    result = module(*given, *rest)
    parts = result if isinstance(result, tuple) else (result,)
    parts[0].backward()
    return [*(part.detach() for part in parts), *(tensor.grad for tensor in given[:2])]


CASES = {
    "default": {},
    "divergence alone": {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0},
    "reverse KL": {"beta": 1.0, "temperature": 2.0},
    "parts": {"return_soft_hard_loss": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_module_is_that_of_liger(options):
    given, labels = tensors()
    theirs = chunked.LigerFusedLinearJSDLoss(compiled=False, chunk_size=6, **options)
    ours = liger.LigerFusedLinearJSDLoss(compiled=False, chunk_size=2, **options)
    expected = evaluate(theirs, given, labels)
    actual = evaluate(ours, given, labels)
    assert len(actual) == len(expected)
    for found, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, value.to(found.dtype), rtol=1e-6, atol=1e-8)


def test_functional_form_is_the_divergence_of_the_module():
    """Liger's own is a Triton kernel for a GPU: its formula is that of its module."""
    given, labels = tensors()
    module = chunked.LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.3, temperature=0.7, compiled=False)
    expected = evaluate(module, given, labels)
    for form in (
        lambda *heads: liger.liger_fused_linear_jsd(*heads, 0.3, -100, 0.7),
        liger.LigerFusedLinearJSD(0.3, temperature=0.7),
    ):
        for found, value in zip(evaluate(form, given, labels), expected, strict=True):
            torch.testing.assert_close(found, value.to(found.dtype), rtol=1e-6, atol=1e-8)


def test_without_labels_all_rows_are_scored():
    given, labels = tensors()
    every = evaluate(liger.liger_fused_linear_jsd, given, labels.abs() % 11)
    for found, value in zip(evaluate(liger.LigerFusedLinearJSD(), given, None), every, strict=True):
        assert torch.equal(found, value)


def test_names_and_arguments_are_those_of_liger():
    from liger_kernel import transformers
    from liger_kernel.transformers import functional

    pairs = (
        (chunked.LigerFusedLinearJSDLoss, liger.LigerFusedLinearJSDLoss),
        (transformers.LigerFusedLinearJSD, liger.LigerFusedLinearJSD),
        (functional.liger_fused_linear_jsd, liger.liger_fused_linear_jsd),
    )
    for theirs, ours in pairs:
        assert ours.__name__ == theirs.__name__
        assert list(inspect.signature(ours).parameters) == list(
            inspect.signature(theirs).parameters
        )


def test_a_module_that_imported_liger_gets_ours_and_then_its_own():
    from liger_kernel.transformers import LigerFusedLinearJSD, functional

    trainer = types.ModuleType("my_trainer")
    own = (
        chunked.LigerFusedLinearJSDLoss,
        LigerFusedLinearJSD,
        functional.liger_fused_linear_jsd,
    )
    for value in own:
        setattr(trainer, value.__name__, value)
    with liger.patch_liger(trainer):
        found = [getattr(trainer, value.__name__) for value in own]
        assert found == list(liger.REPLACED)
    assert [getattr(trainer, value.__name__) for value in own] == list(own)


def test_a_second_patch_is_refused_and_undo_of_the_first_puts_ligers_back():
    trainer = types.ModuleType("my_trainer")
    trainer.LigerFusedLinearJSDLoss = chunked.LigerFusedLinearJSDLoss
    with liger.patch_liger(trainer):
        with pytest.raises(ValueError, match=r"my_trainer.LigerFusedLinearJSDLoss .* call undo"):
            liger.patch_liger(trainer)
        assert trainer.LigerFusedLinearJSDLoss is liger.LigerFusedLinearJSDLoss
    assert trainer.LigerFusedLinearJSDLoss is chunked.LigerFusedLinearJSDLoss
    liger.patch_liger(trainer).undo()
    assert trainer.LigerFusedLinearJSDLoss is chunked.LigerFusedLinearJSDLoss


def test_a_module_without_liger_is_refused_by_name():
    with pytest.raises(ValueError, match=r"has imported LigerFusedLinearJSDLoss.* got empty; pass"):
        liger.patch_liger(types.ModuleType("empty"))
    for given, got in (((), "nothing"), (("trainer",), "str"), ((torch.nn, None), "module, NoneT")):
        with pytest.raises(
            ValueError, match=f"patch_liger: the modules .* are expected, got {got}"
        ):
            liger.patch_liger(*given)


def test_without_labels_all_rows_are_scored_whatever_is_ignored():
    """Labels of 0 stood for none: with ignore_index=0 the loss was 0."""
    given, _ = tensors()
    expected = evaluate(liger.LigerFusedLinearJSD(0.3), given, None)
    assert float(expected[0]) > 0
    for ignored in (0, 1, 5):
        actual = evaluate(liger.LigerFusedLinearJSD(0.3, ignore_index=ignored), given, None)
        assert all(map(torch.equal, actual, expected))


def test_states_of_any_shape_and_size_are_rows():
    """One row, no entries of a hidden state, and what is no row at all."""
    given, labels = tensors()
    module = liger.LigerFusedLinearJSD(0.3)
    expected = module(given[0][:1], given[1], given[2][:1], given[3], labels[:1])
    one = module(given[0][0], given[1], given[2][0], given[3], labels[0])
    assert torch.equal(one, expected)
    empty, head = torch.zeros(2, 3, 0), torch.zeros(11, 0)
    assert float(module(empty, head, empty, head, torch.zeros(2, 3, dtype=torch.int64))) == 0
    with pytest.raises(ValueError, match=r"student_input must be \(N, D\) or .* got shape \(\)"):
        module(labels[0].float(), *given[1:], labels[0])
    with pytest.raises(ValueError, match="student_input must be a tensor, got list"):
        module(given[0].tolist(), *given[1:], None)


def test_numbers_are_refused_when_the_module_is_built():
    for options, message in (
        ({"jsd_beta": 2.0}, "beta must be in"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"ignore_index": "x"}, "ignore_index must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            liger.LigerFusedLinearJSD(**options)
