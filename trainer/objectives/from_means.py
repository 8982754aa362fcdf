"""The forward KL of a student whose head is frozen, from means of its head that a cache holds.

N scored rows, D hidden size of the student. See gold_kernels/means/linear.py.
"""

from typing import Any

import torch
from torch import Tensor

from gold_kernels import HeadMeans, fused_linear_mean_kl
from gold_kernels.means.row_loss import MeanKL
from gold_trainer import sharding
from gold_trainer.batches import MicroBatch
from gold_trainer.caching.facts import PRECISIONS, precision_of, refuse_other_facts
from gold_trainer.caching.keys import digest
from gold_trainer.caching.store import manifest_of
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.cache import check_head_means
from gold_trainer.logit_form import LogitForm
from gold_trainer.models import Head
from gold_trainer.objectives.objective import summed
from gold_trainer.objectives.same_vocabulary import SameVocabulary
from gold_trainer.sides import Side

REMEDY = "make a cache of teacher_cache_form=hidden"


def pack(teacher: HeadMeans) -> Tensor:  # (N, D + 3) float32
    """All of it in one tensor; float32 holds tokens up to 2**24."""
    others = teacher.entropies, teacher.bias_means, teacher.tokens.float()
    return torch.cat([teacher.means, *(part.unsqueeze(1) for part in others)], 1)


def unpack(rows: Tensor) -> HeadMeans:
    means, entropies, bias_means, tokens = rows.split([rows.shape[1] - 3, 1, 1, 1], 1)
    return HeadMeans(
        means.contiguous(),
        entropies.flatten(),
        bias_means.flatten(),
        tokens.flatten().long(),
    )


def facts_of_means(args: GOLDConfig, head: Head) -> dict[str, Any]:
    """What a cache of means was made with beside the teacher: the student's head as it computes,
    and the temperature of the teacher.
    """
    tensors = [tensor for tensor in (head.weight, head.bias) if tensor is not None]
    for tensor in tensors:
        if tensor.requires_grad:
            raise ValueError(
                "GOLDTrainer: the student's lm_head must be frozen where teacher_cache has "
                "head_means, got one that is trained; train an adapter that leaves it alone (LoRA "
                f"without modules_to_save), or {REMEDY}."
            )
    facts: dict[str, Any] = {"teacher_temperature": args.teacher_temperature}
    if head.weight.is_meta:  # FSDP loads the weights on the main process alone, which looks at them
        return facts
    dtype = PRECISIONS.get(precision_of(args)) or head.weight.dtype
    with sharding.gathered(tensors):
        computed = digest([str(dtype).encode(), *(_bytes(tensor, dtype) for tensor in tensors)])
    return {**facts, "student_head": computed.hex()}


def _bytes(tensor: Tensor, dtype: torch.dtype) -> bytes:
    array: Any = tensor.detach().to(dtype).contiguous().cpu().view(torch.uint8).numpy()
    content: bytes = array.tobytes()
    return content


def check_softcap(form: LogitForm) -> None:
    if form.softcap is not None:
        raise ValueError(
            "GOLDTrainer: the student's logits must have no softcap where teacher_cache has "
            f"head_means, got final_logit_softcapping={form.softcap:g}: they are not linear in its "
            f"hidden states; {REMEDY}."
        )


class FromMeans(SameVocabulary):
    """jsd with beta = 0, where a cache has taken the teacher's part of it."""

    def __init__(self, args: GOLDConfig, student: Side, teacher: Side) -> None:
        super().__init__(args, student, teacher)
        check_head_means(args)
        manifest = manifest_of(args)
        facts = facts_of_means(args, student.head)
        refuse_other_facts(str(args.teacher_cache), manifest.facts, facts)
        self.sums, self.temperature = MeanKL.value_names, args.loss_temperature

    def loss(
        self,
        student_hidden: Tensor,  # (N, D)
        student_head: Head,
        teacher_hidden: Tensor,  # (N, D + 3), packed
        teacher_head: Head,
        batch: MicroBatch,
        item_weights: Tensor | None,  # (2,)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        check_softcap(self.forms[0])
        own, row_weights, label_weights = self.term_weights(
            batch, (student_hidden, student_head), None, item_weights, student_hidden.shape[0]
        )
        loss, values = fused_linear_mean_kl(
            student_hidden,
            student_head.weight,
            unpack(teacher_hidden),
            row_weights,
            temperature=self.temperature,
            student_bias=student_head.bias,
            return_metrics=True,
            **self.label_options(batch, label_weights),
            vocab_size=self.num_entries,
            logit_scale=self.forms[0].scale,
            **self.options,
        )
        return loss, summed(values, own)
