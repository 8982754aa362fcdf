"""Calls of losses whose heads are in slices over the processes of a group, beside one process.

Every process makes the whole tensors from one seed, cuts its slices out of them, and compares its
loss, metrics and gradients with those of the whole heads.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from gold_kernels import (
    FusedLinearJSDLoss,
    FusedLinearLoss,
    FusedLinearULDLoss,
    VocabProjection,
    fused_linear_chunk_likelihood,
    fused_linear_jsd,
    fused_linear_loss,
    fused_linear_projected_jsd,
    fused_linear_top_k,
    fused_linear_uld,
)
from gold_kernels.losses import JSD, SkewKL, SkewReverseKL, TotalVariation
from support.error_budget import relative_error
from support.jsd_cases import near_converged_case, random_case
from support.uld_cases import uld_case

SUMMED = (
    *("jsd beta=0.0", "jsd beta=0.3", "jsd beta=1.0", "jsd masked", "jsd uneven", "jsd padded"),
    *("jsd near", "skew_kl", "total_variation"),
)
WITH_DTENSORS = (fused_linear_jsd, fused_linear_uld, fused_linear_projected_jsd)


class Call(NamedTuple):
    """A loss and what it is given; biases are among the options."""

    loss: Callable[..., Any]
    tensors: tuple[Tensor, ...]  # student hidden, weight; for most losses the teacher's too
    options: dict[str, Any]
    cuts: str = "even"
    is_frozen: bool = False  # the head
    others: tuple[Any, ...] = ()  # positional arguments behind the tensors


class Processes(NamedTuple):
    """Who shares a call, and in what form slices are passed."""

    group: Any
    mesh: DeviceMesh | None = None  # slices are DTensors

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)


def tensor_cut(kind: str, size: int, number: int) -> list[int]:
    """Sizes of number slices of size entries."""
    if kind == "even":
        return [len(part) for part in torch.arange(size).tensor_split(number)]
    sizes = [0, size // 3, *[1] * (number - 2)][-number:]  # one of them empty
    sizes[-1] += size - sum(sizes)
    return sizes


def run(call: Call, dtype: torch.dtype, processes: Processes | None) -> dict[str, Tensor]:
    """Loss, metrics and gradients, of this process' slices or, with None, of whole heads."""

    def own(tensor: Tensor) -> Tensor:
        if processes is None:
            return tensor
        if processes.mesh is not None:
            return distribute_tensor(tensor, processes.mesh, [Shard(0)])
        number = dist.get_world_size(processes.group)
        return tensor.split(tensor_cut(call.cuts, len(tensor), number))[processes.rank]

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        return value.to(dtype) if value.is_floating_point() else value

    tensors = [cast(tensor) for tensor in call.tensors]
    options = {name: cast(value) for name, value in call.options.items()}
    for place in (1, 3)[: len(tensors) // 2]:
        tensors[place] = own(tensors[place]).detach()
    for name in ("student_bias", "teacher_bias"):
        if name in options:
            options[name] = own(options[name]).detach()
    if processes is not None and processes.mesh is None:
        options["process_group"] = processes.group
    leaves = {"grad_hidden": tensors[0]}
    if not call.is_frozen:
        leaves["grad_weight"] = tensors[1]
        if "student_bias" in options:
            leaves["grad_bias"] = options["student_bias"]
    for leaf in leaves.values():
        leaf.requires_grad_()
    result = call.loss(*tensors, *map(cast, call.others), **options)
    loss, metrics = result if isinstance(result, tuple) else (result, {})
    metrics = metrics if isinstance(metrics, dict) else metrics._asdict()
    factors = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    grads = torch.autograd.grad((loss * factors).sum(), list(leaves.values()))
    found = {name: value for name, value in metrics.items() if value is not None}
    return {"loss": loss.detach(), **found, **dict(zip(leaves, grads, strict=True))}


def check(call: Call, dtype: torch.dtype, processes: Processes, limit: float) -> list[str]:
    """What differs from whole heads in float64."""
    exact = call._replace(options={k: v for k, v in call.options.items() if k != "backend"})
    expected, actual = run(exact, torch.float64, None), run(call, dtype, processes)
    assert expected.keys() == actual.keys()
    wrong = []
    for name, truth in expected.items():
        found = actual[name]
        if name in ("grad_weight", "grad_bias"):
            if processes.mesh is not None:
                found = found.full_tensor()
            else:
                sizes = tensor_cut(call.cuts, len(truth), dist.get_world_size(processes.group))
                truth = truth.split(sizes)[processes.rank]
        if found.shape != truth.shape:
            wrong.append(f"{name}: {tuple(found.shape)} for {tuple(truth.shape)}")
        elif truth.any() or found.any():  # a slice of padding has no gradient at all
            error, allowed = relative_error(found, truth), limit
            if error >= limit and dtype != torch.float64 and name in ("loss", "grad_hidden"):
                # as CONTRIBUTING has it: twice as far as what is compared, here whole heads
                allowed = max(limit, 2 * error_of_whole_heads(call, dtype, name, truth))
            wrong += [] if error < allowed else [f"{name}: {error:.1e} of {allowed:.1e}"]
    return wrong


def error_of_whole_heads(call: Call, dtype: torch.dtype, name: str, truth: Tensor) -> float:
    """The largest of eight orders of the hidden dimensions: all are one call in exact numbers, and
    each rounds its logits in another way.
    """
    errors = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        tensors, expected = list(call.tensors), truth
        for place in range(0, len(tensors) // 2 * 2, 2):  # of the student, of the teacher
            order = torch.randperm(tensors[place].shape[1], generator=generator)
            tensors[place : place + 2] = (t[:, order] for t in tensors[place : place + 2])
            if place == 0 and name == "grad_hidden":
                expected = truth[:, order]
        found = run(call._replace(tensors=tuple(tensors)), dtype, None)[name]
        errors.append(relative_error(found, expected))
    return max(errors)


def shared_calls(n: int = 11) -> Iterator[tuple[str, Call]]:
    """Losses over one vocabulary, of n rows."""
    case = random_case(n=n, v=38, d_s=6, d_t=7)
    generator = torch.Generator().manual_seed(1)
    hidden, weight, teacher, teacher_weight = case
    padded = torch.cat([teacher_weight, teacher_weight.new_ones(3, 7)])
    masked = torch.randn(38, generator=generator)
    masked[4], masked[30] = -torch.inf, -torch.inf
    row_weights = torch.rand(n, generator=generator)
    row_weights[3] = 0
    labels = torch.randint(-2, 40, (n,), generator=generator)
    labels[:4] = torch.tensor([0, 30, 34, 37])
    rows = {"row_weights": row_weights, "labels": labels}
    rows["label_weights"] = torch.rand(n, generator=generator)
    everything = {
        **rows,
        "temperature": (1.25, 0.75),
        "final_logit_softcapping": (5.0, None),
        "logit_scale": (0.5, 1.5),
        "student_bias": masked,
        "return_metrics": True,
    }
    for beta in (0.0, 0.3, 0.5, 1.0):
        yield f"jsd beta={beta}", Call(fused_linear_jsd, case, {"beta": beta, **everything})
    teacher_bias = {"teacher_bias": masked.flip(0)}
    yield "jsd masked", Call(fused_linear_jsd, case, {"beta": 1.0, **teacher_bias})
    yield (
        "jsd masked forward",
        Call(fused_linear_jsd, case, {"beta": 0.0, "student_bias": masked, "chunk_size": 3}),
    )
    certain = {"teacher_bias": torch.zeros(38).index_fill_(0, torch.tensor(20), 1e8)}
    yield "jsd far", Call(fused_linear_jsd, case, certain, "uneven")
    yield "far", Call(_with(fused_linear_loss, TotalVariation()), case, {**certain, **rows})
    yield "jsd uneven", Call(fused_linear_jsd, case, everything, "uneven")
    near = near_converged_case(n=5, v=64, d=8)
    yield "jsd near", Call(fused_linear_jsd, near, {"chunk_size": 2, "return_metrics": True})
    pads = {"vocab_size": 35, "student_bias": masked, "return_metrics": True}
    yield "jsd padded", Call(fused_linear_jsd, case, {**rows, **pads})
    other_pad = (hidden, weight, teacher, padded)  # slices begin at other entries
    yield "jsd padded otherwise", Call(fused_linear_jsd, other_pad, {**rows, **pads, "beta": 0.3})
    yield "jsd few entries", Call(fused_linear_jsd, case, {"vocab_size": 9})
    no_rows = (hidden[:0], weight, teacher[:0], teacher_weight)
    yield "jsd no rows", Call(fused_linear_jsd, no_rows, {})
    per_row = {"reduction": "none", "labels": labels}
    yield "jsd per row, frozen", Call(fused_linear_jsd, case, per_row, is_frozen=True)
    yield "jsd per row", Call(fused_linear_jsd, case, {**per_row, "student_bias": masked})
    for loss in (SkewKL(0.2), SkewReverseKL(0.2), TotalVariation()):
        loss = dataclasses.replace(loss, temperature=(1.25, 0.75))
        options = {k: v for k, v in everything.items() if k != "temperature"}
        yield loss.name, Call(_with(fused_linear_loss, loss), case, options, "uneven")
    yield "chunked", Call(_with(fused_linear_loss, SkewKL()), case, {"chunk_size": 4})
    yield "module", Call(_module(FusedLinearLoss, JSD()), case, {})
    yield "liger", Call(_liger, case, {"true_labels": labels})
    log_probs, ids = torch.randn(n, 38, generator=generator).log_softmax(-1).topk(5)
    top_k = {k: v for k, v in everything.items() if k != "temperature"} | {
        "final_logit_softcapping": 5.0,
        "logit_scale": 0.5,
        "beta": 0.3,
    }
    for cuts in ("even", "uneven"):
        yield (
            f"top k, {cuts}",
            Call(fused_linear_top_k, case[:2], top_k, cuts, others=(ids, log_probs)),
        )


def cross_calls() -> Iterator[tuple[str, Call]]:
    """Losses between two vocabularies."""
    for kind, has_overlap in (
        ("pairs", False),
        ("pairs", True),
        ("bayesian", True),
        ("observed", False),
        ("late", True),
    ):
        case = uld_case(kind, has_overlap=has_overlap, has_labels=True, sizes=(41, 58))
        options = {"row_weights": case.tensors[4], "student_bias": case.bias, **case.options}
        options |= {"label_weights": case.label_weights, "return_metrics": True, "chunk_size": 3}
        cuts = "uneven" if has_overlap else "even"
        yield f"uld {kind} {has_overlap}", Call(fused_linear_uld, case.tensors[:4], options, cuts)
    case = uld_case("pairs", sizes=(41, 58))
    padded = {"vocab_size": (30, 50), "row_weights": case.tensors[4]}
    yield "uld padded", Call(fused_linear_uld, case.tensors[:4], padded)
    for size in (22, 15):  # a slice of one entry, of two processes and of three
        yield (
            f"uld one entry {size}",
            Call(fused_linear_uld, case.tensors[:4], {"vocab_size": (size, 50)}),
        )
    yield "uld per row", Call(fused_linear_uld, case.tensors[:4], {"reduction": "none"})
    yield "uld module", Call(_module(FusedLinearULDLoss), case.tensors[:4], {})
    case = uld_case("bayesian", has_labels=True, sizes=(41, 58))
    options = {
        "row_weights": case.tensors[4],
        "alignment": case.options["alignment"],
        "labels": case.options["labels"],
        "student_bias": case.bias,
        "return_metrics": True,
        "beta": 0.3,
    }
    tensors = case.tensors[:4]
    likelihood = {**options, "group_temperature": 2.0}
    yield "likelihood", Call(fused_linear_chunk_likelihood, tensors, likelihood, "uneven")
    generator = torch.Generator().manual_seed(0)
    columns = torch.randint(-1, 52, (40, 4), generator=generator)
    weights = torch.rand(40, 4, generator=generator) + 0.1
    projection = {**options, "projection": VocabProjection.from_entries(columns, weights, 52)}
    yield "projected", Call(fused_linear_projected_jsd, tensors, projection)


def _with(function: Callable[..., Any], first: Any) -> Callable[..., Any]:
    return lambda *tensors, **options: function(first, *tensors, **options)


def _module(kind: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    def call(*tensors: Tensor, process_group: Any = None) -> Tensor:
        options = {} if process_group is None else {"process_group": process_group}
        return kind(*args, **options)(*tensors)

    return call


def _liger(*tensors: Tensor, true_labels: Tensor, process_group: Any = None) -> Tensor:
    options = {} if process_group is None else {"process_group": process_group}
    return FusedLinearJSDLoss(**options)(*tensors, true_labels.clamp_min(-100))


def check_all(
    group: Any,
    dtype: torch.dtype,
    limit: float,
    *,
    has_mesh: bool = False,
    backend: str | None = None,
    every: int = 1,  # of so many cases one
) -> list[str]:
    """Everything that differs, by case. With a backend: of losses that sum over slices."""
    forms = [Processes(group)]
    if has_mesh:
        forms.append(Processes(group, DeviceMesh.from_group(group, "cpu")))
    calls = [*shared_calls(), *cross_calls()]
    if backend is not None:
        calls = [
            (name, call._replace(options=call.options | {"backend": backend}))
            for name, call in shared_calls(n=5)  # the interpreter is slow
            if name in SUMMED
        ]
    wrong = []
    for name, call in calls[::every]:
        for form in forms:
            if form.mesh is None or (call.cuts == "even" and call.loss in WITH_DTENSORS):
                wrong += [f"{name}: {one}" for one in check(call, dtype, form, limit)]
    return wrong
