"""Student and teacher: what must fit together, and the loss in the place of the head."""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import ModelOutput, is_peft_available

from gold_trainer.collator import Processor, token_ids_of, tokenizer_of

# Config fields of tokens that stand for picture, video or sound features.
PLACEHOLDER_FIELD = re.compile(r"(image|video|audio|vision|boi|eoi).*token_(id|index)$")
# Config field -> exponent of its value in the factor that logits are multiplied with.
SCALE_FIELDS = {
    "logit_scale": 1,  # Cohere
    "logits_scaling": -1,  # Granite divides
    "lm_head_multiplier": 1,  # Falcon H1
    "output_multiplier": 1,
}
# Heads of one tokenizer are padded to a multiple of 64 to 512 rows (Qwen2.5: 151936 and 152064),
# heads of two differ by thousands.
MAX_PADDING = 1024
# Config fields of the model and its vision tower that say what pixels and image tokens it takes.
PICTURE_FIELDS = (
    *("image_size", "patch_size", "temporal_patch_size", "spatial_merge_size", "scale_factor"),
    *("downsample_factor", "mm_tokens_per_image", "vision_feature_select_strategy"),
)
# Values of init_lora_weights with which peft subtracts the adapter's start from the weights below,
# or quantises them.
INITS_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_vision_language(config: PretrainedConfig) -> bool:
    return config.get_text_config() is not config


def placeholder_ids_of(config: PretrainedConfig) -> list[int]:
    """Tokens that no completion may hold: the model would look for the pictures they stand for."""
    fields = config.to_dict().items()
    return sorted(
        {i for name, i in fields if PLACEHOLDER_FIELD.search(name) and isinstance(i, int)}
    )


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model below an adapter."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def check_decoder(model: nn.Module, side: str) -> None:
    if has_adapter(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"GOLDTrainer: the {side}'s adapter must change weights, got the prompt learning "
            f"{type(model.active_peft_config).__name__}, whose virtual tokens shift all positions; "
            "use LoraConfig."
        )
    base = base_model(model)
    can_generate = isinstance(base, PreTrainedModel) and base.can_generate()
    if not can_generate or base.config.is_encoder_decoder:
        raise not_a_decoder(type(base).__name__, side)


def not_a_decoder(kind: str, side: str) -> ValueError:
    return ValueError(
        f"GOLDTrainer: the {side} must be a decoder with a language-model head, got {kind}; choose "
        "one that AutoModelForImageTextToText or AutoModelForCausalLM loads."
    )


def has_adapter(model: nn.Module) -> bool:
    return base_model(model) is not model


@contextmanager
def teaching(teacher: nn.Module, is_own_teacher: bool) -> Iterator[None]:
    """Within the context a student that is its own teacher is the model below its adapter, in eval
    mode. Another teacher is as it should be anyway.
    """
    if not is_own_teacher:
        yield
        return
    was_training = teacher.training
    needed_grad = [(p, p.requires_grad) for p in teacher.parameters()]
    teacher.eval()
    try:
        with teacher.disable_adapter():
            yield
    finally:
        teacher.train(was_training)
        for parameter, needs_grad in needed_grad:  # peft thaws what was frozen of an adapter
            parameter.requires_grad_(needs_grad)


def check_trained(student: nn.Module, is_own_teacher: bool) -> None:
    """The student learns something; as its own teacher nothing that the teacher would follow."""
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "GOLDTrainer: the student must have parameters that require gradients, got none; load "
            "its adapter with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    if not is_own_teacher:
        return
    tuner = getattr(student.base_model, "prefix", "no prefix")  # lora_ in lora_A.default.weight
    parts = (tuner, ".modules_to_save.", ".trainable_tokens_")
    shared = [name for name in trained if not any(part in name for part in parts)]
    if shared:
        raise ValueError(
            "GOLDTrainer: a student that is its own teacher must train its adapter only, got "
            f"{shared[0]} among {len(shared)} parameters that the teacher would share; freeze them "
            "(bias='none'), train copies (modules_to_save), or pass teacher_model=."
        )
    for name in student.active_adapters:
        init = getattr(student.peft_config[name], "init_lora_weights", None)
        if isinstance(init, str) and init.lower().startswith(INITS_OF_THE_BASE):
            raise ValueError(
                "GOLDTrainer: a student that is its own teacher must keep the weights below its "
                f"adapter, got init_lora_weights={init!r}, which takes the adapter out of them; "
                "use init_lora_weights=True, or pass teacher_model=."
            )


