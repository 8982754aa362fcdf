"""Names, groups and help of all flags, read from the source files that declare them.

Torch and transformers take seconds to import; `train --help` and a misspelt flag should take none.
"""

import ast
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gold_trainer.nearest import did_you_mean

# File, class, title: ours, in the order in which they are shown.
GROUPS = (
    ("command_line.py", "ModelArguments", "student"),
    ("data/data_files.py", "DataArguments", "data"),
    ("fields/teacher.py", "TeacherFields", "teacher"),
    ("fields/teacher.py", "ServedFields", "a served teacher"),
    ("fields/cache.py", "CacheFields", "a cached teacher"),
    ("config.py", "GOLDConfig", "completions"),
    ("fields/rollout.py", "RolloutFields", "sampling"),
    ("fields/loss.py", "LossFields", "loss"),
    ("fields/uld.py", "ULDFields", "two tokenizers"),
    ("weighting/fields.py", "WeightingFields", "token weights"),
    ("fields/rows.py", "RowFields", "rows"),
    ("fields/vllm.py", "VLLMFields", "vLLM"),
    ("speed/fields.py", "SpeedFields", "speed"),
    ("fields/run.py", "RunFields", "run"),
)
# The fields of TrainingArguments that most runs set.
USUAL = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim"),
    *("max_grad_norm", "save_strategy", "save_steps"),
    *("save_total_limit", "eval_strategy", "eval_steps", "report_to"),
    *("seed", "dataloader_num_workers"),
)
# What users of other trainers look for, and what to do here.
COMPLETION = "the completion alone is learnt, see docs/data.md: leave it out"
PYTHON_LORA = "a command line has the lora_ fields of --help; from Python pass peft_config="
QUANTISED = (
    "set --teacher_model_init_kwargs or --model_init_kwargs '{\"quantization_config\": ...}'"
)
HINTS = {
    "config": "the YAML file comes first, without a flag: gold-trainer train CONFIG.yaml",
    "lr": "did you mean learning_rate?",
    "batch_size": "did you mean per_device_train_batch_size?",
    "epochs": "did you mean num_train_epochs?",
    "model": "did you mean model_name_or_path?",
    "student": "did you mean model_name_or_path?",
    "teacher": "did you mean teacher_model_name_or_path?",
    "dataset": "did you mean dataset_name?",
    "torch_dtype": "did you mean dtype?",
    "use_lora": "did you mean use_peft?",
    "resume": "did you mean resume_from_checkpoint?",
    "max_new_tokens": "did you mean max_completion_length?",
    "max_seq_length": "did you mean max_length?",
    "max_prompt_length": "max_length holds prompt and completion together: set that",
    "dataset_text_field": "did you mean completion_column?",
    "dataset_num_proc": "rows are read by the data loader: did you mean dataloader_num_workers?",
    "dataset_kwargs": "rows are rendered when they are read: leave it out",
    "shuffle_dataset": "did you mean train_sampling_strategy? Its default shuffles",
    "chat_template_path": "the template is the tokenizer's own: save one with the model",
    "eos_token": "the end of a turn is the chat template's: leave it out",
    "pad_token": "it is the tokenizer's own: leave it out",
    "packing": "did you mean padding_free?",
    "use_prefix_grouper": "did you mean share_prompts?",
    "pad_to_multiple_of": "rows are padded to the longest of them: leave it out",
    "truncation_mode": "max_length cuts completions at their end: leave it out",
    "completion_only_loss": COMPLETION,
    "loss_type": "did you mean loss?",
    "loss_add_tail": "with loss_top_k all other tokens always are an outcome: leave it out",
    "teacher_top_k": "did you mean loss_top_k?",
    "activation_offloading": 'set gradient_checkpointing_kwargs to {"offload": true}',
    "liger": "the loss is fused already: leave it out",
    "no_cuda": "did you mean use_cpu?",
    "save_safetensors": "weights are always saved that way: leave it out",
    "logging_dir": "tensorboard reads it from the environment: TENSORBOARD_LOGGING_DIR",
    "vllm_structured_outputs_regex": (
        'with a vLLM server set generation_kwargs to {"structured_outputs": {"regex": ...}}'
    ),
    "load_in_4bit": QUANTISED,
    "lora_modules_to_save": PYTHON_LORA,
    "router_aux_loss_coef": "the coefficient is that of the model's config: leave it out",
    "freeze_layers": "use_peft trains an adapter alone; from Python set requires_grad_(False)",
    "cache_implementation": "the writer of rollouts has a cache of its own: leave it out",
    "max_tool_calling_iterations": "no tools are run here, rows have their calls: leave it out",
    "log_unique_prompts": "log_completions shows rows as they come: leave it out",
    "ds3_gather_for_generation": "weights are always gathered to generate: leave it out",
    "reward_weights": "there are no rewards here: the teacher is what is learnt from",
    "callbacks": "from Python pass callbacks= to GOLDTrainer",
    "wandb_project": "wandb reads it from the environment: WANDB_PROJECT",
    "ray_scope": "transformers has it no more: leave it out",
    "warmup_ratio": "did you mean warmup_steps? Below 1 it is a share of the steps",
    "adafactor": "did you mean optim? Its value is then adafactor",
    "torchdynamo": "did you mean compile_models?",
    "fp16_backend": "16 bits are torch's own: leave it out",
    "mixed_precision": "did you mean bf16?",
    "use_mps_device": "a device that is there is used: leave it out",
    "split_batches": "every device takes per_device_train_batch_size rows: leave it out",
    "non_blocking": "did you mean accelerator_config?",
    "fsdp_min_num_params": "did you mean fsdp_config?",
    "push_to_hub_token": "did you mean hub_token?",
    "push_to_hub_organization": "did you mean hub_model_id?",
    "token": "it is read from the environment: HF_TOKEN",
    "cache_dir": "it is read from the environment: HF_HOME",
    "revision": "did you mean model_revision?",
    "tokenizer_name": "the student's own is in its folder: leave it out",
    "include_tokens_per_second": "the log has tokens_per_second: leave it out",
    "include_inputs_for_metrics": "there are no logits for compute_metrics: leave it out",
    "predict_with_generate": "an evaluation writes no completions: leave it out",
    "train_file": "did you mean dataset_name?",
    "validation_file": "did you mean eval_dataset_name?",
    "max_train_samples": "did you mean dataset_train_split? Write train[:1000]",
    "max_eval_samples": "did you mean dataset_test_split? Write train[:1000]",
    "train_batch_size": "did you mean per_device_train_batch_size?",
    "eval_batch_size": "did you mean per_device_eval_batch_size?",
    "accumulation_steps": "did you mean gradient_accumulation_steps?",
    "gradient_clipping": "did you mean max_grad_norm?",
    "lora_rank": "did you mean lora_r?",
    "alpha": "did you mean distillation_weight? For the alpha of skew KL set loss_kwargs",
    "kd_temperature": "did you mean loss_temperature?",
    "sync_ref_model": "the teacher stays as it is: leave it out",
    "steps_per_generation": "each step has rollouts of its own: leave it out",
    "cast_lm_head_to_fp32": "did you mean logits_dtype? Its default is float32",
}
# Names that have the hint of another; a * stands for any letters.
SAME = {
    "load_in_8bit": "load_in_4bit",
    "bnb_*": "load_in_4bit",
    "use_bnb*": "load_in_4bit",
    "model_name": "model",
    "teacher_model": "teacher",
    "packing_strategy": "packing",
    "eval_packing": "packing",
    "assistant_only_loss": "completion_only_loss",
    "use_liger*": "liger",
    "lora_target_parameters": "lora_modules_to_save",
    "lora_task_type": "lora_modules_to_save",
    "use_rslora": "lora_modules_to_save",
    "use_dora": "lora_modules_to_save",
    "freeze_*": "freeze_layers",
    "reward_*": "reward_weights",
    "scale_rewards": "reward_weights",
    "wandb_*": "wandb_project",
    "add_tail_bucket": "loss_add_tail",
    "distillation_add_tail": "loss_add_tail",
    "distillation_topk": "teacher_top_k",
    **dict.fromkeys(("mp_parameters", "jit_mode_eval", "use_ipex", "past_index"), "ray_scope"),
    **dict.fromkeys(("tpu_*", "xpu_backend", "sharded_ddp", "use_legacy_*"), "ray_scope"),
    **dict.fromkeys(("fp16_opt_level", "half_precision_backend"), "fp16_backend"),
    "precision": "mixed_precision",
    **dict.fromkeys(("dispatch_batches", "even_batches"), "split_batches"),
    "use_seedable_sampler": "non_blocking",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_min_num_params",
    "push_to_hub_model_id": "push_to_hub_organization",
    **dict.fromkeys(("hf_token", "use_auth_token"), "token"),
    **dict.fromkeys(("tokenizer", "tokenizer_name_or_path", "processor*"), "tokenizer_name"),
    "generation_max_length": "predict_with_generate",
    "generation_num_beams": "predict_with_generate",
    **dict.fromkeys(("dataset_path", "data_path", "data_files", "data_set"), "train_file"),
    **dict.fromkeys(("eval_file", "test_file", "val_file", "eval_dataset"), "validation_file"),
    "overwrite_cache": "dataset_kwargs",
    **dict.fromkeys(("gradient_accumulation", "grad_accum*"), "accumulation_steps"),
    **dict.fromkeys(("clip_grad_norm", "grad_clip*", "gradient_clip*"), "gradient_clipping"),
    **dict.fromkeys(("kd_alpha", "kd_ratio", "kd_weight"), "alpha"),
    "distill*temperature": "kd_temperature",
    **dict.fromkeys(("student_model*", "student_name*", "student_path"), "student"),
    **dict.fromkeys(("teacher_model_path", "teacher_name*", "teacher_path"), "teacher"),
    "ref_model_*": "sync_ref_model",
    "num_iterations": "steps_per_generation",
}
WIDTH = 100


