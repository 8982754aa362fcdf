"""One of three processes of test_parallel: losses of slices over groups of one, two and three
processes, beside those of whole heads.

torchrun --nproc_per_node 3 -m support.rank SECONDS support.parallel_step
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from gold_kernels import (
    FusedLinearJSDLoss,
    FusedLinearLoss,
    FusedLinearULDLoss,
    VocabProjection,
    fused_linear_chunk_likelihood,
    fused_linear_jsd,
    fused_linear_loss,
    fused_linear_mean_kl,
    fused_linear_projected_jsd,
    fused_linear_top_k,
    fused_linear_uld,
    head_means,
    head_top_k,
    jsd_loss,
    peak_extra_bytes,
    uld_loss,
)
from gold_kernels.engine.row_loss import Rows
from gold_kernels.losses import JSD
from support.jsd_cases import random_case
from support.parallel_cases import check_all
from support.rank import leave_together
from support.uld_cases import uld_case

OTHER_CALL, OTHER_VALUES = "needed gradients on ranks [1] than", "got other ones on ranks [1]"
Refusals = Iterator[tuple[str, Callable[[], object]]]  # a part of the message, and the call


def other_calls(pair: Any) -> Refusals:
    """Options, values and errors of rank 1 that are not those of rank 0; pair is their group."""
    rank = dist.get_rank()
    hidden, weight, teacher, teacher_weight = random_case(n=6, v=20, d_s=4, d_t=5)
    own, own_teacher = (w.tensor_split(2)[rank] for w in (weight, teacher_weight))
    usual = (hidden, own, teacher, own_teacher)
    jsd, uld, top_k = (
        partial(loss, process_group=pair)
        for loss in (fused_linear_jsd, fused_linear_uld, fused_linear_top_k)
    )
    for options in (
        {"beta": 0.1 * rank},
        {"chunk_size": 1 + rank},
        {"return_metrics": rank == 0},
        ({"vocab_size": 8}, {"chunk_size": 8})[rank],
        {"final_logit_softcapping": [5.0 + rank, None]},
    ):
        yield OTHER_CALL, partial(jsd, *usual, **options)
    for options in ({"temperature": 1.0 + rank}, {"beta": 0.1 * rank}):
        yield OTHER_CALL, partial(uld, *usual, **options)
    ids, log_probs = torch.arange(12).view(6, 2), torch.full((6, 2), -1.0)
    for beta, k in ((0.1 * rank, 2), (0.0, 1 + rank)):
        yield OTHER_CALL, partial(top_k, hidden, own, ids[:, :k], log_probs[:, :k], beta=beta)

    labels, weights = torch.zeros(6, dtype=torch.int64), torch.full((6,), 1.0 + rank)
    labels[5] = rank
    order = torch.arange(6).view(3, 2).flip(1).flatten() if rank else torch.arange(6)
    yield OTHER_VALUES, partial(jsd, hidden + rank, *usual[1:])
    yield OTHER_VALUES, partial(jsd, *usual, labels=labels)
    yield OTHER_VALUES, partial(jsd, *usual, weights)
    yield OTHER_VALUES, partial(jsd, hidden[order], own, teacher[order], own_teacher)
    yield OTHER_VALUES, partial(top_k, hidden, own, ids + rank, log_probs)
    yield OTHER_VALUES, partial(top_k, hidden, own, ids, log_probs - rank)

    short = torch.ones(6 - rank)
    for message, call in (
        ("row_weights must be", partial(jsd, *usual, short)),
        ("beta must be in [0, 1]", partial(jsd, *usual, beta=0.5 + rank)),
        ("row_weights must be", partial(uld, *usual, short)),
        ("share the hidden size", partial(top_k, hidden[:, rank:], own, ids, log_probs)),
        ("device of student_hidden", partial(jsd, hidden.to(("cpu", "meta")[rank]), *usual[1:])),
        ("must be a tensor, got list", partial(jsd, *([[1.0]] * 4 if rank else usual))),
        (
            "teacher_ids and teacher_log_probs must",
            partial(top_k, hidden, own, ids[rank:], log_probs),
        ),
        (
            "teacher_log_probs must be on cpu",
            partial(top_k, hidden, own, ids, log_probs.to(("cpu", "meta")[rank])),
        ),
    ):
        yield message if rank == 1 else "got errors on ranks [1]", call


def out_of_range(pair: Any) -> Refusals:
    """What rank 1 alone refuses before it looks at tensors; and a projection of its own."""
    rank, group = dist.get_rank(), {"process_group": pair}
    case = uld_case("bayesian", sizes=(41, 58))
    alignment = case.options["alignment"]
    hidden, weight, teacher, teacher_weight = case.tensors[:4]
    own, own_teacher = (w.tensor_split(2)[rank] for w in (weight, teacher_weight))
    usual, negative = (hidden, own, teacher, own_teacher), 1.0 - 2 * rank
    pairs = (hidden[: len(teacher)], *usual[1:])
    uld = partial(fused_linear_uld, *usual, alignment=alignment, **group)
    ids = torch.arange(len(hidden)).unsqueeze(1)
    top_k = partial(fused_linear_top_k, hidden, own, ids, -torch.ones(ids.shape), **group)
    likelihood = partial(fused_linear_chunk_likelihood, *usual, alignment, **group)
    columns = torch.arange(41).view(41, 1)
    projections = [
        VocabProjection.from_entries(one, torch.ones(41, 1), 58) for one in (columns, columns + 9)
    ]
    projected = partial(fused_linear_projected_jsd, *usual, alignment=alignment, **group)
    wrong = {"labelss": None} if rank else {}
    labels = torch.arange(len(teacher), dtype=torch.int32 if rank else torch.int64)
    for message, call in (
        ("temperature must be", partial(uld, temperature=negative)),
        ("temperature must be", partial(uld, teacher_temperature=negative)),
        ("temperature must be", partial(top_k, temperature=negative)),
        ("group_temperature must be", partial(likelihood, group_temperature=negative)),
        ("beta must be in", partial(projected, projections[0], beta=2.0 * rank)),
        ("projection must be", partial(projected, None if rank else projections[0])),
        ("did you mean labels", partial(uld, **wrong)),
        ("did you mean labels", partial(FusedLinearULDLoss(**group), *pairs, **wrong)),
        ("did you mean labels", partial(FusedLinearLoss(JSD(), **group), *pairs, **wrong)),
        ("labels must be an int64", partial(FusedLinearJSDLoss(**group), *pairs, labels)),
        ("return_metrics must be", partial(uld, return_metrics="no" if rank else False)),
    ):
        yield message if rank == 1 else "got errors on ranks [1]", call
    yield OTHER_VALUES, partial(projected, projections[rank])


def wrong_slices(pair: Any) -> Refusals:
    """What is no slice of its own, or where slices cannot be; pair is the group of two ranks."""
    hidden, weight, teacher, teacher_weight = random_case(n=6, v=20, d_s=4, d_t=5)
    weight[0] = 0  # of a padding token
    own, own_teacher = (w.tensor_split(2)[dist.get_rank()] for w in (weight, teacher_weight))
    jsd, uld = (partial(loss, process_group=pair) for loss in (fused_linear_jsd, fused_linear_uld))
    usual = (hidden, own, teacher, own_teacher)
    yield "got str; pass torch", partial(fused_linear_jsd, *usual, process_group="world")
    whole = (hidden, weight, teacher, teacher_weight)
    yield "student_weight must be a slice of its own", partial(jsd, *whole)
    mixed = (hidden, own, teacher, teacher_weight)
    yield "teacher_weight must be a slice of its own", partial(uld, *mixed)
    yield "got V=20 and V=18", partial(jsd, hidden, own, teacher, own_teacher[:-1])

    mesh = DeviceMesh.from_group(pair, "cpu")
    sharded, replicated, of_columns = (
        distribute_tensor(weight, mesh, [place]) for place in (Shard(0), Replicate(), Shard(1))
    )
    yield (
        "teacher_weight must be in slices like student_weight",
        partial(fused_linear_jsd, hidden, sharded, teacher, own_teacher),
    )
    for wrong in (of_columns, replicated):
        yield (
            "student_weight as a DTensor must be Shard(0)",
            partial(fused_linear_jsd, hidden, wrong, teacher, wrong),
        )
    cut_hidden, cut_rows = (
        distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (hidden, torch.ones(6))
    )
    yield (
        "student_hidden as a DTensor must be Replicate()",
        partial(fused_linear_jsd, cut_hidden, sharded, teacher, sharded),
    )
    yield "row_weights as a DTensor must be Replicate()", partial(jsd, *usual, cut_rows)
    logits = sharded.T.contiguous()
    for loss in (jsd_loss, uld_loss):
        yield (
            f"{loss.__name__}: heads, hidden states and logits must be whole",
            partial(loss, logits, logits),
        )
        plain = logits.full_tensor()
        yield "got a DTensor as row_weights", partial(loss, plain, plain, cut_rows)
        labels = {"labels": torch.arange(5), "label_weights": cut_rows}
        yield "got a DTensor as label_weights", partial(loss, plain, plain, **labels)
    yield (
        "head_means: heads, hidden states and logits must be whole",
        partial(head_means, teacher, teacher_weight, sharded),
    )
    yield (
        "head_top_k: heads, hidden states and logits must be whole",
        partial(head_top_k, hidden, sharded, 3),
    )
    yield (
        "fused_linear_mean_kl: heads, hidden states and logits must be whole",
        partial(fused_linear_mean_kl, hidden, sharded, None),
    )
    biases = {"student_bias": sharded[:, 0], "teacher_bias": sharded[:, 0]}
    for name, call in (
        ("student_bias", partial(head_means, teacher, teacher_weight, weight)),
        ("teacher_bias", partial(head_top_k, hidden, weight, 3)),
    ):
        yield f"got a DTensor as {name}", partial(call, **{name: biases[name]})


@dataclass(frozen=True)
class WholeRows(JSD):
    """A loss of one's own, whose rows must be whole, below one that takes slices."""

    name: ClassVar[str] = "whole_rows"

    def start(self, rows: Rows) -> Any:
        return super().start(rows)


