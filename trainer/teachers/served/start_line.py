"""The line that starts the server of a served teacher: a stock vLLM server that keeps the hidden
states of its last layer, or with loss_top_k one that gives as many prompt_logprobs.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlparse

from gold_trainer.config import GOLDConfig
from gold_trainer.fields.checks import as_dict
from gold_trainer.loading import load_config

CONNECTOR = "ExampleHiddenStatesConnector"
FOLDER = "/dev/shm/gold_teacher"  # where the server writes them, and this process reads them


def start_line(args: GOLDConfig, name: str | None) -> str:
    """name: the checkpoint, None where the server alone would know it."""
    return shlex.join(["vllm", "serve", name or "CHECKPOINT", *server_options(args, name)])


def server_options(args: GOLDConfig, name: str | None) -> list[str]:
    address = urlparse(args.teacher_model_server_url or "")
    options: dict[str, object] = {
        "--enable-scale-out": None,
        "--host": address.hostname,
        "--port": address.port or (443 if address.scheme == "https" else 80),
    }
    if args.max_length is not None:
        options["--max-model-len"] = longest(args)
    if args.teacher_model_revision is not None:
        options["--revision"] = args.teacher_model_revision
    given = as_dict(args.teacher_model_init_kwargs)
    if given.get("trust_remote_code"):
        options["--trust-remote-code"] = None
    if given.get("dtype") not in (None, "auto"):
        options["--dtype"] = str(given["dtype"]).removeprefix("torch.")
    if args.asks_for_tokens:
        options["--max-logprobs"] = args.loss_top_k
        return _as_list(options)
    options["--speculative-config"] = json.dumps(speculative_config(_num_layers(args, name)))
    options["--kv-transfer-config"] = json.dumps(transfer_config())
    return _as_list(options)


def _as_list(options: Mapping[str, object]) -> list[str]:
    return [str(part) for pair in options.items() for part in pair if part is not None]


def longest(args: GOLDConfig) -> int | None:
    """Tokens of a sequence, of which the server has to write the last; hidden states are asked for
    without the last token of a completion, which predicts nothing that is scored.
    """
    return None if args.max_length is None else args.max_length + args.asks_for_tokens


def _num_layers(args: GOLDConfig, name: str | None) -> Any:
    if name is None:
        return "LAYERS"
    config = load_config(name, args.teacher_model_init_kwargs, args.teacher_model_revision)
    return config.get_text_config().num_hidden_layers


def speculative_config(num_layers: Any) -> dict[str, Any]:
    """Layer i gives what comes into it; behind the last one stands number num_layers."""
    layers = {"eagle_aux_hidden_state_layer_ids": [num_layers]}
    return {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": layers},
    }


def transfer_config() -> dict[str, Any]:
    return {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": FOLDER},
    }


def teacher_command(argv: list[str]) -> None:
    """Print it, for the arguments of `gold-trainer train`."""
    import sys

    from gold_trainer.command_line import parse_arguments

    _, _, config = parse_arguments(argv)
    name, url = config.teacher_model_name_or_path, config.teacher_model_server_url
    if name is None or url is None:
        raise ValueError(
            "gold-trainer teacher-command: teacher_model_name_or_path and teacher_model_server_url "
            f"are expected, got {name!r} and {url!r}; set both: the checkpoint to serve, and where."
        )
    sys.stdout.write(start_line(config, name) + "\n")