@dataclass
class Flag:
    name: str
    help: str
    default: str


@cache
def fields_of(path: Path, class_name: str) -> list[Flag]:
    """The fields of a dataclass in a file, without running it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    flags = []
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        if "ClassVar" not in ast.dump(line.annotation):
            flags.append(_flag(line.target.id, line.value))
    return [flag for flag in flags if not flag.name.startswith("_")]


def _flag(name: str, value: ast.expr | None) -> Flag:
    """default and help of `name: type = field(default=..., metadata={"help": ...})`."""
    if not isinstance(value, ast.Call):
        return Flag(name, "", _default(value))
    words = {keyword.arg: keyword.value for keyword in value.keywords}
    default = words.get("default", words.get("default_factory"))
    if isinstance(default, ast.Lambda):
        default = default.body
    metadata, text = words.get("metadata"), ""
    if isinstance(metadata, ast.Dict):
        for key, content in zip(metadata.keys, metadata.values, strict=True):
            is_help = isinstance(key, ast.Constant) and key.value == "help"
            if is_help and isinstance(content, ast.Constant):
                text = str(content.value)
    return Flag(name, text, _default(default))


def _default(node: ast.expr | None) -> str:
    """A default as a command line has it: the parts of a list one after the other."""
    if node is None:
        return ""
    try:
        value = ast.literal_eval(node)
    except ValueError:  # a name: transformers chooses when it is imported
        return ""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@cache
def own_groups() -> list[tuple[str, list[Flag]]]:
    folder = Path(__file__).parent
    return [(title, fields_of(folder / file, name)) for file, name, title in GROUPS]


@cache
def inherited() -> list[Flag]:
    """Flags of transformers.TrainingArguments."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("No module named 'transformers'")
    path = Path(spec.submodule_search_locations[0]) / "training_args.py"
    return fields_of(path, "TrainingArguments")


