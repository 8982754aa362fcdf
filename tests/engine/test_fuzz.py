"""A few seconds of support/fuzz.py; `make fuzz` goes on for minutes."""

import pytest
import torch

from support.fuzz import excess, make_case

NUM_CASES = {"torch": 300, "triton": 60}
FIRST_SEED = 10_000  # make fuzz starts at 0


@pytest.mark.parametrize("backend", NUM_CASES)
def test_no_random_case_is_wrong_beyond_its_bound(backend):
    wrong = {}
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_CASES[backend]):
        found = excess(seed, backend)
        if found:
            wrong[seed] = found
    assert not wrong


def test_the_cases_hold_what_they_promise():
    """Shapes 0 and 1, strides, masked columns, masked labels, both losses, all betas."""
    cases = [make_case(seed) for seed in range(FIRST_SEED, FIRST_SEED + NUM_CASES["torch"])]
    assert {case.loss for case in cases} == {"jsd", "uld"}
    assert {case.student.shape[0] for case in cases} >= {0, 1}
    assert any(case.student.shape[1] == 1 for case in cases)
    assert any(not case.student.is_contiguous() for case in cases)
    assert {case.beta for case in cases} >= {0.0, 1e-6, 1 - 1e-6, 1.0}
    masked = [torch.isneginf(case.student).any(0) for case in cases]
    assert any(columns.any() for columns in masked)
    scored = [
        (case.labels[1:], columns)
        for case, columns in zip(cases, masked, strict=True)
        if case.labels is not None
    ]
    on_masked = [
        bool(columns[label])
        for labels, columns in scored
        for label in labels.tolist()
        if 0 <= label < len(columns)
    ]
    assert any(on_masked) and not all(on_masked)
