"""Likelihoods of aligned groups across tokenizers, as the objective of a run."""

from typing import Any

from gold_kernels import CompletionAligner, LikelihoodMetrics, fused_linear_chunk_likelihood
from gold_trainer.config import GOLDConfig
from gold_trainer.objectives.cross_tokenizer import CrossTokenizer


class ChunkLikelihood(CrossTokenizer):
    """fused_linear_chunk_likelihood: how likely both models find the bytes of a group."""

    sums = LikelihoodMetrics._fields
    loss_name = "chunk_likelihood_loss"
    function = staticmethod(fused_linear_chunk_likelihood)

    def own_options(self, args: GOLDConfig, aligner: CompletionAligner) -> dict[str, Any]:
        return {"group_temperature": args.uld_group_temperature}

    def logged(self) -> tuple[str, ...]:
        return "student_log_likelihood", "teacher_log_likelihood"
