"""What a model is: its modality, its adapter, its head; and which models cannot be trained with."""

import inspect
import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_peft_available

from gold_trainer.rendering.collator import Processor
from gold_trainer.rendering.prompts import tokenizer_of

# Config fields of tokens that stand for picture, video or sound features.
PLACEHOLDER_FIELD = re.compile(r"(image|video|audio|vision|boi|eoi).*token_(id|index)$")

# Their forward takes positions and mask, and padding on the left changes the next token all the
# same: they cut a sequence into blocks from the padding on, or let it into their states.
MOVED_BY_PADDING = ("blt", "deepseek_v4", "recurrent_gemma", "reformer", "xlm")

# Model types whose tokens see those behind them, and the config field that makes them causal.
_ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert "
    "roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
)
CAUSAL_IF: dict[str, str | None] = {
    **dict.fromkeys(_ENCODERS.split(), "is_decoder"),
    "xlm": "causal",
    "cpmant": None,
    "xlnet": None,
}


def is_vision_language(config: PretrainedConfig) -> bool:
    return config.get_text_config() is not config


def placeholder_ids_of(config: PretrainedConfig) -> list[int]:
    """Tokens that no completion may hold: the model would look for the pictures they stand for."""
    fields = config.to_dict().items()
    return sorted(
        {i for name, i in fields if PLACEHOLDER_FIELD.search(name) and isinstance(i, int)}
    )


def base_model(model: nn.Module) -> Any:  # a PreTrainedModel, once check_decoder has seen it
    """The transformers model below an adapter."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def forward_inputs(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the forward of a model, without its wrapper, gets: of the tensors of a side those that
    it takes, and no cache. Processors make more, for other uses.
    """
    base = base_model(model)
    taken = inspect.signature(type(base).forward).parameters
    names = set(taken)
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    if hands_on:
        # handed on to the model below the head
        below = getattr(base, base.base_model_prefix, base)
        names |= set(inspect.signature(type(below).forward).parameters)
    inputs: dict[str, Any] = {name: t for name, t in tensors.items() if name in names}
    empty = inspect.Parameter.empty
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    missing = [
        name
        for name, parameter in list(taken.items())[1:]  # behind self
        if parameter.default is empty and parameter.kind not in variadic and name not in inputs
    ]
    if missing:
        raise ValueError(
            f"GOLDTrainer: every micro-batch of {type(base).__name__} must have what its forward "
            f"takes, got none of {', '.join(missing)}; put a picture into every row, or choose "
            "another model."
        )
    return {**inputs, "use_cache": False} if hands_on or "use_cache" in names else inputs


def may_pad_left(model: nn.Module) -> bool:
    """Whether prompts of different lengths can be written together. generate() pads on the left,
    which a model cannot see that is told neither positions nor mask.
    """
    base = base_model(model)
    taken = inspect.signature(type(base).forward).parameters
    is_told = "position_ids" in taken and "attention_mask" in taken
    return is_told and base.config.model_type not in MOVED_BY_PADDING


def check_decoder(model: nn.Module, side: str) -> None:
    adapter: Any = model.active_peft_config if has_adapter(model) else None
    if adapter is not None:
        refuse_prompt_learning(adapter, f"the {side}'s adapter")
    base = base_model(model)
    is_parallel = isinstance(base, nn.DataParallel | nn.parallel.DistributedDataParallel)
    if is_parallel or is_compiled_module(base):
        raise ValueError(
            f"GOLDTrainer: the {side} must be the model itself, got {type(base).__name__} around "
            "it; pass what is inside: the trainer wraps models, and compile_models compiles them."
        )
    can_generate = isinstance(base, PreTrainedModel) and base.can_generate()
    if not can_generate or base.config.is_encoder_decoder:
        raise not_a_decoder(type(base).__name__, side)
    check_causal(base.config, side)


def refuse_prompt_learning(adapter: Any, whose: str) -> None:  # a PeftConfig
    if adapter.is_prompt_learning:
        raise ValueError(
            f"GOLDTrainer: {whose} must change weights, got the prompt learning "
            f"{type(adapter).__name__}, whose virtual tokens shift all positions; use LoraConfig."
        )


