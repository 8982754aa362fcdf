"""From names or objects to the student, the teacher and the processor that are trained with.

Everything that a config can tell is checked before weights are read.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed
from transformers.utils import is_peft_available

from gold_trainer import models, quantised
from gold_trainer.adapters import telling_what_fits, warn_of_unmatched
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.checks import as_dict
from gold_trainer.nearest import nearest
from gold_trainer.precision import refuse_trained_float16
from gold_trainer.rendering.collator import Processor
from gold_trainer.survival.checkpoints import checkpoints_in

# Arguments of from_pretrained; a config's are a dict from the moment that it is made, as a command
# line's JSON is read then.
InitKwargs = dict[str, Any] | str | None
HUB_OPTIONS = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder")
ON_FIRST_RANK = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def check_configs(
    model: PreTrainedModel | str,
    teacher_model: PreTrainedModel | str | None,
    args: GOLDConfig,
    processing_class: Processor | None,
    check_pair: Callable[[PretrainedConfig, PretrainedConfig], None],
) -> tuple[PretrainedConfig, Processor]:
    """The student's config and processor, once the pair is known to fit; no weights are read."""
    student_config = config_of(model, "student", args.model_init_kwargs)
    if teacher_model is not None:
        teacher_config = config_of(
            teacher_model, "teacher", args.teacher_model_init_kwargs, args.teacher_model_revision
        )
        check_pair(student_config, teacher_config)
    if processing_class is None:
        processing_class = load_processor(student_config, args.model_init_kwargs)
    models.check_processor(processing_class, models.is_vision_language(student_config))
    models.check_picture_places(student_config, processing_class, "student", "processing_class")
    return student_config, processing_class


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models that are made here are whole on every rank. Under ZeRO-3 transformers leaves each rank
    a part, which DeepSpeed gathers for the one model that it trains and for no other. Under FSDP
    with cpu_ram_efficient_loading it reads weights on the first rank alone.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref  # it has a setter and no getter
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    on_first_rank = os.environ.pop(ON_FIRST_RANK, None)
    try:
        yield
    finally:
        if on_first_rank is not None:
            os.environ[ON_FIRST_RANK] = on_first_rank
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def load_student(model: PreTrainedModel | str, args: GOLDConfig, peft_config: Any) -> nn.Module:
    """The student, with its adapter if there is one."""
    if isinstance(model, str):
        # In the bfloat16 of most checkpoints small updates would be lost.
        given = as_dict(args.model_init_kwargs)
        dtype = torch.bfloat16 if quantised.NAME in given else torch.float32
        model = load_model(model, {"dtype": dtype, **given}, device=args.device)
    quantised.restore_head(model, "student")
    models.check_adapter_of_quantised(model, peft_config)
    student = model if peft_config is None else add_adapter(model, peft_config)
    models.check_trained(student)
    refuse_trained_float16(args, student)
    if args.disable_dropout:
        disable_dropout(student)
    return student


def config_of(
    model: PreTrainedModel | str,
    side: str,
    init_kwargs: InitKwargs,
    revision: str | None = None,
) -> PretrainedConfig:
    if not isinstance(model, str):
        models.check_decoder(model, side)
        return models.base_model(model).config
    if is_missing_folder(model):
        raise ValueError(
            f"GOLDTrainer: the {side} must be a model's folder or hub id, got {model!r}, which "
            f"cannot be read: there is no such folder{_beside(Path(model))}; check its spelling."
        )
    try:
        config = load_config(model, init_kwargs, revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"GOLDTrainer: the {side} must be a model's folder or hub id, got {model!r}, which "
            f"cannot be read ({error}); {_remedy(Path(model))}."
        ) from error
    if config.is_encoder_decoder:
        raise models.not_a_decoder(config.model_type, side)
    models.check_causal(config, side)
    return config


def _remedy(folder: Path) -> str:
    """What to do about a folder or hub id without a config."""
    if (folder / "adapter_config.json").is_file():
        return (
            "it holds an adapter alone: load it with peft and pass the model, or save what its "
            "merge_and_unload() gives"
        )
    inner = checkpoints_in(folder)
    if inner:
        return f"it holds checkpoints of a run that was not ended: give {inner[-1]}"
    return "check its spelling and your access to it"


def is_missing_folder(name: str) -> bool:
    """A hub id is NAME or OWNER/NAME: what has more parts, starts as a path does, or stands in a
    folder that is here, is a folder.
    """
    path = Path(name)
    if path.exists():
        return False
    is_path = name.startswith((".", "~", "/", "\\")) or len(path.parts) > 2
    return is_path or (len(path.parts) == 2 and path.parent.is_dir())


def _beside(path: Path) -> str:
    """The nearest name in the folder where it was looked for."""
    if path.parts[:1] == ("~",):
        return "; ~ is not read as your home here: write the whole path"
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    found = nearest(path.name, names)
    return "" if found is None else f"; {path.parent} has {found}"


def load_processor(config: PretrainedConfig, init_kwargs: InitKwargs) -> Processor:
    if not config.name_or_path:
        raise ValueError(
            "GOLDTrainer: processing_class is expected for a student that was not loaded from a "
            "folder or the hub, got None; pass its processor or tokenizer."
        )
    auto_class = AutoProcessor if models.is_vision_language(config) else AutoTokenizer
    return auto_class.from_pretrained(config.name_or_path, **hub_options(init_kwargs))


def load_config(
    name_or_path: str, init_kwargs: InitKwargs, revision: str | None = None
) -> PretrainedConfig:
    """The config alone, so that a pair is checked before its weights are read."""
    return AutoConfig.from_pretrained(name_or_path, **hub_options(init_kwargs, revision))


