"""`gold-trainer train`: from flags and YAML to a trained student on disk.

The YAML holds the same names as the flags; a flag wins over the YAML.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from transformers import ProgressCallback, TrainerCallback

from gold_trainer.config import GOLDConfig
from gold_trainer.config_file import as_written
from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.file_streams import load_stream
from gold_trainer.data.json_text import parsed_json
from gold_trainer.fields.checks import as_dict, check_fields
from gold_trainer.fields.parser import Parser
from gold_trainer.fields.paths import expand_paths
from gold_trainer.fields.teacher import args_by_teacher
from gold_trainer.flags import all_names, read_fields, remedy
from gold_trainer.survival import checkpoints
from gold_trainer.survival.resuming import as_wanted, earlier_run


@dataclass
class ModelArguments:
    """The student: its weights, and the LoRA adapter to train on them."""

    _argument_group_name = "student"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Student: folder or hub id."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of a student from the hub."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={
            "help": "Type of the student's weights. Training bfloat16 weights directly loses the "
            "small updates of a small learning rate: prefer float32 with --bf16, or LoRA. With a "
            "quantization_config, bfloat16 is the default of what is not quantised."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flash_attention_2, ...; default: the model's."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the student."}
    )
    use_peft: bool = field(
        default=False, metadata={"help": "Train a LoRA adapter; output_dir gets the adapter."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter: alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj"],
        metadata={
            "help": "Names of the layers that get an adapter, all-linear, or a regular expression "
            "of whole names."
        },
    )


# Fields that do nothing, and the one that nobody has set; whoever turns it off means that.
SWITCHES = {
    "use_peft": ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "eval_strategy": (
        *("eval_steps", "eval_delay", "do_eval", "dataset_test_split"),
        *("metric_for_best_model", "greater_is_better"),
    ),
    "push_to_hub": (
        *("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    ),
    "log_completions": ("log_completions_steps", "num_completions_to_print"),
}
RESUME = "resume_from_checkpoint"
RESUME_WORDS = ("true", "false", "auto")


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, GOLDConfig]:
    """argv: an optional YAML file, then flags. ValueError says what to change."""
    parser = Parser(
        [ModelArguments, DataArguments, GOLDConfig],
        prog="gold-trainer train",
        usage="%(prog)s [RECIPE | CONFIG.yaml] [--field value ...]",
        allow_abbrev=False,
    )
    if argv and not argv[0].startswith("-"):
        argv = _read_config(Path(argv[0]), parser) + argv[1:]
    model_args, data_args, config, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("--"):
            raise ValueError(f"unexpected argument {name!r}; the YAML file comes before the flags")
        raise ValueError(f"unknown flag {name}{remedy(name.lstrip('-'), all_names())}")
    for one in (model_args, config):
        _read_lists(one)
    for own in (model_args, data_args):
        expand_paths(own, "gold-trainer train")
        check_fields(own, "gold-trainer train")
    return model_args, data_args, config


def _read_lists(config: Any) -> None:
    """A list may come as the JSON that it has elsewhere: --stop_strings '["a", "b"]'."""
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == 1 and str(value[0]).startswith("["):
            parsed = parsed_json(value[0])
            if isinstance(parsed, list) and all(isinstance(part, str) for part in parsed):
                setattr(config, name, parsed)


def named_fields(argv: list[str]) -> set[str]:
    """Fields that get a value, in the YAML file or by a flag."""
    flags = (argument.partition("=")[0] for argument in argv if argument.startswith("--"))
    names = {flag[2:].replace("-", "_").removeprefix("no_") for flag in flags}
    if argv and not argv[0].startswith("-"):
        names |= {name for name, value in read_fields(Path(argv[0])).items() if value is not None}
    return names


def refuse_idle(argv: list[str], config: GOLDConfig) -> None:
    """ValueError for a field without which the run would be the same."""
    given = named_fields(argv)
    for switch, names in SWITCHES.items():
        idle = next((name for name in names if name in given), None)
        is_early = switch == "eval_strategy" and config.eval_on_start
        if idle is not None and switch not in given and not is_early:
            raise ValueError(
                f"{idle} does nothing while {switch} is not set: set {switch}, or leave {idle} out"
            )
    if config.do_predict or ("do_train" in given and not config.do_train):
        name = "do_predict" if config.do_predict else "do_train"
        raise ValueError(
            f"{name} is {getattr(config, name)}, but this command trains: leave it out"
        )


def _read_config(path: Path, parser: Parser) -> list[str]:
    """The YAML as flags, so that argparse converts and checks both alike."""
    flags: list[str] = []
    for name, value in read_fields(path).items():
        action = parser.action_of(name)
        if value is False and "no" in (action.choices or ()):
            value = "no"  # eval_strategy: no, which YAML reads as false
        if parser.is_text(name):
            for part in value if isinstance(value, list) else [value]:
                _refuse_no_text(part, name, path, is_whole=part is value)
        if isinstance(value, dict):
            flags.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list) and value and action.nargs == "+":
            texts = [as_written(part) for part in value]
            is_odd = any(text.startswith("-") for text in texts)  # argparse takes it for a flag
            flags += [f"--{name}={json.dumps(texts)}"] if is_odd else [f"--{name}", *texts]
        elif value is None or isinstance(value, list):  # which no flag can say
            parser.set_defaults(**{name: value})
        else:
            text = as_written(value) if parser.is_text(name) else str(value)
            flags.append(f"--{name}={text}")
    return flags


def _refuse_no_text(value: Any, name: str, path: Path, *, is_whole: bool) -> None:
    if isinstance(value, bool) and name != RESUME:
        raise ValueError(
            f"{path}: {name} must be text, got {str(value).lower()}, as YAML reads yes, no, on "
            "and off too; put it in quotes"
        )
    if value is None and not is_whole:
        raise ValueError(f"{path}: {name} must hold texts, got null; leave it out")
    if isinstance(value, dict | list):
        kind = "a dict" if isinstance(value, dict) else "a list in a list"
        raise ValueError(f"{path}: {name} must be text, got {kind}; put what is text in quotes")


class Run(NamedTuple):
    """What a command line asks for; nothing of a model is read yet."""

    student: str
    teacher: str | None  # None: cached
    config: GOLDConfig
    train_rows: Any
    eval_rows: Any  # None: no evaluation
    peft_config: Any
    data_name: str


def read_run(argv: list[str]) -> Run:
    model_args, data_args, config = parse_arguments(argv)
    refuse_idle(argv, config)
    student = _given(model_args.model_name_or_path, "model_name_or_path")
    data_name = _given(data_args.dataset_name, "dataset_name")
    teacher = config.teacher_model_name_or_path
    if config.teacher_cache is None or config.teacher_models is not None:
        teacher = _given(_teacher(config), "teacher_model_name_or_path")
    given = as_dict(config.model_init_kwargs)
    options = student_options(model_args)
    if "quantization_config" in given and options["dtype"] == "float32":  # the default
        del options["dtype"]  # what is not quantised is in 16 bits then
    config.model_init_kwargs = options | given
    needs_eval = config.eval_strategy != "no" or config.eval_on_start
    if data_args.eval_dataset_name is not None and not needs_eval:
        raise ValueError(
            f"eval_dataset_name is {data_args.eval_dataset_name}, and nothing evaluates on it: set "
            "eval_strategy to steps or epoch, or leave it out"
        )
    load = load_stream if data_args.dataset_streaming else load_rows
    train_rows = load(data_args, "train")
    eval_rows = load(data_args, "eval") if needs_eval else None
    peft_config = _lora_config(model_args)
    return Run(student, teacher, config, train_rows, eval_rows, peft_config, data_name)


def _teacher(config: GOLDConfig) -> str | None:
    """The first of several; the checkpoint that a server was started with, where nothing else names
    it.
    """
    for one in args_by_teacher(config).values():
        return _teacher(one)
    if config.teacher_model_server_url is not None and config.teacher_model_name_or_path is None:
        from gold_trainer.teachers.served.check import find_server  # slow to import

        find_server(config)
    return config.teacher_model_name_or_path


def train(argv: list[str]) -> None:
    """Run the command; ValueError, OSError and ImportError say what the user can mend."""
    run = read_run(argv)
    config = run.config
    _check_checkpoint(config)

    from gold_trainer.trainer import GOLDTrainer  # slow to import: after the checks

    trainer = GOLDTrainer(
        model=run.student,
        teacher_model=None if config.teacher_models else run.teacher,
        args=config,
        train_dataset=run.train_rows,
        eval_dataset=run.eval_rows,
        peft_config=run.peft_config,
    )
    trainer.saves_at_end = True
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    finally:
        _end_progress_bars(trainer.callback_handler.callbacks)
    trainer.save_model(config.output_dir)
    trainer.create_model_card(dataset=run.data_name)
    if trainer.is_world_process_zero():
        _console().print(f"student saved in {config.output_dir}", markup=False, soft_wrap=True)
    # a process that exits with its group open may abort: threads of gloo outlive the interpreter
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _check_checkpoint(config: GOLDConfig) -> None:
    """Refuse a checkpoint that is not there, before models are loaded. Whether it is complete is
    seen when the student is known.
    """
    checkpoint = config.resume_from_checkpoint
    output_dir = config.output_dir or ""
    earlier = checkpoints.checkpoints_in(Path(output_dir))
    is_new = as_wanted(checkpoint) in (None, False) and not config.overwrite_output_dir
    if earlier and is_new and config.save_strategy != "no":
        raise earlier_run(output_dir, earlier[-1])
    if checkpoint is None or str(checkpoint).lower() in RESUME_WORDS or Path(checkpoint).is_dir():
        return
    raise ValueError(
        f"resume_from_checkpoint must be a checkpoint's folder, got {checkpoint!r}; they are "
        f"{config.output_dir}/checkpoint-STEP; true is the newest complete one"
    )


def _given(value: str | None, name: str) -> str:
    if not value:
        raise ValueError(f"{name} is missing: set it in the YAML file or pass --{name}")
    return value


def _end_progress_bars(callbacks: list[TrainerCallback]) -> None:
    """End the line that a bar is on: what went wrong starts its own."""
    for callback in callbacks:
        if isinstance(callback, ProgressCallback):
            for bar in (callback.prediction_bar, callback.training_bar):
                if bar is not None:
                    bar.close()


def student_options(model_args: ModelArguments) -> dict[str, Any]:
    """Arguments of from_pretrained; those of model_init_kwargs win."""
    options = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": model_args.trust_remote_code,
    }
    return {name: value for name, value in options.items() if value is not None}


def _lora_config(model_args: ModelArguments) -> Any:
    if not model_args.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(
            "use_peft needs the peft package: pip install 'gold-kernels[peft]'"
        ) from error
    modules: Any = model_args.lora_target_modules
    if any("," in name for name in modules):
        raise ValueError(
            f"lora_target_modules must be a list of names, got {modules}; separate them by spaces, "
            "in YAML write [q_proj, v_proj]"
        )
    if len(modules) == 1 and (
        modules == ["all-linear"] or re.search(r"[\\^$*+?()\[|]", modules[0])
    ):
        modules = modules[0]  # peft reads a text as all-linear or a regular expression
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )


def _console() -> Console:
    return Console(highlight=False)