def check_causal(config: PretrainedConfig, side: str) -> None:
    if config.model_type not in CAUSAL_IF:
        return
    field = CAUSAL_IF[config.model_type]
    if field is None or not getattr(config, field, False):
        remedy = "choose another model" if field is None else f"set {field}=True in its config"
        raise ValueError(
            f"GOLDTrainer: the {side} must be causal, got the model type {config.model_type!r}, "
            f"whose tokens see those behind them; {remedy}."
        )


def not_a_decoder(kind: str, side: str) -> ValueError:
    return ValueError(
        f"GOLDTrainer: the {side} must be a decoder with a language-model head, got {kind}; choose "
        "one that AutoModelForImageTextToText or AutoModelForCausalLM loads."
    )


def has_adapter(model: nn.Module) -> bool:
    return base_model(model) is not model


def end_ids_of(model: nn.Module, processor: Processor) -> list[int]:
    """Tokens that end a generation: the model's own and the tokenizer's."""
    ids = getattr(base_model(model).generation_config, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({*ids, tokenizer_of(processor).eos_token_id})


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps weights elsewhere and brings them for each forward pass."""
    return any(parameter.is_meta for parameter in module.parameters())


def is_quantised(model: nn.Module) -> bool:
    """Whether transformers has quantised it, in from_pretrained."""
    return getattr(base_model(model), "quantization_method", None) is not None


def has_router_loss(model: nn.Module) -> bool:
    """Whether its config asks for the loss of a mixture's routers."""
    config = base_model(model).config
    configs = (config, config.get_text_config())
    return any(getattr(of, "output_router_logits", False) for of in configs)


def check_adapter_of_quantised(student: nn.Module, peft_config: Any) -> None:
    if is_quantised(student) and peft_config is None and not has_adapter(student):
        raise ValueError(
            "GOLDTrainer: a student in 8 or 4 bits must have an adapter, got none; set use_peft, "
            "from Python peft_config=LoraConfig(...)."
        )


def check_trained(student: nn.Module) -> None:
    if is_offloaded(student):
        raise ValueError(
            "GOLDTrainer: the student's weights must be in memory, got some that accelerate has "
            "offloaded; load it without device_map and cpu_offload: LoRA, gradient_checkpointing "
            "or FSDP save memory."
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "GOLDTrainer: the student must have parameters that require gradients, got none; load "
            "its adapter with PeftModel.from_pretrained(..., is_trainable=True), or set "
            "requires_grad_(True) on what is to be trained."
        )


class Head(Protocol):
    """What the loss reads of a head."""

    @property
    def weight(self) -> Tensor: ...  # (V, D)

    @property
    def bias(self) -> Tensor | None: ...  # (V,)

    @property
    def out_features(self) -> int: ...  # V, also where ZeRO-3 has the weight elsewhere


@dataclass
class StoredHead:
    """A teacher's, without the rest of it."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def to(self, device: torch.device) -> "StoredHead":
        bias = None if self.bias is None else self.bias.to(device)
        return StoredHead(self.weight.to(device), bias)


@dataclass(frozen=True)
class TokenRowsHead:
    """A head tied to embeddings of which LoRA's trainable_token_indices trains some rows: peft puts
    them into a copy of the weight at every use, and leaves a bias out.
    """

    wrapper: Any  # peft's TrainableTokensWrapper
    bias: None = None

    @property
    def weight(self) -> Tensor:
        return self.wrapper.weight

    @property
    def out_features(self) -> int:
        return self.wrapper.original_module.out_features


def lm_head(
    model: nn.Module, side: str, *, is_below_adapter: bool = False
) -> tuple[Head, nn.Module]:
    """The head whose place the loss takes, and the module that the model calls for it; refuses what
    the loss would silently ignore.

    peft keeps two of a head in modules_to_save, the original and the copy that is trained. The
    copy is the head, or, for the weights below the adapter, the original.
    """
    head = base_model(model).get_output_embeddings()
    if is_peft_available():
        from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

        if isinstance(head, TrainableTokensWrapper):
            original = plain_head(head.original_module, side)
            return (original, original) if is_below_adapter else (TokenRowsHead(head), head)
        if isinstance(head, ModulesToSaveWrapper):
            original, trained = head.original_module, head.modules_to_save[head.active_adapters[0]]
            # peft makes the copy of a tied head with the two exchanged, its weight as it should be
            trained.in_features, trained.out_features = original.in_features, original.out_features
            head = original if is_below_adapter else trained
    return plain_head(head, side), head


def plain_head(head: Any, side: str) -> nn.Linear:
    kind = f"{type(head).__module__}.{type(head).__name__}"
    own_kinds = ("transformers.models.", "transformers_modules.", "torch.nn.")
    if ".trainable_tokens." in kind:
        raise ValueError(
            f"GOLDTrainer: the {side}'s lm_head must be a plain torch.nn.Linear, got {kind} of "
            "TrainableTokensConfig; use LoraConfig(trainable_token_indices=...), which trains "
            "rows of a tied head."
        )
    if type(head) is not nn.Linear and (head is None or kind.startswith(own_kinds)):
        raise ValueError(
            f"GOLDTrainer: the {side}'s lm_head must be a plain torch.nn.Linear, whose place the "
            f"loss takes, got {'none' if head is None else kind}; choose another model, "
            "docs/models.md lists them."
        )
    if type(head) is not nn.Linear:
        raise ValueError(
            f"GOLDTrainer: the {side}'s lm_head must be a plain torch.nn.Linear, got {kind}; leave "
            "lm_head out of LoRA's target_modules (modules_to_save trains it whole) and out of "
            "quantisation (llm_int8_skip_modules=['lm_head'])."
        )
    is_plain = type(head.weight) is nn.Parameter or is_vocabulary_slice(head.weight)
    if not head.weight.is_floating_point() or not is_plain:
        raise ValueError(
            f"GOLDTrainer: the {side}'s lm_head must hold plain floats, got "
            f"{type(head.weight).__name__} of {head.weight.dtype}; leave lm_head out of "
            "quantisation, and of tensor parallelism that is not over its vocabulary alone."
        )
    return head


def whole(tensor: Tensor) -> Tensor:
    """Collective for the parts of FSDP2 and of tensor parallelism."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_vocabulary_slice(weight: Tensor) -> bool:
    """Whether transformers' tensor parallelism has cut this head, over the vocabulary."""
    if not isinstance(weight, DTensor):
        return False
    return weight.device_mesh.ndim == 1 and weight.placements[0].is_shard(0)


def is_processor(processor: Processor) -> bool:
    """A vision-language model's, not a tokenizer alone."""
    return isinstance(processor, ProcessorMixin)


def check_kind(processor: Processor, argument: str) -> None:
    if not isinstance(processor, ProcessorMixin | PreTrainedTokenizerBase):
        raise ValueError(
            f"GOLDTrainer: {argument} must be a tokenizer or a processor, got "
            f"{type(processor).__name__}; pass AutoProcessor.from_pretrained(...), of a text model "
            "AutoTokenizer.from_pretrained(...)."
        )


def check_processor(
    processor: Processor, is_vlm: bool, side: str = "student", argument: str = "processing_class"
) -> None:
    check_kind(processor, argument)
    if is_vlm and not is_processor(processor):
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


def check_picture_places(
    config: PretrainedConfig, processor: Processor, side: str, argument: str
) -> None:
    """ValueError for a processor of another family, whose pictures the model would not find: its
    class is not that of the model's type, and its placeholder is none of the model's.
    """
    names = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    own = names[0] if isinstance(names, tuple) else names
    token, ids = getattr(processor, "image_token", None), placeholder_ids_of(config)
    if own is None or type(processor).__name__ == own or token is None or not ids:
        return
    token_id = tokenizer_of(processor).convert_tokens_to_ids(str(token))
    if token_id not in ids:
        raise ValueError(
            f"GOLDTrainer: {argument} must be the {side}'s own, got {type(processor).__name__} for "
            f"the model type {config.model_type!r}, which does not look for its {str(token)!r}; "
            f"pass AutoProcessor.from_pretrained of the {side}."
        )


def check_modality(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    kinds = {True: "a vision-language model", False: "a text-only model"}
    is_vlm = is_vision_language(student)
    if is_vlm != is_vision_language(teacher):
        raise ValueError(
            f"GOLDTrainer: student and teacher must take the same inputs, got {kinds[is_vlm]} as "
            f"student and {kinds[not is_vlm]} as teacher; choose both of one kind."
        )
