"""A frozen set of calls whose losses and gradients a refactoring must not change by a bit.

`python -m support.frozen_cases` (in tests/) writes frozen_bits.json, the record that
engine/test_frozen_bits.py compares with. Bits depend on the processor and on the versions of torch
and triton, so the record says where it was made; elsewhere values are compared to rounding.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # where there is a GPU, kernels take tensors of the GPU only
    os.environ.setdefault("TRITON_INTERPRET", "1")
from torch import Tensor

from gold_kernels import (
    FusedLinearJSDLoss,
    fused_linear_jsd,
    fused_linear_uld,
    jsd_loss,
    uld_loss,
)
from support.jsd_cases import near_converged_case, random_case
from support.uld_cases import KINDS, uld_case

RECORD = Path(__file__).with_name("frozen_bits.json")
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
BACKENDS = ("torch", "triton")
Call = Callable[[], list[Tensor]]


def _jsd(dtype: torch.dtype, case=None, needs=(True, True), bias=False, **options) -> Call:
    def call() -> list[Tensor]:
        tensors = (case or random_case(n=21, v=150)).to(dtype)
        for tensor, need in zip(tensors[:2], needs, strict=True):
            tensor.requires_grad_(need)
        leaves = [t for t in tensors if t.requires_grad]
        given = dict(options)
        if bias:
            vocabulary = tensors.student_weight.shape[0]
            generator = torch.Generator().manual_seed(3)
            given["student_bias"] = torch.randn(vocabulary, generator=generator).to(dtype)
            given["teacher_bias"] = -given["student_bias"]
            leaves.append(given["student_bias"].requires_grad_())
        wide = torch.promote_types(dtype, torch.float32)
        if given.pop("weighted", False):
            generator = torch.Generator().manual_seed(4)
            given["row_weights"] = torch.rand(21, generator=generator).to(wide)
            given["row_weights"][5] = 0
        result = fused_linear_jsd(*tensors, **given)
        loss, metrics = result if given.get("return_metrics") else (result, ())
        return [loss, *torch.autograd.grad(loss, leaves), *metrics[:6]]

    return call


def _module(dtype: torch.dtype, **options) -> Call:
    """Liger's order; weights are powers of 2, whose products round nothing."""

    def call() -> list[Tensor]:
        tensors = random_case(n=21, v=150).to(dtype)
        labels = torch.arange(21) * 7
        labels[3] = labels[8] = -100
        loss = FusedLinearJSDLoss(chunk_size=8, **options)(*tensors, labels)
        return list(torch.autograd.grad(loss, tensors[:2]))

    return call


def _jsd_logits(dtype: torch.dtype, **options) -> Call:
    def call() -> list[Tensor]:
        case = random_case(n=13, v=170).to(dtype)
        student = (case.student_hidden @ case.student_weight.T).detach().requires_grad_()
        teacher = case.teacher_hidden @ case.teacher_weight.T
        loss = jsd_loss(student * 1, teacher, **options)
        return [loss, *torch.autograd.grad(loss, student)]

    return call


def _uld_logits(dtype: torch.dtype, has_overlap: bool, **options) -> Call:
    def call() -> list[Tensor]:
        case = uld_case(has_overlap=has_overlap)
        hidden, weight, teacher_hidden, teacher_weight, weights = case.tensors
        student = (hidden @ weight.T).to(dtype).requires_grad_()
        teacher = (teacher_hidden @ teacher_weight.T).to(dtype)
        given = {k: v for k, v in case.options.items() if k != "alignment"}
        wide = torch.promote_types(dtype, torch.float32)
        loss = uld_loss(student, teacher, weights.to(wide), **given, **options)
        return [loss, *torch.autograd.grad(loss, student)]

    return call


def _uld(kind: str, dtype: torch.dtype, has_overlap=False, has_labels=False, **options) -> Call:
    given = {k: options.pop(k) for k in ("beta", "sizes") if k in options}

    def call() -> list[Tensor]:
        case = uld_case(kind, has_overlap=has_overlap, has_labels=has_labels, **given)
        return case.run(fused_linear_uld, dtype, **options)

    return call


