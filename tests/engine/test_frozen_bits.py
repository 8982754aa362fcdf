"""Losses and gradients are those of the record, bit for bit where it was made."""

import json

import pytest
import torch

from support.frozen_cases import RECORD, digest, fingerprint, frozen_calls

if torch.cuda.is_available():
    pytest.skip("the record is of the interpreter, which needs no GPU", allow_module_level=True)
record = json.loads(RECORD.read_text(encoding="utf-8"))
CALLS = dict(frozen_calls())
# Elsewhere other bits are right too: products of half precision round differently.
ROUNDING = {"float16": 2e-3, "bfloat16": 2e-2, "fast": 2e-2}


def test_the_record_and_the_calls_are_the_same_cases():
    assert list(CALLS) == list(record["cases"])


@pytest.mark.parametrize("name", CALLS)
def test_losses_and_gradients_are_those_of_the_record(name):
    expected, actual = record["cases"][name], digest(CALLS[name]())
    if fingerprint() == record["where"]:
        assert actual["sha256"] == expected["sha256"]
    rounding = next((limit for kind, limit in ROUNDING.items() if kind in name), 1e-4)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=rounding, abs=1e-6)