def lm_head(model: nn.Module, side: str, *, is_own_teacher: bool = False) -> nn.Linear:
    """The head whose place the loss takes; refuses what the loss would silently ignore.

    Of a head in modules_to_save it is the trained copy, or for the student as its own teacher the
    original.
    """
    head = base_model(model).get_output_embeddings()
    if is_peft_available():
        from peft.utils import ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            original, trained = head.original_module, head.modules_to_save[head.active_adapters[0]]
            # peft makes the copy of a tied head with the two exchanged, its weight as it should be
            trained.in_features, trained.out_features = original.in_features, original.out_features
            head = original if is_own_teacher else trained
    if type(head) is not nn.Linear:
        raise ValueError(
            f"GOLDTrainer: the {side}'s lm_head must be a plain torch.nn.Linear, got "
            f"{type(head).__module__}.{type(head).__name__}; leave lm_head out of LoRA's "
            "target_modules (modules_to_save trains it whole) and out of quantisation "
            "(llm_int8_skip_modules=['lm_head'])."
        )
    if not head.weight.is_floating_point() or type(head.weight) is not nn.Parameter:
        raise ValueError(
            f"GOLDTrainer: the {side}'s lm_head must hold plain floats, got "
            f"{type(head.weight).__name__} of {head.weight.dtype}; leave lm_head out of "
            "quantisation and of tensor parallelism."
        )
    return head


@dataclass
class LogitForm:
    """What a model makes of its head's output x: softcap(scale x), softcap(x) = c tanh(x / c)."""

    side: str
    scale: float = 1.0
    softcap: float | None = None  # c
    is_checked: bool = False

    @classmethod
    def from_config(cls, config: PretrainedConfig, side: str) -> "LogitForm":
        config = config.get_text_config()
        scale = 1.0
        for name, exponent in SCALE_FIELDS.items():
            scale *= (getattr(config, name, None) or 1.0) ** exponent
        return cls(side, scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, x: Tensor) -> Tensor:
        x = self.scale * x
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def check(self, x: Tensor, actual: Tensor) -> None:
        """Once, on what the model made of x: no other form passes unnoticed."""
        if self.is_checked:
            return
        options = {"rtol": 8 * torch.finfo(x.dtype).eps, "atol": 0.0, "equal_nan": True}
        expected, actual = self(x.detach().float()), actual.detach().float().to(x.device)
        if actual.shape != x.shape or not torch.allclose(actual, expected, **options):
            raise ValueError(
                f"GOLDTrainer: the {self.side}'s logits must be softcap(scale * (hidden weight^T + "
                f"bias)) with scale={self.scale} and softcap={self.softcap} from its config, got "
                "something else from its forward; choose a model whose logits are."
            )
        self.is_checked = True


def check_pair(student: PretrainedConfig, teacher: PretrainedConfig, use_uld_loss: bool) -> None:
    """Same modality; without the loss across tokenizers, same family."""
    kinds = {True: "a vision-language model", False: "a text-only model"}
    is_vlm = is_vision_language(student)
    if is_vlm != is_vision_language(teacher):
        raise ValueError(
            f"GOLDTrainer: student and teacher must take the same inputs, got {kinds[is_vlm]} as "
            f"student and {kinds[not is_vlm]} as teacher; choose both of one kind."
        )
    # Mixture-of-experts and dense models of a family share tokenizer and processor.
    families = [config.model_type.removesuffix("_moe") for config in (student, teacher)]
    if families[0] != families[1] and not use_uld_loss:
        raise ValueError(
            "GOLDTrainer: student and teacher must be of one family, got "
            f"{student.model_type} and {teacher.model_type}; set use_uld_loss=True, the loss "
            "across families."
        )
    if is_vlm and not use_uld_loss:
        _check_pictures(student, teacher)


