"""Fields of GOLDConfig for the run as such, and what of TrainingArguments cannot be used."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import GradientAccumulationPlugin
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from gold_trainer.fields.checks import dict_of_text
from gold_trainer.flags import check_keywords
from gold_trainer.nearest import did_you_mean

ON_NONFINITE = ("error", "skip")


@dataclass
class RunFields:
    """The run as such: TrainingArguments with other defaults, and what happens on an error."""

    def __new__(cls, *_: Any, **given: Any) -> "RunFields":
        check_keywords(cls.__name__, given, cls.__dataclass_fields__)
        return super().__new__(cls)

    learning_rate: float = field(
        default=1e-7,
        metadata={
            "help": "Learning rate after the warm-up. The default is TRL's, at which a short run "
            "learns nothing: 1e-5 is usual for all weights, 1e-4 for an adapter."
        },
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps, or share of the steps if below 1."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for a student given by name."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout of the student to 0."}
    )
    on_nonfinite: str = field(
        default="error",
        metadata={
            "help": "NaN or inf in the loss, the gradient or the teacher: error stops before the "
            "step is taken; skip leaves the step out and counts it in the log.",
            "choices": ON_NONFINITE,
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16, beside weights of any dtype (mixed precision). None: on "
            "where the device has it, unless fp16 is set; never on a CPU.",
            "nargs": "?",
            "const": True,
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute activations again in the backward pass, in place of keeping them: "
            "less memory, about a fifth more time. None: on, where the model can.",
            "nargs": "?",
            "const": True,
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "true: go on from the newest complete checkpoint in output_dir; auto: the "
            "same, or from the beginning where there is none; else a checkpoint's folder."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "A new run deletes the checkpoints of an earlier one in output_dir; without "
            "this it is refused among them. Runs that are resumed delete none."
        },
    )
    logging_first_step: bool = field(
        default=True, metadata={"help": "Log the first step too, whatever logging_steps is."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave NaN and infinite losses out of the log. Costs a wait for the device in "
            "every micro-batch."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads the raw columns."}
    )


# What transformers reads of fsdp_config.
OF_FSDP = (
    *("version", "reshard_after_forward", "cpu_offload", "auto_wrap_policy", "min_num_params"),
    *("transformer_layer_cls_to_wrap", "state_dict_type", "activation_checkpointing"),
    *("cpu_ram_efficient_loading", "forward_prefetch", "backward_prefetch", "use_orig_params"),
    *("sync_module_states", "limit_all_gathers", "mixed_precision_policy", "sharding_strategy"),
    *("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt", "xla_fsdp_settings"),
)
# Fields of the data loader's workers, with their defaults.
OF_WORKERS = {
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
    "dataloader_multiprocessing_context": None,
}
# Values of accelerator_config that are refused, and why.
OF_ACCELERATE = {
    "dispatch_batches": (True, "one process cannot cut up pictures and text for the others"),
    "split_batches": (True, "a step would have the rows of one device alone"),
    "even_batches": (False, "a process without rows at the end would have the others wait for it"),
}
# Ends of metrics of which less is better; a loss may be that of one of several teachers.
COSTS = re.compile(r"(loss|kl|cross_?entropy|runtime|loss/[^/]+)$")
# Files that a run writes into output_dir.
SAVED = (
    *("config.json", "generation_config.json", "model.safetensors", "training_args.bin"),
    *("adapter_config.json", "adapter_model.safetensors", "README.md", ".running.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json"),
)
# How it is said that there is one process and nobody has made a group of it.
OF_ONE_PROCESS = (
    *("process group has not been initialized", "only works in distributed training"),
    "environment variable RANK expected",
)
# Fields of TrainingArguments that nothing would read here, or that would do harm: their defaults,
# and why. transformers casts the student for evaluate(), and does not cast it back.
OWN_EVALUATION = "an evaluation computes as the steps do, and the student would stay in 16 bits"
WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "label_names": (None, "labels are the completions' tokens"),
    "batch_eval_metrics": (False, "there are no logits that compute_metrics could read"),
    "length_column_name": ("length", "no column of lengths is read"),
    "use_cache": (False, "training keeps no cache of keys and values, rollouts have their own"),
    "liger_kernel_config": (None, "use_liger_kernel, which would read it, must be False"),
    "average_tokens_across_devices": (True, "the loss is a mean over the tokens of all devices"),
    "bf16_full_eval": (False, OWN_EVALUATION),
    "fp16_full_eval": (False, OWN_EVALUATION),
}


def check_inherited(args: TrainingArguments) -> None:
    """Fields of TrainingArguments that would be ignored, or fail deep inside a step."""
    _check_batches(args)
    if args.accelerator_config is not None:
        _check_accelerator(args.accelerator_config)
    _check_forward(args)
    _check_unread(args)
    _check_engines(args)
    _check_evaluation(args)
    _check_workers(args)
    if args.report_to is None:  # as a YAML file has it
        args.report_to = "none"
    if isinstance(args.parallelism_config, dict | str):
        raise ValueError(
            "GOLDConfig: parallelism_config must be a ParallelismConfig of accelerate, got "
            f"{args.parallelism_config!r}; make one in Python, or let accelerate launch set it."
        )
    if args.enable_jit_checkpoint:
        raise ValueError(
            "GOLDConfig: enable_jit_checkpoint must be False, got True; SIGTERM already ends a run "
            "with a checkpoint, at the end of the step: leave it out."
        )


def _check_workers(args: TrainingArguments) -> None:
    """torch refuses them when the first batch is due."""
    for name, default in OF_WORKERS.items():
        value = getattr(args, name)
        if value != default and args.dataloader_num_workers == 0:
            raise ValueError(
                f"GOLDConfig: {name} must be {default} without workers, got {value!r} and "
                "dataloader_num_workers=0; set dataloader_num_workers, or leave it out."
            )


def _check_batches(args: TrainingArguments) -> None:
    """The collator makes them, and the teacher is their target."""
    if args.remove_unused_columns:
        raise ValueError(
            "GOLDConfig: remove_unused_columns must be False, got True; the collator reads "
            "messages, prompt, completion and images itself."
        )
    if args.label_smoothing_factor != 0:
        raise ValueError(
            "GOLDConfig: label_smoothing_factor must be 0, got "
            f"{args.label_smoothing_factor}; the teacher's distribution is the target: raise "
            "loss_temperature for a smoother one."
        )
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            "GOLDConfig: train_sampling_strategy must be 'random' or 'sequential', got "
            f"{args.train_sampling_strategy!r}; lengths with image tokens are not known ahead: "
            "group_by_length deals the rows of each step by theirs."
        )
    if args.include_num_input_tokens_seen not in (False, "no"):
        raise ValueError(
            "GOLDConfig: include_num_input_tokens_seen must be 'no', got "
            f"{args.include_num_input_tokens_seen!r}; image tokens are counted by no one "
            "before the micro-batch: the log has completion_length and tokens_per_second."
        )


def _check_forward(args: TrainingArguments) -> None:
    """The loss sits in its head."""
    if args.torch_compile or args.torch_compile_backend or args.torch_compile_mode:
        raise ValueError(
            "GOLDConfig: torch_compile must be False, got True; the loss takes the head's place "
            "within the forward pass, which cannot be compiled as a whole: set "
            "compile_models='regional', which compiles the layers."
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND") or "no"
    if backend.lower() != "no":
        raise ValueError(
            f"GOLDConfig: dynamo_backend of accelerate must be 'no', got {backend!r}, with which "
            "the model would be compiled as a whole; leave dynamo_config out of accelerate's file, "
            "and set compile_models='regional', which compiles the layers."
        )
    if args.use_liger_kernel:
        raise ValueError(
            "GOLDConfig: use_liger_kernel must be False, got True; it changes the forward pass in "
            "whose head the loss sits, of the student alone: compile_models='regional' fuses the "
            "same operations in both models."
        )


def _check_unread(args: TrainingArguments) -> None:
    if args.include_for_metrics:
        raise ValueError(
            f"GOLDConfig: include_for_metrics must be empty, got {args.include_for_metrics}; "
            "compute_metrics would read it, and has no logits here: leave it out."
        )
    for name, (default, why) in WITHOUT_EFFECT.items():
        value = getattr(args, name)
        if value != default:
            raise ValueError(
                f"GOLDConfig: {name} must be {default}, got {value}; {why}: leave it out."
            )


def _check_engines(args: TrainingArguments) -> None:
    if args.fsdp_config and not args.fsdp:
        raise ValueError(
            f"GOLDConfig: fsdp_config must be left out without fsdp, got {args.fsdp_config!r} and "
            f"fsdp={args.fsdp!r}, with which nothing reads it; set fsdp=True, or leave it out."
        )
    _check_fsdp(args.fsdp_config)
    if args.deepspeed == {}:
        raise ValueError(
            "GOLDConfig: deepspeed must hold a configuration, got {}, with which it is off; write "
            "{'zero_optimization': {'stage': 2}}, or leave it out."
        )


def _check_evaluation(args: TrainingArguments) -> None:
    """Saving what only an evaluation finds."""
    if args.load_best_model_at_end and args.eval_strategy in (None, "no"):
        raise ValueError(
            "GOLDConfig: load_best_model_at_end must be False without evaluation, got True and "
            "eval_strategy='no'; set eval_strategy and save_strategy to 'steps' or 'epoch'."
        )
    if args.save_strategy == "best" and args.eval_strategy in (None, "no"):
        raise ValueError(
            "GOLDConfig: save_strategy must not be 'best' without evaluation, got eval_strategy="
            "'no', with which nothing would be saved; set eval_strategy to 'steps' or 'epoch'."
        )


@contextmanager
def naming_the_launcher() -> Iterator[None]:
    """TrainingArguments says of ddp_backend, deepspeed and fsdp that a process group is missing."""
    try:
        yield
    except ValueError as error:
        if not any(words in str(error) for words in OF_ONE_PROCESS):
            raise
        raise ValueError(
            "GOLDConfig: ddp_backend, deepspeed, fsdp and parallelism_config must be left out "
            f"where no launcher has started the process ({error}); start it with accelerate "
            "launch or torchrun, also on one GPU."
        ) from error


def choose_direction(args: TrainingArguments) -> None:
    """Of metric_for_best_model: transformers takes what does not end with loss for a merit."""
    metric = args.metric_for_best_model
    if isinstance(metric, str) and args.greater_is_better is None:
        args.greater_is_better = COSTS.search(metric) is None


def rename_checkpointing(args: TrainingArguments) -> None:
    """Newer versions of transformers warn of the name that TRL's users know."""
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if new in type(args).__dataclass_fields__ and getattr(args, new) is None:
            setattr(args, new, getattr(args, old))
            setattr(args, old, None)


