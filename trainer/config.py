"""GOLDConfig: every field of transformers.TrainingArguments plus those of distillation."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from gold_trainer.fields.cache import CacheFields
from gold_trainer.fields.checks import check_fields, dict_of_text
from gold_trainer.fields.loss import LossFields
from gold_trainer.fields.paths import expand_paths
from gold_trainer.fields.rollout import RolloutFields
from gold_trainer.fields.rows import RowFields
from gold_trainer.fields.run import (
    RunFields,
    check_inherited,
    check_output_dir,
    choose_direction,
    naming_the_launcher,
    pin_beside_a_gpu,
    rename_checkpointing,
)
from gold_trainer.fields.teacher import ServedFields, TeacherFields
from gold_trainer.fields.uld import ULDFields
from gold_trainer.fields.vllm import VLLMFields
from gold_trainer.flags import check_keywords
from gold_trainer.precision import (
    choose_checkpointing,
    choose_precision,
    is_checkpointing_open,
)
from gold_trainer.speed.fields import SpeedFields
from gold_trainer.weighting.fields import WeightingFields

# Dicts, which a command line has as JSON. TrainingArguments would make a number of a text "007".
DICTS = (
    *("model_init_kwargs", "teacher_model_init_kwargs", "teacher_models", "chat_template_kwargs"),
    *("loss_kwargs", "token_weighting_kwargs", "generation_kwargs"),
)


@dataclass
class GOLDConfig(  # type: ignore[misc]  # bf16 is a bool once __post_init__ has run
    RunFields,
    SpeedFields,
    TeacherFields,
    ServedFields,
    CacheFields,
    LossFields,
    ULDFields,
    WeightingFields,
    RowFields,
    RolloutFields,
    VLLMFields,
    TrainingArguments,
):
    """Arguments of GOLDTrainer, with the names that TRL users know.

    The default loss is the generalized JSD (Agarwal et al. 2023, arXiv 2306.13649): beta = 0 is
    forward KL(P || Q), beta = 1 reverse KL(Q || P) of teacher P and student Q. LossFields has the
    fields of the loss, TeacherFields, ServedFields and CacheFields those of the teacher. With
    use_uld_loss teacher and student may have different tokenizers, and ULDFields has its fields.
    lmbda is the share of on-policy micro-batches, whose completions the student writes.

    Every field with its default and meaning: `gold-trainer train --help`, docs/training.md. Set
    learning_rate: the default is TRL's, 1e-7. ValueError names the field and the remedy.
    """

    lmbda: float = field(
        default=0.5,
        metadata={
            "help": "Probability of a micro-batch to be on-policy, in [0, 1]: the student writes "
            "its completions. Others are off-policy: completions of the rows, or with seq_kd the "
            "teacher's."
        },
    )
    max_completion_length: int = field(
        default=128, metadata={"help": "Most tokens of a generated completion."}
    )
    max_length: int | None = field(
        default=2048,
        metadata={
            "help": "Most tokens of prompt, image tokens and completion together, on either side; "
            "a longer completion is cut at its end, for a longer prompt see on_long_prompt. None: "
            "no limit."
        },
    )
    seq_kd: bool = field(
        default=False,
        metadata={"help": "Off-policy micro-batches learn from completions the teacher generates."},
    )
    num_generations: int = field(
        default=1, metadata={"help": "Completions of a prompt in one optimizer step."}
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of one device in an optimizer step; times num_generations it is "
            "per_device_train_batch_size * gradient_accumulation_steps. None computes it."
        },
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print sample completions as a table."}
    )
    log_completions_steps: int = field(
        default=100, metadata={"help": "Steps between two tables of completions."}
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "Rows of that table; None: the whole micro-batch."}
    )

    _computed_batch_size = 0  # no annotation: a field has one

    @property
    def cut_to(self) -> int | None:
        """How many last tokens are kept of a prompt that leaves no room; None: none are."""
        if self.on_long_prompt != "truncate_left" or self.max_length is None:
            return None
        return self.max_length - self.max_completion_length

    def __post_init__(self) -> None:
        self._check()  # before TrainingArguments touches devices or folders
        self.is_checkpointing_chosen = is_checkpointing_open(self)  # here, and not by the user
        rename_checkpointing(self)
        choose_precision(self)
        choose_direction(self)
        with naming_the_launcher():
            super().__post_init__()
        if self.is_checkpointing_chosen:
            choose_checkpointing(self)
        pin_beside_a_gpu(self)
        self._names = {*vars(self), "_names"}

    def check_again(self) -> None:
        """Refuse what the constructor would, of fields that were set since. A trainer calls it."""
        if type(self) is GOLDConfig:  # a class of the user's own may have more
            known = getattr(self, "_names", vars(self))  # of an older file there are none
            new = [name for name in vars(self) if name not in known and name[0] != "_"]
            check_keywords("GOLDConfig", new, self.__dataclass_fields__)
        if self.generation_batch_size == self._computed_batch_size:
            self.generation_batch_size = None
        self._check()
        if isinstance(self.report_to, str):  # TrainingArguments made a list of it
            self.report_to = [] if self.report_to == "none" else [self.report_to]

    def _check(self) -> None:
        if isinstance(self.resume_from_checkpoint, bool):  # as train() takes it
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower()
        self.name_weighting()
        for name in DICTS:
            setattr(self, name, dict_of_text(getattr(self, name)))
        expand_paths(self, "GOLDConfig")
        check_fields(self, "GOLDConfig")
        self.check_rows()
        self.check_rollouts()
        self.check_vllm()
        if self.seq_kd and self.lmbda == 1:
            raise ValueError(
                "GOLDConfig: seq_kd must be False where every micro-batch is on-policy, got True "
                "and lmbda=1.0; the teacher writes completions of off-policy ones: lower lmbda."
            )
        self.check_loss(is_across=self.use_uld_loss)
        self.check_uld()
        self.check_teacher()
        self.check_served()
        self.check_teacher_cache()
        for name in ("distillation_weight", "uld_distillation_weight"):
            if getattr(self, name) == 0 and self.lmbda == 1:
                raise ValueError(
                    f"GOLDConfig: {name} must be above 0 where every micro-batch is on-policy, got "
                    "0 and lmbda=1.0; cross-entropy is for completions that the student did not "
                    "write: lower lmbda."
                )
        self._check_generations()
        self.check_weighting()
        if self.max_length is not None and self.max_completion_length >= self.max_length:
            raise ValueError(
                "GOLDConfig: max_completion_length must be below max_length, got "
                f"{self.max_completion_length} and {self.max_length}; raise max_length, it holds "
                "the prompt with its image tokens too."
            )
        check_inherited(self)
        check_output_dir(self)

    def _check_generations(self) -> None:
        """TRL's rule; generation_batch_size is computed where it is None."""
        factors = self.per_device_train_batch_size, self.gradient_accumulation_steps
        rows, num_generations = factors[0] * factors[1], self.num_generations
        names = "per_device_train_batch_size * gradient_accumulation_steps"
        if rows % num_generations != 0:
            raise ValueError(
                f"GOLDConfig: num_generations must divide {names} = {factors[0]} "
                f"* {factors[1]}, got {num_generations}; set gradient_accumulation_steps to a "
                "multiple of it."
            )
        if self.generation_batch_size is None:
            self.generation_batch_size = self._computed_batch_size = rows // num_generations
        if self.generation_batch_size * num_generations != rows:
            raise ValueError(
                f"GOLDConfig: generation_batch_size * num_generations must be {names}, got "
                f"{self.generation_batch_size} * {num_generations} and {factors[0]} * "
                f"{factors[1]}; set generation_batch_size={rows // num_generations}, or None."
            )
        if num_generations > 1 and self.auto_find_batch_size:
            raise ValueError(
                "GOLDConfig: auto_find_batch_size must be False with num_generations above 1, got "
                f"True and num_generations={num_generations}; a smaller batch would hold parts of "
                "a prompt's completions: set per_device_train_batch_size."
            )
