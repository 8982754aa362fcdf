"""What patch_trl takes."""

import torch
from typing_extensions import TypedDict


class PatchOptions(TypedDict, total=False):
    """How the fused losses are computed; see gold_kernels.engine.options.LossOptions."""

    chunk_size: int | None
    budget_bytes: int
    logits_dtype: torch.dtype | None
    backend: str | None
