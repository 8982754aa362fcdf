"""The fused JSD in ms-swift's GKD trainer, with use_liger_kernel true.

ms-swift builds Liger's loss, whose default is half cross-entropy; releases that do not pass weights
train that. Here the weights are 0 and 1 unless the caller says otherwise.
"""

from typing import Any

from gold_kernels.integrations.patching import MISSING, Patch, Replacement, Target
from gold_kernels.jsd.liger import FusedLinearJSDLoss

LOSS, IS_THERE = "LigerFusedLinearJSDLoss", "_liger_kernel_available"


class DivergenceLoss(FusedLinearJSDLoss):
    """The divergence alone, unless weights are passed."""

    def __init__(
        self,
        weight_hard_loss: float = 0.0,
        weight_soft_loss: float = 1.0,
        *others: Any,
        **options: Any,
    ) -> None:
        super().__init__(weight_hard_loss, weight_soft_loss, *others, **options)


def patch_swift() -> Patch:
    """Replace the loss that `swift.rlhf_trainers.gkd_trainer` builds; Liger need not be installed.

    undo() of the Patch puts it back. ValueError for a release without it.
    """
    from swift.rlhf_trainers import gkd_trainer

    names = vars(gkd_trainer)
    if IS_THERE not in names:
        raise ValueError(
            f"patch_swift: a swift.rlhf_trainers.gkd_trainer with {IS_THERE} is expected, got "
            "another; install ms-swift 4.6, or use gold_kernels in your own trainer."
        )
    replaced = {LOSS: DivergenceLoss, IS_THERE: True}
    return Patch(
        [
            Replacement(
                Target(gkd_trainer, name, lambda before: before), names.get(name, MISSING), after
            )
            for name, after in replaced.items()
        ]
    )