def all_names() -> list[str]:
    flags = [flag for _, group in own_groups() for flag in group] + inherited()
    return list(dict.fromkeys(flag.name for flag in flags))


def help_text() -> str:
    own = {flag.name for _, group in own_groups() for flag in group}
    usual = [flag for flag in inherited() if flag.name in USUAL and flag.name not in own]
    usual.sort(key=lambda flag: USUAL.index(flag.name))
    parts = ["usage: gold-trainer train [RECIPE | CONFIG.yaml] [--field value ...]\n"]
    for title, group in [*own_groups(), ("of transformers, the usual ones", usual)]:
        parts.append(f"{title}:\n" + "\n".join(map(_entry, group)) + "\n")
    parts.append("--help-all lists every field of transformers.TrainingArguments too.\n")
    return "\n".join(parts)


def _entry(flag: Flag) -> str:
    text = " ".join(flag.help.split()).replace("%%", "%")
    default = f" [{flag.default}]" if flag.default not in ("", "None") else ""
    lines = textwrap.wrap(f"{text}{default}".strip(), WIDTH - 6)
    return "\n".join([f"  --{flag.name}", *(f"      {line}" for line in lines)])


def remedy(name: str, names: Iterable[str]) -> str:
    """What was probably meant by a field that there is not."""
    name = name.replace("-", "_")
    if name not in HINTS:
        name = next((to for start, to in SAME.items() if fnmatchcase(name, start)), name)
    if name.startswith("no_") and name[3:] in names:
        return f"; write --{name[3:]} false"
    if name in HINTS:
        return f"; {HINTS[name]}"
    return did_you_mean(name, names, cutoff=0.65) or "; --help lists the fields"


def check_keywords(config: str, names: Iterable[str], fields: Iterable[str]) -> None:
    """ValueError for an argument of a config that is none of its fields, as a flag has it."""
    known = list(fields)
    for name in names:
        if name not in known:
            meant = remedy(name, known).replace("--help", "gold-trainer train --help-all")
            end = "" if meant.endswith("?") else "."
            raise ValueError(f"{config}: there is no field {name!r}{meant}{end}")


def check_names(argv: Iterable[str]) -> None:
    """ValueError for a flag that there is not, before anything slow is imported."""
    names = all_names()
    known = {*names, *(f"no_{name}" for name in names), "help", "help_all"}
    for argument in argv:
        name = argument.partition("=")[0]
        if name.startswith("--") and name[2:].replace("-", "_") not in known:
            raise ValueError(f"unknown flag {name}{remedy(name[2:], names)}")


def read_fields(path: Path) -> dict[str, Any]:
    """Fields of a YAML file; ValueError for a key that there is not."""
    from gold_trainer.config_file import read_mapping  # needs yaml, which --help does without

    fields, names = read_mapping(path), all_names()
    for name in fields:
        if name not in names:
            raise ValueError(f"{path}: unknown key {name}{remedy(str(name), names)}")
    return fields