def hub_options(init_kwargs: InitKwargs, revision: str | None = None) -> dict[str, Any]:
    """What config, tokenizer and processor share with the weights of from_pretrained."""
    options = {key: value for key, value in as_dict(init_kwargs).items() if key in HUB_OPTIONS}
    return options if revision is None else {**options, "revision": revision}


def load_model(
    name_or_path: str,
    init_kwargs: InitKwargs,
    revision: str | None = None,
    *,
    device: torch.device,  # of a model in 8 or 4 bits, which cannot move; others are on the CPU
    **more: Any,
) -> PreTrainedModel:
    """A vision-language or text model by folder or hub id, as its config says."""
    config = load_config(name_or_path, init_kwargs, revision)
    options = {**as_dict(init_kwargs), **hub_options(init_kwargs, revision), **more}
    if quantised.is_quantised_by(options, config):
        options.setdefault("device_map", {"": device})
    if quantised.NAME in options:
        empty = empty_model(name_or_path, init_kwargs, revision)
        quantization = quantised.read_quantization("init_kwargs", options[quantised.NAME])
        head = quantised.name_of_head(empty)
        options[quantised.NAME] = quantised.without_head(quantization, head)
    try:
        return _auto_class(config).from_pretrained(name_or_path, **options)
    except TypeError as error:  # an argument that neither from_pretrained nor the model knows
        raise ValueError(
            "GOLDTrainer: model_init_kwargs and teacher_model_init_kwargs must be arguments of "
            f"from_pretrained, got {options} for {name_or_path!r} ({error}); check their spelling."
        ) from error
    except (ImportError, ValueError) as error:
        kind = options.get("attn_implementation")
        if kind is None or not re.search(r"attn_implementation|Flash ?Attention", str(error)):
            raise
        raise ValueError(
            "GOLDTrainer: attn_implementation must be one that is installed and that the model "
            f"has, got {kind!r} for {name_or_path!r} ({str(error).partition('. ')[0]}); write "
            "sdpa, or leave it out."
        ) from error


def _auto_class(config: PretrainedConfig) -> Any:
    is_vlm = models.is_vision_language(config)
    return AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM


def empty_model(
    name_or_path: str, init_kwargs: InitKwargs, revision: str | None = None
) -> PreTrainedModel:
    """The model that load_model loads without its weights: tensors are on the meta device."""
    options = hub_options(init_kwargs, revision)
    config = load_config(name_or_path, init_kwargs, revision)
    trust = {key: value for key, value in options.items() if key == "trust_remote_code"}
    with whole_weights(), torch.device("meta"):
        model = _auto_class(config).from_config(config, **trust)
    with suppress(OSError):  # a folder without one: that of the config stays
        options.pop("trust_remote_code", None)
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **options)
    return model


def teacher_source(
    teacher_model: PreTrainedModel | str, args: GOLDConfig
) -> tuple[str, dict[str, Any]]:
    """Folder or hub id of the teacher's processor, "" where nothing says it, and its options."""
    if args.teacher_tokenizer_name_or_path is not None:
        return args.teacher_tokenizer_name_or_path, hub_options(args.teacher_model_init_kwargs)
    if isinstance(teacher_model, str):
        name = teacher_model
    else:
        name = models.base_model(teacher_model).config.name_or_path
    return name, hub_options(args.teacher_model_init_kwargs, args.teacher_model_revision)


def load_teacher_processor(name: str, options: dict[str, Any], is_vlm: bool) -> Processor:
    if is_missing_folder(name):
        raise ValueError(
            "GOLDTrainer: teacher_tokenizer_name_or_path must be a folder or hub id of the "
            f"teacher's processor, got {name!r}: there is no such folder{_beside(Path(name))}; "
            "check its spelling."
        )
    try:
        return (AutoProcessor if is_vlm else AutoTokenizer).from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"GOLDTrainer: the teacher's processor cannot be read from {name!r} ({error}); set "
            "teacher_tokenizer_name_or_path to where it is."
        ) from error


def find_tokenizer(name: str, options: dict[str, Any]) -> Processor | None:
    """None for a folder of weights alone: heads and model types are compared all the same."""
    try:
        return AutoTokenizer.from_pretrained(name, **options) if name else None
    except (OSError, ValueError):
        return None


def find_picture_processor(name: str, options: dict[str, Any]) -> Any:
    """None for a text model, and for a folder of weights alone."""
    try:
        return AutoImageProcessor.from_pretrained(name, **options) if name else None
    except (ImportError, OSError, ValueError, KeyError):
        return None


def add_adapter(model: PreTrainedModel, peft_config: Any) -> nn.Module:
    """The student with a trainable adapter; its own weights are frozen."""
    if not is_peft_available():
        raise ValueError(
            "GOLDTrainer: peft_config needs the package peft, which is not installed; "
            "pip install 'gold-kernels[peft]'."
        )
    from peft import get_peft_model

    if models.has_adapter(model):
        raise ValueError(
            "GOLDTrainer: peft_config must be None for a student that has an adapter, got "
            f"{type(model).__name__}; merge it first (model.merge_and_unload()) or leave "
            "peft_config out."
        )
    models.refuse_prompt_learning(peft_config, "peft_config")
    modules = [name for name, _ in model.named_modules()]
    with warnings.catch_warnings():  # peft asks transformers by a name that is on its way out
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        with telling_what_fits(model):
            adapted = get_peft_model(model, peft_config)
    warn_of_unmatched(peft_config, model, modules)
    return adapted


def disable_dropout(model: nn.Module) -> None:
    """Set the rate of dropout layers, and those that attention layers keep as a number, to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
