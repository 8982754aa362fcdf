"""One rule for tolerances: how far off may a result be, given what eager torch loses in the same
dtype.
"""

import torch
from torch import Tensor


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """||actual - oracle|| / ||oracle||, in float64."""
    actual, oracle = actual.detach().double(), oracle.detach().double()
    return float((actual - oracle).norm() / oracle.norm().clamp_min(1e-300))


def assert_within_error_budget(
    name: str, actual: Tensor, *, baseline: Tensor, oracle: Tensor, factor: float = 2.0
) -> None:
    """actual is at most factor times as far from the oracle as baseline, eager torch in the same
    dtype.

    The floor of four roundings keeps a baseline that happens to be exact from asking for more than
    the dtype holds.
    """
    error, allowed = relative_error(actual, oracle), factor * relative_error(baseline, oracle)
    floor = 4 * torch.finfo(actual.dtype).eps
    assert error <= max(allowed, floor), (
        f"{name}: relative error {error:.2e}, allowed {max(allowed, floor):.2e} "
        f"({factor} times what eager {actual.dtype} loses)"
    )


def assert_same_up_to_contraction(one: Tensor, other: Tensor) -> None:
    """Float32 numbers of one formula from two kernels, as a flag of a kernel makes another one.

    In the interpreter and in torch they have the same bits. A compiler for a GPU joins a product
    and a sum into one rounding, in either kernel where it likes: each of p and q, and each term of
    them, may be 2 roundings off. Of differences q - p that are not far below p and q, and of sums
    of them, 32 roundings are the bound.
    """
    if one.device.type == "cpu":
        assert torch.equal(one, other)
    else:
        assert relative_error(one, other) <= 32 * torch.finfo(torch.float32).eps