def _read(config: Any) -> Any:
    """The path or text of a dict's JSON as that dict; anything else is as it is."""
    config = dict_of_text(config)
    if isinstance(config, str) and Path(config).is_file():
        return dict_of_text(Path(config).read_text(encoding="utf-8"))
    return config


def _check_fsdp(config: Any) -> None:
    """transformers leaves keys that it does not know."""
    config = _read(config)
    for name in config if isinstance(config, dict) else ():
        if name.removeprefix("fsdp_") not in OF_FSDP:
            raise ValueError(
                f"GOLDConfig: fsdp_config must hold {', '.join(OF_FSDP)}, got {name!r}, which "
                f"nothing reads{did_you_mean(name.removeprefix('fsdp_'), OF_FSDP) or '.'}"
            )


def _check_accelerator(config: Any) -> None:
    """A dict, an AcceleratorConfig, or what _read takes."""
    config = _read(config)
    values = config if isinstance(config, dict) else {} if isinstance(config, str) else vars(config)
    known = [field.name for field in fields(AcceleratorConfig)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(
            f"GOLDConfig: accelerator_config must hold {', '.join(known)}, got "
            f"{unknown[0]!r}{did_you_mean(unknown[0], known) or '.'}"
        )
    accumulation = values.get("gradient_accumulation_kwargs") or {}
    if "num_steps" in accumulation:
        raise ValueError(
            "GOLDConfig: accelerator_config must not set num_steps, got "
            f"{accumulation['num_steps']!r}; set gradient_accumulation_steps."
        )
    known = [field.name for field in fields(GradientAccumulationPlugin)]
    for name in accumulation:
        if name not in known:
            raise ValueError(
                "GOLDConfig: gradient_accumulation_kwargs of accelerator_config must hold "
                f"{', '.join(known[1:])}, got {name!r}{did_you_mean(name, known[1:]) or '.'}"
            )
    for name, value in values.items():
        if not isinstance(value, bool | dict | None):
            raise ValueError(
                f"GOLDConfig: {name} of accelerator_config must be True or False, got {value!r}; "
                "write it without quotes."
            )
    for name, (refused, why) in OF_ACCELERATE.items():
        if values.get(name) is refused:
            raise ValueError(
                f"GOLDConfig: accelerator_config must not set {name}, got {refused}; {why}: leave "
                "it out."
            )


def pin_beside_a_gpu(args: TrainingArguments) -> None:
    """Torch warns of pinned memory in every run on a machine without one."""
    args.dataloader_pin_memory &= torch.accelerator.is_available()


def check_output_dir(args: TrainingArguments) -> None:
    """Here, not after minutes of loading models."""
    if args.output_dir is None:
        return
    if not args.output_dir:
        raise ValueError("GOLDConfig: output_dir must be a folder, got ''; write . for this one.")
    path = Path(args.output_dir).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"GOLDConfig: output_dir must be a folder that can be written, got {path}, where "
            f"{there} is {'read-only' if there.is_dir() else 'a file'}; choose another."
        )
    _refuse_what_is_in_the_way(path, saves=args.save_strategy != "no")


def _refuse_what_is_in_the_way(folder: Path, *, saves: bool) -> None:
    """Refuse what stands where the run saves: that would show at the first save, after an hour."""
    for path in sorted(folder.glob("checkpoint-*")):
        number = path.name.removeprefix("checkpoint-")
        if saves and number.isdecimal() and not path.is_dir():
            raise ValueError(
                f"GOLDConfig: output_dir must have room for checkpoints, got {folder}, where "
                f"{path.name} is no folder; move it away, or choose another."
            )
    for name in SAVED:
        if (folder / name).is_dir():
            raise ValueError(
                f"GOLDConfig: output_dir must have room for {name}, got {folder}, where that is a "
                "folder; move it away, or choose another."
            )
