"""Fields of GOLDConfig for distillation across tokenizers, with the names that TRL users know."""

from dataclasses import dataclass, field

from gold_trainer.fields.checks import refuse_given

MERGE_STRATEGIES = ("bayesian", "observed")
LOSS_TYPES = ("uld", "chunk_likelihood", "projected_jsd")
HYBRID_WEIGHTS = ("uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight")


@dataclass
class ULDFields:
    """Universal logit distillation (Boizard et al. 2024, arXiv 2402.12030) and GOLD's extensions.

        loss = uld_distillation_weight * mean over groups of ULD
             + uld_crossentropy_weight * mean over tokens of off-policy completions of their CE

    A group is a minimal run of student tokens and a minimal run of teacher tokens that end at a
    common byte of the completion. CE is the cross-entropy of a student's token. An off-policy
    completion is one of the dataset, or with seq_kd one that the teacher wrote. Both means are over
    the global batch: all micro-batches of a step on all ranks.

    Two defaults differ from TRL's. The probabilities of a group's tokens are merged by the chain
    rule, and the end of a turn is distilled.

    The hybrid loss with beta = 0.5 teaches an untrained student little. Take a word that is one
    token of the teacher and several of the student. An untrained student gives it a probability
    near 0. The gradient of the JSD is proportional to that probability, so it is near 0 too. Use
    beta = 0, or add uld_crossentropy_weight. In the demo across families 95 % of the answers are
    right with beta = 0, none with beta = 0.5, and 95 % with beta = 0.5 and
    uld_crossentropy_weight = 1 on the teacher's text.
    """

    use_uld_loss: bool = field(
        default=False,
        metadata={
            "help": "Distil across tokenizers and families: each side has its own processor and "
            "chat template, and completions are aligned by their bytes."
        },
    )
    uld_loss_type: str = field(
        default="uld",
        metadata={
            "help": "What is compared across tokenizers. uld: sorted probabilities, and with "
            "uld_use_hybrid_loss matched entries. chunk_likelihood: how likely both models find "
            "the bytes of a group. projected_jsd: generalized JSD with beta in the teacher's "
            "vocabulary, into which the student's distribution is projected.",
            "choices": LOSS_TYPES,
        },
    )
    uld_group_temperature: float = field(
        default=100.0,
        metadata={
            "help": "Of chunk_likelihood: the likelihood of a group to the power of 1 / this."
        },
    )
    teacher_tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Processor or tokenizer of the teacher: folder or hub id; None: the teacher's."
        },
    )
    use_extended_uld: bool = field(
        default=True,
        metadata={
            "help": "Align groups of tokens by their bytes. False: token i of the student with "
            "token i of the teacher, whatever they spell; the longer side is cut."
        },
    )
    uld_token_merge_strategy: str = field(
        default="bayesian",
        metadata={
            "help": "Distribution of a group of tokens. bayesian: that of the last, times the "
            "probabilities of the earlier ones (chain rule). observed, TRL's default: that of the "
            "first, times those of the later ones, read one position late as TRL does.",
            "choices": MERGE_STRATEGIES,
        },
    )
    uld_use_hybrid_loss: bool = field(
        default=False,
        metadata={
            "help": "Generalized JSD with beta on vocabulary entries that both sides have, sorted "
            "L1 on the others. An untrained student needs beta=0 or uld_crossentropy_weight."
        },
    )
    uld_relaxed_overlap: bool = field(
        default=False,
        metadata={
            "help": "Of the hybrid loss: an entry that the teacher does not have is matched with "
            "the first token by which the teacher would write it, if that has no other partner."
        },
    )
    uld_hybrid_matched_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of matched entries; None for both weights: the matched share of the "
            "student's vocabulary."
        },
    )
    uld_hybrid_unmatched_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the other entries; None: one minus that share."},
    )
    uld_crossentropy_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross-entropy on completions that the student did not write."
        },
    )
    uld_distillation_weight: float = field(
        default=1.0, metadata={"help": "Weight of the ULD or hybrid loss."}
    )
    uld_student_temperature: float = field(
        default=1.0, metadata={"help": "Divides the student's logits in the ULD loss."}
    )
    uld_teacher_temperature: float = field(
        default=1.0, metadata={"help": "Divides the teacher's logits in the ULD loss."}
    )
    uld_skip_student_eos: bool = field(
        default=False,
        metadata={
            "help": "Leave the end of a turn out (TRL's default): the student does not learn from "
            "the teacher when to stop."
        },
    )
    uld_skip_teacher_eos: bool = field(
        default=False,
        metadata={"help": "The same: one of the two is enough. TRL has both."},
    )

    @property
    def has_end_of_turn(self) -> bool:
        """Whether the stop decision is distilled."""
        return not (self.uld_skip_student_eos or self.uld_skip_teacher_eos)

    def check_uld(self) -> None:
        """ValueError for what cannot be together, and for fields that would be ignored."""
        self._check_is_used()
        if self.uld_crossentropy_weight == self.uld_distillation_weight == 0:
            raise ValueError(
                "GOLDConfig: uld_distillation_weight or uld_crossentropy_weight must be above 0, "
                "got 0 for both; nothing would be learnt."
            )
        self._check_hybrid()
        self._check_type()

    def _check_is_used(self) -> None:
        if self.use_uld_loss:
            return
        for name, spec in ULDFields.__dataclass_fields__.items():
            value = getattr(self, name)
            if name.startswith(("uld_", "use_extended")) and value != spec.default:
                raise ValueError(
                    f"GOLDConfig: {name} belongs to the loss across tokenizers, got {value!r} "
                    "without it; set use_uld_loss=True, or leave it out."
                )

    def _check_hybrid(self) -> None:
        weights = [getattr(self, name) for name in HYBRID_WEIGHTS]
        if (weights[0] is None) != (weights[1] is None):
            raise ValueError(
                f"GOLDConfig: {' and '.join(HYBRID_WEIGHTS)} must be given both or not at all, got "
                f"{weights[0]} and {weights[1]}; None takes them from the overlap of the "
                "vocabularies."
            )
        if weights[0] is not None and not self.uld_use_hybrid_loss:
            raise ValueError(
                f"GOLDConfig: {' and '.join(HYBRID_WEIGHTS)} weigh the parts of the hybrid loss, "
                f"got {weights[0]} and {weights[1]}; set uld_use_hybrid_loss=True."
            )
        if weights == [0, 0] and self.uld_distillation_weight > 0:
            raise ValueError(
                f"GOLDConfig: {HYBRID_WEIGHTS[0]} or {HYBRID_WEIGHTS[1]} must be above 0, got 0 "
                "for both; for cross-entropy alone set uld_distillation_weight=0."
            )

    def _check_type(self) -> None:
        """The fields that a loss reads beside its own."""
        kind = self.uld_loss_type
        if self.uld_relaxed_overlap and not self.uld_use_hybrid_loss:
            raise ValueError(
                "GOLDConfig: uld_relaxed_overlap widens the overlap of the hybrid loss, got True "
                "without it; set uld_use_hybrid_loss=True."
            )
        if kind != "chunk_likelihood" and self.uld_group_temperature != 100.0:
            raise ValueError(
                "GOLDConfig: uld_group_temperature is a number of "
                f"uld_loss_type='chunk_likelihood', got {self.uld_group_temperature} with "
                f"{kind!r}; set that loss, or leave it out."
            )
        if kind == "uld":
            return
        why = f"with uld_loss_type={kind!r}, which compares aligned groups by the chain rule"
        for name in ("uld_use_hybrid_loss", "use_extended_uld", "uld_token_merge_strategy"):
            default = ULDFields.__dataclass_fields__[name].default
            refuse_given(self, (name,), f"{default!r} {why}", "; leave it out")