def check_accepted(pair: Any) -> list[str]:
    """Rows of weight 0 hold anything; weights of rows may be replicated DTensors; a subclass with
    rows of its own gets whole ones.
    """
    rank = dist.get_rank()
    case = random_case(n=6, v=20, d_s=4, d_t=5).to(torch.float64)
    own = [case[place].detach().tensor_split(2)[rank] for place in (1, 3)]
    weights = torch.tensor([1.0, 0, 1, 2, 1, 1], dtype=torch.float64)
    expected = fused_linear_jsd(*case, weights)
    hidden = case.student_hidden.detach().clone()
    hidden[1] = (torch.nan, 7.0)[rank]
    mesh = DeviceMesh.from_group(pair, "cpu")
    given = distribute_tensor(weights, mesh, [Replicate()])
    found = [
        fused_linear_jsd(hidden, own[0], case[2], own[1], given, process_group=pair),
        fused_linear_loss(
            WholeRows(), hidden, own[0], case[2], own[1], weights, process_group=pair
        ),
    ]
    ids, log_probs = torch.arange(12).view(6, 2), torch.full((6, 2), -1.5, dtype=torch.float64)
    replicated = partial(distribute_tensor, device_mesh=mesh, placements=[Replicate()])
    entries, labels = [replicated(ids), replicated(log_probs)], ids[:, 0]
    liger = FusedLinearJSDLoss(0.3, 0.7)(*case, labels)
    of_liger = FusedLinearJSDLoss(0.3, 0.7, process_group=pair)(
        *(replicated(case[0].detach()), own[0], replicated(case[2]), own[1], replicated(labels))
    )
    whole = fused_linear_top_k(case[0], case[1], ids, log_probs, weights)
    ids[1], log_probs[1] = 90 * rank, (torch.nan, 7.0)[rank]
    top_k = fused_linear_top_k(hidden, own[0], ids, log_probs, weights, process_group=pair)
    of_entries = fused_linear_top_k(hidden, own[0], *entries, weights, process_group=pair)
    pairs = [(one, expected) for one in found]
    pairs += [(top_k, whole), (of_entries, whole), (of_liger, liger)]
    return [f"accepted: {one} for {other}" for one, other in pairs if not one.isclose(other)]


