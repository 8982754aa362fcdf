"""What every launcher needs to know: whether triton can run here, and block sizes."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

GPU_DEVICES = ("cuda", "xpu")  # ROCm builds call their devices cuda
# Triton loads 16 bytes at once where it knows that pointers and strides are multiples of 16. Rows
# of any other stride (V = 50257) are read piecewise and rearranged in shared memory.
ROW_ALIGNMENT = 16
# Rows of our own buffers begin 128 bytes apart, for numbers of 16 bits: with 512 rows a JSD of
# 151664 entries, whose rows did not, took 3.84 ms where 151669 in buffers of 151680 took 3.11.
ROW_PITCH = 64
# For triton.jit: what hangs on how many rows a call or a chunk has, and where a chunk begins. These
# are read or written one number at a time, and Triton would compile a kernel anew for sizes and
# addresses that are multiples of 16, for those that are not, and for 1.
ANY_ROWS = {
    "do_not_specialize": ("num_rows", "values_stride", "sums_stride"),
    "do_not_specialize_on_alignment": (
        *("weights_ptr", "labels_ptr", "ids_ptr", "scales_ptr", "log_p_ptr", "values_ptr"),
        *("student_scales_ptr", "teacher_scales_ptr", "student_spans_ptr", "teacher_spans_ptr"),
    ),
}


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def is_interpreted() -> bool:
    """True where TRITON_INTERPRET=1 makes triton.jit run on CPU tensors. Triton reads the variable
    once, when it is imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def default_backend(tensor: Tensor) -> str:
    return "triton" if tensor.device.type in GPU_DEVICES and has_triton() else "torch"


def num_blocks(size: int, block: int) -> int:
    """Blocks that size numbers fill. triton.cdiv takes the host 10 us."""
    return -(-size // block)


def aligned_width(vocab_size: int) -> int:
    """Columns from the start of one row to the next in buffers of our own."""
    return -(-vocab_size // ROW_PITCH) * ROW_PITCH


def empty_rows(like: Tensor, num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised (num_rows, vocab_size) on the device of a tensor, with aligned rows."""
    return like.new_empty(num_rows, aligned_width(vocab_size), dtype=dtype)[:, :vocab_size]


def has_aligned_rows(tensor: Tensor) -> bool:
    return tensor.stride(0) % ROW_ALIGNMENT == 0 and tensor.data_ptr() % ROW_ALIGNMENT == 0


def is_over(grad: Tensor, logits: Tensor) -> bool:
    """16-bit rows lie over the rows of float32 that they are the gradient of."""
    return grad.data_ptr() == logits.data_ptr() and grad.dtype != logits.dtype


def row_block(vocab_size: int, dtype: torch.dtype, largest: int = 4096) -> tuple[int, int, int]:
    """(BLOCK_V, LINE, num_warps) of a kernel that walks one row of vocab_size columns. A line is
    the 16 bytes that a thread loads at once.

    Under the interpreter every operation costs Python time, so blocks are few and large.
    """
    line = 16 // dtype.itemsize
    width = max(1 << (vocab_size - 1).bit_length(), line)
    if is_interpreted():
        return min(width, 1 << 16), line, 4
    return min(max(width, 512), largest), line, 16