def frozen_calls() -> Iterator[tuple[str, Call]]:
    """(name, call) of every case; a name says all that is set."""
    for backend in BACKENDS:
        for name, dtype in DTYPES.items():
            if name == "float64" and backend == "triton":
                continue
            where = {"backend": backend, "chunk_size": 8}
            for beta in (0.0, 0.3, 0.5, 1.0):
                yield f"jsd {backend} {name} beta={beta}", _jsd(dtype, beta=beta, **where)
                yield (
                    f"jsd {backend} {name} beta={beta} weighted metrics bias T=0.7",
                    _jsd(
                        dtype,
                        bias=True,
                        weighted=True,
                        beta=beta,
                        temperature=0.7,
                        return_metrics=True,
                        **where,
                    ),
                )
            yield (
                f"jsd {backend} {name} softcap",
                _jsd(dtype, final_logit_softcapping=5.0, logit_scale=(0.5, 2.0), **where),
            )
            yield f"jsd {backend} {name} vocab_size=130", _jsd(dtype, vocab_size=130, **where)
            yield f"jsd {backend} {name} frozen", _jsd(dtype, needs=(True, False), **where)
            yield f"jsd {backend} {name} head only", _jsd(dtype, needs=(False, True), **where)
            yield f"jsd {backend} {name} one chunk", _jsd(dtype, backend=backend)
            yield f"jsd {backend} {name} logits", _jsd_logits(dtype, beta=0.5, backend=backend)
            yield (
                f"jsd {backend} {name} logits b=0.1",
                _jsd_logits(dtype, beta=0.1, backend=backend),
            )
            yield f"uld {backend} {name} logits", _uld_logits(dtype, False, backend=backend)
            yield f"uld {backend} {name} logits hybrid", _uld_logits(dtype, True, backend=backend)
            for kind in KINDS:
                yield f"uld {backend} {name} {kind}", _uld(kind, dtype, **where)
                yield (
                    f"uld {backend} {name} {kind} hybrid labels",
                    _uld(kind, dtype, has_overlap=True, has_labels=True, **where),
                )
            for beta in (0.0, 1.0):
                yield (
                    f"uld {backend} {name} hybrid beta={beta}",
                    _uld("bayesian", dtype, has_overlap=True, beta=beta, **where),
                )
            yield (
                f"uld {backend} {name} equal sizes",
                _uld("pairs", dtype, sizes=(320, 320), **where),
            )
        if backend == "torch":
            for name in ("float32", "bfloat16"):
                yield f"jsd module {name}", _module(DTYPES[name])
                yield (
                    f"jsd module {name} soft",
                    _module(
                        DTYPES[name], weight_hard_loss=0.0, weight_soft_loss=1.0, temperature=2.0
                    ),
                )
        fast = {"logits_dtype": torch.bfloat16, "backend": backend, "chunk_size": 8}
        yield f"jsd {backend} fast", _jsd(torch.bfloat16, **fast)
        yield f"uld {backend} fast", _uld("bayesian", torch.bfloat16, **fast)
        yield f"jsd {backend} near", _jsd(torch.float32, near_converged_case(21, 150), **where)


def fingerprint() -> dict[str, str]:
    """What the bits depend on."""
    import triton

    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def digest(tensors: list[Tensor]) -> dict[str, object]:
    """Hash of the bits, and norms that tell how far off other bits are."""
    bits = hashlib.sha256()
    for tensor in tensors:
        bits.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    norms = [float(tensor.detach().double().norm()) for tensor in tensors]
    return {"sha256": bits.hexdigest()[:16], "norms": norms}


def write(record: dict[str, dict[str, object]]) -> None:
    """A case a line."""
    cases = ",\n".join(f"{json.dumps(n)}: {json.dumps(one)}" for n, one in record["cases"].items())
    where = json.dumps(record["where"])
    RECORD.write_text(f'{{"where": {where}, "cases": {{\n{cases}\n}}}}\n', encoding="utf-8")


def main() -> None:
    write({"where": fingerprint(), "cases": {n: digest(call()) for n, call in frozen_calls()}})


if __name__ == "__main__":
    main()
