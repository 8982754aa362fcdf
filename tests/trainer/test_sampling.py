"""Drawing a token: from the distribution of transformers' processors, by a row's own numbers."""

import pytest
import torch
from transformers.generation import logits_process as library

from gold_kernels.triton.launch import is_interpreted
from gold_trainer.writers import Sampling, sampling
from gold_trainer.writers.sampling_kernel import draw_rows

ENTRIES, DRAWS = 100, 20000
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SETTINGS = [(1.0, 0, None), (0.9, 0, None), (1.0, 7, None), (1.0, 0, 0.1), (0.7, 30, 0.02)]


def sampling_of(top_p, top_k, min_p):
    return Sampling((1,), frozenset(range(ENTRIES)), 1.0, top_p, top_k, min_p)


def expected_logprobs(logits, top_p, top_k, min_p):
    processors = [
        *([library.TopKLogitsWarper(top_k)] if top_k else []),
        *([library.TopPLogitsWarper(top_p)] if top_p < 1 else []),
        *([library.MinPLogitsWarper(min_p)] if min_p else []),
    ]
    return library.LogitsProcessorList(processors)(None, logits.clone()).log_softmax(-1)


def keys_of(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(*sampling.KEYS, (num_rows, 2), generator=generator).int()


@pytest.mark.parametrize(("top_p", "top_k", "min_p"), SETTINGS)
def test_draws_have_the_frequencies_of_the_distribution(top_p, top_k, min_p):
    logits = 2 * torch.randn(1, ENTRIES)
    expected = expected_logprobs(logits, top_p, top_k, min_p)[0]
    settings = sampling_of(top_p, top_k, min_p)
    ids, logprobs = sampling.draw(logits.expand(DRAWS, -1).contiguous(), keys_of(DRAWS), settings)
    torch.testing.assert_close(logprobs, expected[ids], atol=1e-5, rtol=0)
    probs, counts = expected.exp(), torch.bincount(ids, minlength=ENTRIES)
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    chi_squared = ((counts - DRAWS * probs)[kept].square() / (DRAWS * probs)[kept]).sum()
    degrees = max(int(kept.sum()) - 1, 1)
    assert chi_squared < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.skipif(not (is_interpreted() or torch.cuda.is_available()), reason="no Triton here")
@pytest.mark.parametrize("entries", [ENTRIES, 1000])
@pytest.mark.parametrize(("top_p", "top_k", "min_p"), SETTINGS)
def test_the_kernel_draws_what_plain_torch_draws(entries, top_p, top_k, min_p):
    device = DEVICES[-1]
    logits = (3 * torch.randn(6, entries)).to(device)
    logits[:, 5:40:3] = -torch.inf
    settings, keys = sampling_of(top_p, top_k, min_p), keys_of(6).to(device)
    kept = sampling.filtered(logits, settings)
    ids = (kept - sampling.exponential(keys, entries).log()).argmax(-1)
    logprobs = kept.gather(1, ids[:, None])[:, 0] - kept.logsumexp(-1)
    actual = draw_rows(sampling.without_unlikely(logits, top_k), keys, settings)
    assert torch.equal(actual[0], ids)
    torch.testing.assert_close(actual[1], logprobs, atol=2e-6, rtol=1e-5)


def test_numbers_of_the_hash_are_exponential_and_those_of_two_keys_differ():
    values = sampling.exponential(keys_of(4), 100_000).double()
    for shown, expected in ((values.mean(1), 1.0), (values.var(1), 1.0)):
        torch.testing.assert_close(shown, torch.full_like(shown, expected), atol=0.03, rtol=0)
    assert (torch.corrcoef(values) - torch.eye(4)).abs().max() < 0.02
    for low in (1e-4, 1e-2, 1.0):
        share = (values < low).double().mean().item()
        assert share == pytest.approx(-torch.expm1(torch.tensor(-low)).item(), rel=0.15)


def test_the_nucleus_is_the_smallest_set_of_its_mass():
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
    for top_p, expected in ((0.4, 0.5), (0.6, 0.3), (0.85, 0.15), (0.99, 0.05)):
        threshold = sampling.nucleus_threshold(probs, top_p)
        torch.testing.assert_close(threshold[0], torch.tensor([expected]))
        assert threshold[1] == 0.25, "of equals all are kept"


def test_a_known_token_beyond_the_nucleus_has_a_finite_logprob():
    logits = torch.tensor([[5.0, 4.0, 0.0]])
    settings, none = sampling_of(0.5, 0, None), torch.zeros(3, dtype=torch.bool)
    likely = sampling.logprobs_of(logits, torch.tensor([0]), settings, none)
    assert likely == 0.0
    rest = sampling.logprobs_of(logits, torch.tensor([2]), settings, none)
    torch.testing.assert_close(rest, torch.log_softmax(logits[:, [0, 2]], -1)[:, 1])


def test_the_smallest_set_of_likely_tokens_may_have_its_mass_exactly():
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    for top_p, least in ((0.5, 0.5), (0.75, 0.25), (0.76, 0.125)):
        assert sampling.nucleus_threshold(probs, top_p).item() == least
