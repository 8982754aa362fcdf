"""Matrix products of a chunk: in the inputs' dtype, and where 16 bits of the left side are too few.

C rows of a chunk, P rows of a panel, D and E hidden sizes, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.triton.launch import aligned_width, empty_rows


def matmul_(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool = False) -> None:
    """out = left right, or out += left right; float32 accumulation and no rounding before out's
    dtype.
    """
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if accumulate else torch.mm(left, right, out=out)
    elif out.dtype.itemsize < left.dtype.itemsize:  # 16-bit logits of float32 inputs
        out.copy_(left @ right)
    elif left.device.type == "cuda" and out.dtype == torch.float32:
        if accumulate:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:  # no other device has a GEMM with a wider output
        matmul_(out, left.to(out.dtype), right.to(out.dtype), accumulate=accumulate)


# Entries of the vocabulary that one GEMM of a projection sums. Tensor cores cut off what they add:
# a sum of 152k entries is short by 2.5e-5 of itself (H200), near convergence all that matters.
SUM_ENTRIES = 4096


class Projection(NamedTuple):
    """grad_hidden = G W - scale * row_weights * minus, in float32 until it is rounded once.

    G is the gradient of the logits, W the head, or another matrix of as many rows. Where G W and
    minus are nearly equal, as near convergence, a G of 16 bits would leave nothing of their
    difference. So G is float32, and where W is 16-bit it is cut into several 16-bit numbers, whose
    products are added in float32: two keep 16 bits of bfloat16 or more, three all of float32. Each
    is a GEMM. One column of each row, far larger than the others where G has a onehot in it, is
    multiplied by itself: its rounding would be as large as their sum.
    """

    weight: Tensor | None = None  # (V, E); None: the head's
    minus: Tensor | None = None  # (N, E) float32 or float64
    scale: float = 1.0
    num_parts: int = 2
    tokens: Tensor | None = None  # (N,) int64 the column that is large

    def row_bytes(self, head: Tensor) -> int:  # (V, D)
        """What a row of a panel takes beside G."""
        weight = head if self.weight is None else self.weight
        part = weight.dtype.itemsize * aligned_width(weight.shape[0])
        wide = 8 if weight.dtype == torch.float64 else 4
        return (part if weight.dtype.itemsize == 2 else 0) + 5 * wide * weight.shape[1]

    def rows(
        self,
        grad_logits: Tensor,  # (P, V) float32 or float64, overwritten
        head: Tensor,  # (V, D)
        rows: slice,
        row_weights: Tensor,  # (N, T)
    ) -> Tensor:  # (P, E) float32 or float64
        weight = head if self.weight is None else self.weight
        out = grad_logits.new_empty(grad_logits.shape[0], weight.shape[1])
        large = None
        if self.tokens is not None:
            tokens = self.tokens[rows]
            large = grad_logits.gather(1, tokens.unsqueeze(1)) * weight[tokens]
            grad_logits.scatter_(1, tokens.unsqueeze(1), 0)
        if weight.dtype.itemsize == 2:
            part = empty_rows(grad_logits, len(out), weight.shape[0], weight.dtype)
            for number in range(self.num_parts):
                part.copy_(grad_logits)
                for start in range(0, weight.shape[0], SUM_ENTRIES):
                    entries = slice(start, start + SUM_ENTRIES)
                    is_first = number == start == 0
                    matmul_(out, part[:, entries], weight[entries], accumulate=not is_first)
                if number + 1 < self.num_parts:
                    grad_logits.sub_(part)
        else:
            matmul_(out, grad_logits, weight.to(out.dtype))
        if large is not None:
            out += large
        if self.minus is not None:
            factors = self.scale * row_weights[rows, :1]
            # where, not a product: a row of weight 0 may hold anything
            out -= torch.where(factors != 0, factors * self.minus[rows], 0)
        return out
