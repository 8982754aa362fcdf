"""A plan counts what each loss takes, with a cross-entropy beside it and without."""

import pytest
import torch

from gold_kernels import fused_linear_top_k, head_top_k
from gold_trainer.__main__ import main
from gold_trainer.planning import passes
from gold_trainer.planning.ledger import Ledger
from gold_trainer.planning.memory import Planner, Setup
from gold_trainer.planning.passes import Stored
from gold_trainer.planning.remedies import remedies
from support.cache_cases import save_pair
from support.plan_cases import subject_of

HYBRID = {"uld_use_hybrid_loss": True, "uld_relaxed_overlap": True}


@pytest.fixture(scope="module")
def across(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("across"), "qwen3", "llama", count=2)


def moment(name="forward pass of the student", **fields):
    return dict(Planner(subject_of("qwen3", **fields), Setup())._moments())[name]


@pytest.mark.parametrize("loss_top_k", [0, 5])
def test_a_cross_entropy_can_be_planned(loss_top_k):
    alone, both = (
        moment(loss_top_k=loss_top_k, crossentropy_weight=weight)["loss"] for weight in (0.0, 0.5)
    )
    assert 0 < alone <= both < 1.1 * alone


@pytest.mark.parametrize(
    "fields",
    [{}, HYBRID, {"uld_loss_type": "chunk_likelihood"}, {"uld_loss_type": "projected_jsd"}],
)
def test_losses_across_tokenizers_can_be_planned(fields, across, capsys):
    argv = across.command(uld_crossentropy_weight=0.5, **fields)
    assert main(["plan", *[word for word in argv if "use_cpu" not in word]]) == 0
    assert "a GPU, in the " in capsys.readouterr().out


@pytest.mark.parametrize("budget", [2 << 20, 64 << 20])
def test_the_loss_of_likeliest_tokens_takes_what_its_budget_holds(budget):
    """512 rows of 4096: logits of 8 MiB for either side, one after the other, and 16-bit gradients
    of 4 MiB.
    """

    def tensor(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    hidden, weight = tensor(512, 64).requires_grad_(), tensor(4096, 64)
    teacher = tensor(512, 32), tensor(4096, 32)
    ledger = Ledger(passes.loss_buffers)
    with ledger:
        entries = head_top_k(*teacher, 4, budget_bytes=budget)
        of_teacher = ledger.peak.total()
        fused_linear_top_k(hidden, weight, *entries, budget_bytes=budget)
    assert min(budget, 512 * 4 * 4096) * 0.6 < of_teacher <= budget + 512 * 4 * 12
    own = min(budget, 512 * 6 * 4096)
    assert own * 0.6 < ledger.peak.total() <= budget + 2 * 512 * 64 + 512 * 4 * 40


def test_a_teacher_whose_tokens_are_cached_is_nowhere_in_the_plan():
    subject = subject_of("qwen3", loss_top_k=5, teacher_cache="c")
    subject.teacher, rows = None, len(subject.batch.student.scored_rows)
    head = subject.sides[1].head.weight
    for stored, held in ((Stored(10, torch.float32, False), 0), (Stored(128, head.dtype, True), 1)):
        subject.stored = stored
        subject.objective.is_stored = not held
        parts = dict(Planner(subject, Setup())._moments())["forward pass of the student"]
        head_bytes = held * head.numel() * head.element_size()
        assert parts["teacher"] == rows * stored.num_bytes + head_bytes


@pytest.mark.parametrize(("loss_top_k", "num_bytes"), [(0, 256), (5, 40)])
def test_a_cache_that_would_make_a_run_fit_says_what_a_token_takes(loss_top_k, num_bytes):
    planner = Planner(subject_of("qwen3", loss_top_k=loss_top_k), Setup())
    room = planner.plan().total // 3  # more than quantised weights spare
    (found,) = [r for r in remedies(planner, room) if r.lines == "teacher_cache: DIR"]
    assert f"runs first, {num_bytes} bytes of disk a scored token" in found.cost
