"""Matrix products of a chunk: in the inputs' dtype, and where 16 bits of the left side are too few.

C rows of a chunk, P rows of a panel, D and E hidden sizes, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.triton.launch import ROW_ALIGNMENT, aligned_width, empty_rows

# Where products of 16-bit operands are cut at a multiple of ROW_ALIGNMENT entries: tensor cores
# want dimensions along which memory runs to be multiples of 16 bytes. A loss of 151669 of 151936
# entries took four times as long as one of all (benchmarks/NOTES.md).
CUT_ON = ("cuda",)
# Where a GEMM of 16-bit operands has a float32 result; sizes on the meta device are those of a GPU.
WIDER_ON = ("cuda", "meta")
# Of an operand that is cast for its product elsewhere: a whole head of 16 bits would be, 2.5 GB in
# float32 for 151936 x 4096.
CAST_ENTRIES = 1 << 18


def matmul_(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool = False) -> None:
    """out = left right, or out += left right; float32 accumulation and no rounding before out's
    dtype.
    """
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if accumulate else torch.mm(left, right, out=out)
    elif out.dtype.itemsize < left.dtype.itemsize:  # 16-bit logits of float32 inputs
        out.copy_(left @ right)
    elif left.device.type in WIDER_ON and out.dtype == torch.float32:
        if accumulate:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif max(left.numel(), right.numel()) <= CAST_ENTRIES:
        # no other device has a GEMM with a wider output
        matmul_(out, left.to(out.dtype), right.to(out.dtype), accumulate=accumulate)
    else:
        _matmul_in_halves_(out, left, right, accumulate)


def _matmul_in_halves_(out: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
    """matmul_ along halves of the longest dimension, until what has to be cast is small."""
    (rows, inner), columns = left.shape, right.shape[1]
    middle = max(rows, inner, columns) // 2
    for number, half in enumerate((slice(middle), slice(middle, None))):
        if rows == max(rows, inner, columns):
            matmul_(out[half], left[half], right, accumulate=accumulate)
        elif columns >= inner:
            matmul_(out[:, half], left, right[:, half], accumulate=accumulate)
        else:
            matmul_(out, left[:, half], right[half], accumulate=accumulate or number > 0)


def cut_of(vocab_size: int, like: Tensor) -> int:
    """Entries that go into a product of their own, the few others into a second; all: one product.

    like: the 16-bit operand, if it is one.
    """
    cut = vocab_size - vocab_size % ROW_ALIGNMENT
    is_cut = like.device.type in CUT_ON and like.dtype.itemsize == 2
    return cut if is_cut and cut else vocab_size


def project_(logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """logits (C, V) = hidden (C, D) weight (V, D)^T."""
    cut = cut_of(weight.shape[0], hidden)
    if cut == weight.shape[0]:
        matmul_(logits, hidden, weight.T)
    else:
        matmul_(logits[:, :cut], hidden, weight[:cut].T)
        matmul_(logits[:, cut:], hidden, weight[cut:].T)


def pull_back_(grad_hidden: Tensor, grad_logits: Tensor, weight: Tensor) -> None:
    """grad_hidden (P, D) = grad_logits (P, V) weight (V, D), rounded once."""
    cut = cut_of(weight.shape[0], grad_logits)
    if cut == weight.shape[0]:
        matmul_(grad_hidden, grad_logits, weight)
        return
    wide = grad_hidden
    if grad_hidden.dtype != torch.float32:
        wide = torch.empty_like(grad_hidden, dtype=torch.float32)
    matmul_(wide, grad_logits[:, :cut], weight[:cut])
    matmul_(wide, grad_logits[:, cut:], weight[cut:], accumulate=True)
    if wide is not grad_hidden:
        grad_hidden.copy_(wide)


def pull_back_weight_(
    grad_weight: Tensor, grad_logits: Tensor, hidden: Tensor, *, accumulate: bool
) -> None:
    """grad_weight (V, D) = grad_logits (P, V)^T hidden (P, D), or += that."""
    cut = cut_of(grad_weight.shape[0], grad_logits)
    if cut == grad_weight.shape[0]:
        matmul_(grad_weight, grad_logits.T, hidden, accumulate=accumulate)
    else:
        for part in (slice(0, cut), slice(cut, None)):
            matmul_(grad_weight[part], grad_logits[:, part].T, hidden, accumulate=accumulate)


# Entries of the vocabulary that one GEMM of a projection sums. Tensor cores cut off what they add:
# over 152k entries at once a sum was short by 2.5e-5 of itself on an H200, near convergence all
# that matters. In sums of 4096 the gradient is 1.7e-3 off, and as much in sums of 256, which take
# 14 times as long (benchmarks/NOTES.md).
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
