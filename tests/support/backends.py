"""Where the tests of a loss run: both backends, on the CPU (Triton interpreted) and on a GPU."""

import pytest
import torch

from gold_kernels.triton.launch import is_interpreted

IMPLEMENTATIONS = [("cpu", "torch")]
if is_interpreted():
    IMPLEMENTATIONS.append(("cpu", "triton"))
if torch.cuda.is_available():
    IMPLEMENTATIONS += [("cuda", "torch"), ("cuda", "triton")]
on_every_backend = pytest.mark.parametrize(("device", "backend"), IMPLEMENTATIONS)
