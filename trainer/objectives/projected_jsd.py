"""Divergence in the teacher's vocabulary, into which the student is projected, as the objective of
a run.

N_s, N_t scored rows of a side, D hidden size (D_s, D_t).
"""

from typing import Any

from torch import Tensor

from gold_kernels import (
    CompletionAligner,
    ProjectedMetrics,
    VocabProjection,
    fused_linear_projected_jsd,
)
from gold_trainer.batches import MicroBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.models import Head
from gold_trainer.objectives.cross_tokenizer import CrossTokenizer


class ProjectedJSD(CrossTokenizer):
    """fused_linear_projected_jsd with a projection from both tokenizers."""

    sums = ProjectedMetrics._fields
    loss_name = "projected_jsd_loss"
    function = staticmethod(fused_linear_projected_jsd)

    def own_options(self, args: GOLDConfig, aligner: CompletionAligner) -> dict[str, Any]:
        return {"projection": VocabProjection.from_token_bytes(aligner.student, aligner.teacher)}

    def loss(
        self,
        student_hidden: Tensor,  # (N_s, D_s)
        student_head: Head,
        teacher_hidden: Tensor,  # (N_t, D_t)
        teacher_head: Head,
        batch: MicroBatch,
        item_weights: Tensor | None,  # (2,)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # once: it stays on the device
        self.options["projection"] = self.options["projection"].to(student_hidden.device)
        return super().loss(
            student_hidden, student_head, teacher_hidden, teacher_head, batch, item_weights
        )

    def logged(self) -> tuple[str, ...]:
        return "student_projected_mass", "teacher_projected_mass"
