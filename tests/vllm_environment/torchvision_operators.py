"""Declares two operators of torchvision where its own binaries do not fit torch: importing it asks
for them by name, and nothing here calls them.
"""

import torch

library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