def _check_pictures(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """One family's inputs serve both sides, but its models may cut pictures in their own ways."""
    for name in PICTURE_FIELDS:
        student_values, teacher_values = (
            [getattr(part, name, None) for part in (config, getattr(config, "vision_config", None))]
            for config in (student, teacher)
        )
        if student_values != teacher_values:
            raise ValueError(
                "GOLDTrainer: student and teacher must take the same pixels and image tokens, got "
                f"{name} {_given(student_values)} and {_given(teacher_values)}; set "
                "use_uld_loss=True, with which each side has its own processor."
            )


def _given(values: list[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def check_processor(
    processor: Processor, is_vlm: bool, side: str = "student", argument: str = "processing_class"
) -> None:
    if is_vlm and not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"GOLDTrainer: a vision-language {side} needs its processor, got "
            f"{type(processor).__name__}; pass {argument}=AutoProcessor.from_pretrained(...)."
        )
    tokenizer, whose = tokenizer_of(processor), "the" if side == "student" else f"the {side}'s"
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise ValueError(
            f"GOLDTrainer: {whose} tokenizer must have an eos_token and a pad_token, got "
            f"{tokenizer.eos_token!r} and {tokenizer.pad_token!r}; set tokenizer.pad_token to a "
            "token that never ends a turn."
        )


def shared_vocab_size(
    student: nn.Linear,
    teacher: nn.Linear,
    processor: Processor,
    placeholder_ids: Collection[int] = (),  # of pictures, in no completion
) -> int | None:
    """Entries that take part in the loss; None where both heads have the same number of rows.

    A placeholder may have a row of the embeddings alone, as in Llama 3.2 Vision.
    """
    v_student, v_teacher = student.out_features, teacher.out_features
    beyond = {i for i in placeholder_ids if i >= min(v_student, v_teacher)}
    num_entries = max(token_ids_of(processor) - beyond) + 1
    if num_entries > min(v_student, v_teacher) or abs(v_student - v_teacher) > MAX_PADDING:
        raise ValueError(
            "GOLDTrainer: student and teacher must have one tokenizer, got heads of "
            f"{v_student} and {v_teacher} rows and a tokenizer of {num_entries} entries; choose "
            "two models of one tokenizer, or set use_uld_loss=True, the loss across tokenizers."
        )
    return None if v_student == v_teacher else num_entries


@contextmanager
def head_replaced(
    model: nn.Module, head: nn.Module, form: LogitForm, function: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within the context the head's forward is function(hidden (B, L, D)), and what that returns
    comes out as the model's `logits`.

    The model runs through its wrapper as always and meets the head where it expects it: DDP sees
    the weight used, FSDP and ZeRO-3 have it gathered, hooks fire. A scale and a softcap, which the
    model puts on what its head returns, must be part of function: here they are undone.
    """
    results = []

    def at_head(hidden: Tensor) -> Tensor:
        results.append(function(hidden))
        return results[-1]

    def undo_form(_model: nn.Module, _args: Any, output: ModelOutput) -> None:
        result = results.pop()
        form.check(result, output.logits)
        output.logits = result.to(output.logits.device)  # where a dispatched model returns it

    before = vars(head).get("forward")  # that of a hook, where accelerate put one
    head.forward = at_head
    # first, so that FSDP's own hook meets the tensor that backward starts from
    hook = model.register_forward_hook(undo_form, prepend=True)
    try:
        yield
    finally:
        hook.remove()
        del head.forward
        if before is not None:
            head.forward = before


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """(B, L, D) hidden states at flat positions (N,) -> (N, D)."""
    return hidden.flatten(0, 1).index_select(0, rows)


@torch.no_grad()
def teacher_hidden_rows(
    teacher: nn.Module,
    head: nn.Linear,
    form: LogitForm,
    tensors: dict[str, Tensor],
    rows: Tensor,  # (N,)
) -> Tensor:  # (N, D_t)
    """The teacher's last hidden states of the scored rows; its head is not run."""
    with head_replaced(teacher, head, form, lambda hidden: gather_rows(hidden, rows)):
        return teacher(**tensors, use_cache=False).logits
