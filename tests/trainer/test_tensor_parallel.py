"""Student and teacher that transformers has spread over two processes train as whole ones do."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.processes import start_ranks
from support.tensor_parallel_step import CASES, run, save_models


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    done = start_ranks("tensor_parallel_step", 2, str(folder))
    assert done.returncode == 0, done.stderr
    return folder, torch.load(folder / "state.pt", weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_a_model_in_slices_trains_and_is_saved_as_a_whole_one(case, parallel):
    """Losses, norms of gradients and evaluation; on its own rollouts, and across tokenizers."""
    folder, state = parallel
    whole = run(folder, case, False)
    assert state[case]["numbers"] == pytest.approx(whole["numbers"], rel=1e-4)
    if case == list(CASES)[-1]:
        sides = [
            AutoModelForCausalLM.from_pretrained(one["saved"]).state_dict()
            for one in (state[case], whole)
        ]
        for name, weight in sides[1].items():  # Adam's first steps magnify what rounding leaves
            assert (sides[0][name] - weight).norm() <= 1e-2 * weight.norm(), name


def test_what_would_train_wrongly_is_refused(parallel):
    expected = (
        "have their lm_head in slices of the same processes, or both whole, got a whole tea",
        "in slices needs a student in as many, .* got tp_size=2 and 1; load the student",
        r"must be 1 .* \(k_norm, q_norm\), got 2: .*; raise per_device",
        "layers must be whole, got a student with tp_size=2, .*; train it with FSDP",
    )
    messages = parallel[1]["refusals"]
    assert len(messages) == len(expected)
    for message, pattern in zip(messages, expected, strict=True):
        assert re.search(f"GOLDTrainer: .*{pattern}", message), message
