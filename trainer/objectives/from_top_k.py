"""The generalized JSD of a teacher's k likeliest tokens and all others: loss_top_k.

A teacher that is here gives its hidden states, of which the k are taken; a cache or a server has
them.
N scored rows, D hidden size (D_s, D_t), k entries a row, K of a cache or a server.
"""

from torch import Tensor

from gold_kernels import fused_linear_top_k, head_top_k
from gold_kernels.topk.row_loss import TopK
from gold_trainer.batches import MicroBatch
from gold_trainer.caching.facts import refuse_other_facts
from gold_trainer.caching.packed import unpack
from gold_trainer.config import GOLDConfig
from gold_trainer.models import Head, whole
from gold_trainer.objectives.objective import summed
from gold_trainer.objectives.same_vocabulary import SameVocabulary
from gold_trainer.sides import Side


class FromTopK(SameVocabulary):
    """jsd of k + 1 outcomes."""

    def __init__(self, args: GOLDConfig, student: Side, teacher: Side) -> None:
        super().__init__(args, student, teacher)
        self.k, self.is_stored = args.loss_top_k, teacher.entries is not None
        self.beta, self.temperature = args.beta, args.loss_temperature
        self.teacher_temperature = args.teacher_temperature
        self.row_loss = TopK(self.beta, self.temperature)
        self.sums = self.row_loss.value_names
        num_entries = self.vocab_size or student.head.out_features
        if self.k > num_entries:
            raise ValueError(
                f"GOLDTrainer: loss_top_k must be at most {num_entries}, the tokens of the "
                f"vocabulary, got {self.k}; 64 is usual, 0 compares all."
            )
        self.facts = {"teacher_temperature": self.teacher_temperature, "vocabulary": num_entries}
        if teacher.entries is not None:
            refuse_other_facts(*teacher.entries, self.facts)  # a server has none

    def teacher_entries(self, hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """(N, k) ids and log-probabilities of a teacher's hidden states (N, D_t), whose logits are
        float32 whatever logits_dtype is: a cache of them serves either.
        """
        form, options = self.forms[1], self.options
        return head_top_k(
            hidden,
            whole(head.weight),
            self.k,
            temperature=self.teacher_temperature,
            teacher_bias=None if head.bias is None else whole(head.bias),
            vocab_size=self.num_entries,
            logit_scale=form.scale,
            final_logit_softcapping=form.softcap,
            **{name: options[name] for name in ("chunk_size", "budget_bytes") if name in options},
        )

    def loss(
        self,
        student_hidden: Tensor,  # (N, D_s)
        student_head: Head,
        teacher_hidden: Tensor,  # (N, D_t), or (N, 2 K), packed
        teacher_head: Head,
        batch: MicroBatch,
        item_weights: Tensor | None,  # (2,)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        form, student = self.forms[0], (student_hidden, student_head)
        teacher = None if self.is_stored else (teacher_hidden, teacher_head)
        own, row_weights, label_weights = self.term_weights(
            batch, student, teacher, item_weights, student_hidden.shape[0]
        )
        if self.is_stored:
            ids, log_probs = unpack(teacher_hidden, self.k, self.num_entries)
        else:
            ids, log_probs = self.teacher_entries(teacher_hidden, teacher_head)
        loss, values = fused_linear_top_k(
            student_hidden,
            student_head.weight,
            ids,
            log_probs,
            row_weights,
            beta=self.beta,
            temperature=self.temperature,
            student_bias=student_head.bias,
            return_metrics=True,
            **self.label_options(batch, label_weights),
            vocab_size=self.num_entries,
            logit_scale=form.scale,
            final_logit_softcapping=form.softcap,
            **self.options,
        )
        return loss, summed(values, own)
