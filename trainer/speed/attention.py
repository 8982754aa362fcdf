"""Attention by cuDNN for the lengths that come first, by other kernels for those that follow.

On Hopper and Blackwell torch prefers cuDNN's attention, which is twice as fast as flash attention,
and makes a plan on the host for each shape that is new: an H200 took 50 to 75 ms for a forward and
120 to 150 for a forward and a backward pass, with a mask up to 2.7 s (torch 2.11, cuDNN 9.19). That
pays where all micro-batches have one shape. Where they do not, nearly each would pay.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gold_trainer.batches import WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.speed.grouping import length_of

TAG = "without cuDNN's attention"
Shape = tuple[tuple[int, int], ...]  # rows and length, of student and teacher


class AttentionKernels:
    """cuDNN's attention for micro-batches of the first one's shape, if that has no padding."""

    def __init__(self, args: GOLDConfig) -> None:
        self.is_on = args.device.type == "cuda"
        self.first: Shape | None = None  # where that has padding too
        self.is_seen = False

    @contextmanager
    def running(self, batch: WindowBatch) -> Iterator[None]:
        """Around forward and backward pass of a micro-batch."""
        if not self.is_on:
            yield
            return
        shape = shape_of(batch)
        if not self.is_seen:
            self.first, self.is_seen = shape, True
        with ExitStack() as stack:
            if shape is None or shape != self.first:
                stack.enter_context(without_cudnn())
            yield


def shape_of(batch: WindowBatch) -> Shape | None:
    """None: rows differ in length, so that some are padded."""
    sides: Sequence = (batch.examples, batch.teacher_examples)
    lengths = [{length_of(example) for example in side} for side in sides]
    if any(len(own) != 1 for own in lengths):
        return None
    return tuple((len(side), own.pop()) for side, own in zip(sides, lengths, strict=True))


@contextmanager
def without_cudnn() -> Iterator[None]:
    """torch's next choice. What is compiled within has it built in, and a place of its own in the
    compiler's cache, which knows of no kernels.
    """
    config: Any = torch.compiler.config
    flags = torch.backends.cuda
    was_enabled = flags.cudnn_sdp_enabled()
    with ExitStack() as stack:
        if hasattr(config, "cache_key_tag"):
            tag = f"{config.cache_key_tag} {TAG}".strip()
            stack.enter_context(config.patch(cache_key_tag=tag))
        flags.enable_cudnn_sdp(False)
        stack.callback(flags.enable_cudnn_sdp, was_enabled)
        yield
