"""`gold-trainer vllm-command`: the line that starts the vLLM server of a run."""

import shlex
import sys
from typing import Any
from urllib.parse import urlparse

from gold_trainer.config import GOLDConfig
from gold_trainer.fields.checks import as_dict

# Ranks that vLLM takes for --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_NUM_SEQS = 128  # vLLM's own is at least that
DEVELOPMENT = "VLLM_SERVER_DEV_MODE"  # the endpoints that take weights
LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def server_environment(args: GOLDConfig, rank: int | None) -> dict[str, str]:
    takes_adapters = rank is not None and not args.vllm_merge_adapter
    return {DEVELOPMENT: "1"} | ({LORA: "1"} if takes_adapters else {})


def dtype_of(args: GOLDConfig) -> str:
    """The dtype of vLLM's weights: the one that the student computes in."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def engine_options(args: GOLDConfig) -> dict[str, Any]:
    """Arguments of vllm.LLM, the student aside."""
    options: dict[str, Any] = {
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "dtype": dtype_of(args),
        "max_model_len": args.vllm_model_length,
        "max_num_seqs": max(args.num_generations, MAX_NUM_SEQS),
        "model_impl": args.vllm_model_impl,
        "enable_sleep_mode": args.vllm_enable_sleep_mode,
        "enforce_eager": args.use_cpu,  # there compiling takes longer than it saves
    }
    if not args.use_cpu:
        options["gpu_memory_utilization"] = args.vllm_memory_share
    return options


def server_options(args: GOLDConfig, rank: int | None) -> list[str]:
    """What the server is to be, the student aside. rank: of the adapter, None without one."""
    address = urlparse(args.vllm_url)
    options: dict[str, object] = {
        "--enable-scale-out": None,
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",  # no sampling of its own beside what it is asked for
        "--dtype": dtype_of(args),
        "--host": address.hostname or args.vllm_server_host,
        "--port": address.port or (443 if address.scheme == "https" else 80),
    }
    kwargs = as_dict(args.model_init_kwargs)
    if kwargs.get("revision") not in (None, "main"):
        options["--revision"] = kwargs["revision"]
    if kwargs.get("trust_remote_code"):
        options["--trust-remote-code"] = None
    if args.vllm_model_length is not None:
        options["--max-model-len"] = args.vllm_model_length
    if args.num_generations > MAX_NUM_SEQS:
        options["--max-num-seqs"] = args.num_generations
    if args.vllm_tensor_parallel_size > 1:
        options["--tensor-parallel-size"] = args.vllm_tensor_parallel_size
    if not args.use_cpu:
        options["--gpu-memory-utilization"] = args.vllm_memory_share
    if args.vllm_model_impl != "auto":
        options["--model-impl"] = args.vllm_model_impl
    if rank is not None and not args.vllm_merge_adapter:
        options["--enable-lora"] = None
        options["--max-lora-rank"] = next((r for r in RANKS if r >= rank), rank)
    elif args.vllm_weight_sync == "nccl":
        options["--weight-transfer-config"] = '{"backend": "nccl"}'
    return [str(part) for pair in options.items() for part in pair if part is not None]


def start_line(args: GOLDConfig, student: str, rank: int | None) -> str:
    environment = server_environment(args, rank)
    names = " ".join(f"{name}={value}" for name, value in environment.items())
    return f"{names} {shlex.join(['vllm', 'serve', student, *server_options(args, rank)])}"


def vllm_command(argv: list[str]) -> None:
    """Print it, for the arguments of `gold-trainer train`."""
    from gold_trainer.command_line import parse_arguments, student_options

    model_args, _, config = parse_arguments(argv)
    if not model_args.model_name_or_path:
        raise ValueError(
            "model_name_or_path is missing: set it in the YAML file or pass --model_name_or_path"
        )
    if not config.use_vllm or config.vllm_mode != "server":
        raise ValueError(
            "gold-trainer vllm-command: a run whose rollouts a server writes is expected, got "
            f"use_vllm={config.use_vllm} and vllm_mode={config.vllm_mode!r}; set use_vllm: true "
            "and vllm_mode: server."
        )
    given = as_dict(config.model_init_kwargs)
    config.model_init_kwargs = student_options(model_args) | given
    rank = model_args.lora_r if model_args.use_peft else None
    sys.stdout.write(start_line(config, model_args.model_name_or_path, rank) + "\n")
