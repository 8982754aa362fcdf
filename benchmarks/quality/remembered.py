"""What a process computes once, as all its runs read the same pictures and questions."""

from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, Idefics3ImageProcessor, LlavaImageProcessor
from transformers.image_utils import make_flat_list_of_images

from gold_kernels import TokenAlignment
from gold_trainer.batches import BatchAlignment, WindowBatch
from gold_trainer.data.rows import Row


class Remembered:
    """A collator that renders a question with its answer once: the pictures, all of one size,
    change nothing but themselves.
    """

    def __init__(self, collator: Any, batches: dict[tuple, WindowBatch]) -> None:
        self.collator, self.batches = collator, batches

    def __call__(self, rows: list[Row]) -> WindowBatch:
        parts = [self._one(row) for row in rows]
        examples = [part.examples[0] for part in parts]
        is_one = parts[0].examples is parts[0].teacher_examples
        teacher = examples if is_one else [part.teacher_examples[0] for part in parts]
        if parts[0].alignment is None:
            return WindowBatch(examples, teacher)
        groups = TokenAlignment.concatenate([part.alignment.groups for part in parts])
        reasons = [reason for part in parts for reason in part.alignment.skip_reasons]
        return WindowBatch(examples, teacher, BatchAlignment(groups, reasons))

    def _one(self, row: Row) -> WindowBatch:
        key = repr(row.prompt), row.completion
        if key not in self.batches:
            self.batches[key] = self.collator([row])
        batch = self.batches[key]
        sides = [batch.examples]
        if batch.teacher_examples is not batch.examples:
            sides.append(batch.teacher_examples)
        sides = [[replace(side[0], index=row.index, images=row.images)] for side in sides]
        return replace(batch, examples=sides[0], teacher_examples=sides[-1])


class RemembersPictures:
    """An image processor that keeps what it makes of a picture."""

    kept: dict[int, tuple[Image.Image, BatchFeature]] | None = None

    def preprocess(self, images: Any, *args: Any, **options: Any) -> BatchFeature:
        of_picture = super().preprocess  # type: ignore[misc]
        if self.kept is None:
            return of_picture(images, *args, **options)
        is_nested = isinstance(images, (list, tuple)) and isinstance(images[0], (list, tuple))
        found = []
        for picture in make_flat_list_of_images(images):
            if id(picture) not in self.kept:
                one = of_picture([[picture]] if is_nested else [picture], *args, **options)
                self.kept[id(picture)] = picture, one  # which holds the picture, and so its id
            found.append(self.kept[id(picture)][1])
        joined = {
            name: torch.cat([one[name] for one in found])
            if isinstance(value, torch.Tensor)
            else [item for one in found for item in one[name]]
            for name, value in found[0].items()
        }
        return BatchFeature(joined)


class Idefics3Pictures(RemembersPictures, Idefics3ImageProcessor):
    pass


class LlavaPictures(RemembersPictures, LlavaImageProcessor):
    pass