def check_refusals(pair: Any, everyone: Any) -> list[str]:
    wrong = []
    rank = dist.get_rank()
    case = random_case(n=6, v=20, d_s=4, d_t=4)
    over_three = distribute_tensor(
        case.teacher_weight, DeviceMesh.from_group(everyone, "cpu"), [Shard(0)]
    )
    own = case.student_weight.tensor_split(2)[rank % 2]
    calls = [*other_calls(pair), *out_of_range(pair), *wrong_slices(pair)] if rank < 2 else []
    calls.append(
        (
            "got a group without it" if rank == 2 else "over ranks [0, 1, 2] beside [0, 1]",
            lambda: fused_linear_jsd(case[0], own, case[2], over_three, process_group=pair),
        )
    )
    for expected, call in calls:
        try:
            call()
            wrong.append(f"not refused: {expected}")
        except ValueError as error:
            if expected not in str(error):
                wrong.append(f"{expected}: {error}")
    return wrong


def check_memory(group: Any) -> list[str]:
    """Extra memory stays within the budget, whether rows are exchanged or not."""
    wrong, budget = [], 1 << 24  # half of it is less than torch rows of ULD take, whole heads too
    hidden, weight, teacher, teacher_weight = random_case(n=384, v=8000, d_s=8, d_t=8)
    own, other = (w.tensor_split(2)[dist.get_rank()] for w in (weight, teacher_weight))
    hidden.requires_grad_()
    for loss in (fused_linear_jsd, fused_linear_uld):

        def step(loss: Any = loss) -> None:
            loss(hidden, own, teacher, other, process_group=group, budget_bytes=budget).backward()

        peak = peak_extra_bytes(step)
        if not peak <= budget + 2 * hidden.nbytes + 4096:
            wrong.append(f"{loss.__name__}: {peak} bytes")
    return wrong


def main() -> None:
    dist.init_process_group("gloo")
    wrong = []
    groups = [dist.new_group(list(range(size))) for size in (1, 2, 3)]
    for size, group in zip((1, 2, 3), groups, strict=True):
        if dist.get_rank() < size:
            every = 4 if size == 1 else 1
            found = check_all(group, torch.float64, 1e-12, has_mesh=size == 2, every=every)
            wrong += [f"{size} processes, {one}" for one in found]
            if size == 2:  # as near to float64 as one process is
                found = check_all(group, torch.float32, 1e-5, every=3)
                found += check_all(group, torch.float32, 2e-5, backend="triton")
                wrong += [f"{size} processes, float32, {one}" for one in found]
                wrong += check_memory(group) + check_accepted(group)
    wrong += check_refusals(groups[1], groups[2])
    assert not wrong, "\n".join(wrong)
    leave_together()


if __name__ == "__main__":
    main()
