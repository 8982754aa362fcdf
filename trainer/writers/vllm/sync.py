"""How new weights of the student reach a vLLM server.

The server is paused, loads them, forgets what it had computed with the old ones (prefixes, pictures
and their features), and goes on under a new version. Whatever fails on the way ends the run: the
server stays healthy to look at, and may die at its next request.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from gold_trainer.config import GOLDConfig
from gold_trainer.models import base_model, has_adapter, is_quantised
from gold_trainer.ranks import on_main_process
from gold_trainer.writers.vllm.check import ServerInfo, refuse_whole_of_quantised
from gold_trainer.writers.vllm.nccl import NcclGroup
from gold_trainer.writers.vllm.server import Server
from gold_trainer.writers.weights import (
    adapter_checkpoint,
    adapter_weights,
    checkpoint_weights,
    gathered_weights,
)

SHARED_MEMORY = Path("/dev/shm")


class WeightSync(Protocol):
    def renew(self, model: nn.Module, version: str) -> str:
        """Bring the weights over; the name of the model to ask for. Called on all ranks."""
        ...


def make_sync(server: Server, info: ServerInfo, args: GOLDConfig, model: nn.Module) -> WeightSync:
    refuse_whole_of_quantised(args, model)
    if has_adapter(model) and not args.vllm_merge_adapter:
        check_adapter(model)
        return AdapterSync(server, info, args)
    if args.vllm_weight_sync == "nccl":
        return NcclSync(server, info, args)
    return DiskSync(server, info, args)


def check_adapter(model: nn.Module) -> None:
    """What vLLM would leave out of an adapter, some of it without a word, is refused."""
    taken = {id(p) for p in base_model(model).get_decoder().parameters()}
    for name, parameter in model.named_parameters():
        is_lora = ".lora_A." in name or ".lora_B." in name
        if parameter.requires_grad and not (is_lora and id(parameter) in taken):
            remedy = "set vllm_merge_adapter=True"
            if is_quantised(model):  # which is never merged
                remedy = "train no more of a student in 8 or 4 bits"
            raise ValueError(
                "GOLDTrainer: an adapter that goes to vLLM alone must be LoRA of the language "
                f"model's layers, got {name} among what is trained; {remedy}."
            )


@contextmanager
def renewing(server: Server, version: str) -> Iterator[None]:
    """The server is paused within the context, and has this version behind it."""
    try:
        server.post("/pause", params={"mode": "wait"})
        yield
        if server.post("/reset_prefix_cache").get("success") is False:
            raise ValueError("its cache of prefixes could not be reset")
        server.post("/reset_mm_cache")
        server.post("/reset_encoder_cache")
        server.post("/update_weight_version", {"new_version": version})
        server.post("/resume")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"GOLDTrainer: the vLLM server at {server.url} must take the student's new weights, "
            f"got an error ({error}); start it again before the next run: it may be left with "
            "parts of both."
        ) from error


class WholeSync:
    """All weights, adapters merged. Subclasses say how the main process hands them over."""

    def __init__(self, server: Server, info: ServerInfo, args: GOLDConfig) -> None:
        self.server, self.info, self.args = server, info, args

    def renew(self, model: nn.Module, version: str) -> str:
        state = PartialState()
        gathered = gathered_weights(
            model, self.info.dtype, is_merged=True, is_kept=state.is_main_process
        )
        on_main_process(state, lambda: self._bring(checkpoint_weights(model, gathered), version))
        return self.info.model

    def _bring(self, weights: dict[str, Tensor], version: str) -> None:
        raise NotImplementedError


class DiskSync(WholeSync):
    """Weights go over as safetensors in a folder that the server reads."""

    def __init__(self, server: Server, info: ServerInfo, args: GOLDConfig) -> None:
        super().__init__(server, info, args)
        self.root = sync_root(args)

    def _bring(self, weights: dict[str, Tensor], version: str) -> None:
        with write(weights, self.root) as folder, renewing(self.server, version):
            reload(self.server, folder)


class NcclSync(WholeSync):
    """Weights go from this process' GPU to those of the server."""

    def __init__(self, server: Server, info: ServerInfo, args: GOLDConfig) -> None:
        super().__init__(server, info, args)
        self.group: NcclGroup | None = None

    def _bring(self, weights: dict[str, Tensor], version: str) -> None:
        with renewing(self.server, version):
            if self.group is None:
                self.group = NcclGroup(self.server, self.args.vllm_group_port)
            self.group.send(weights)


class AdapterSync:
    """The adapter alone, under a new name each time: of a name that it knows the server would go on
    to answer from what it has. The weights below it are brought over once.
    """

    def __init__(self, server: Server, info: ServerInfo, args: GOLDConfig) -> None:
        self.server, self.info, self.args = server, info, args
        self.root = sync_root(args)
        self.loaded: str | None = None
        self.kept: Any = None  # its folder: the server may read it again

    def renew(self, model: nn.Module, version: str) -> str:
        state = PartialState()
        below = None
        if self.loaded is None and not is_quantised(model):
            below = gathered_weights(
                model, self.info.dtype, is_merged=False, is_kept=state.is_main_process
            )
        adapter = adapter_weights(model, is_kept=state.is_main_process)
        name = f"student-{version}"
        on_main_process(state, lambda: self._bring(model, adapter, below, name, version))
        self.loaded = name
        return name

    def _bring(
        self,
        model: Any,  # a PeftModel
        adapter: dict[str, Tensor],
        below: dict[str, Tensor] | None,
        name: str,
        version: str,
    ) -> None:
        adapter = adapter_checkpoint(model, adapter)
        folder = write(adapter, self.root, "adapter_model{suffix}.safetensors")
        model.peft_config[model.active_adapters[0]].save_pretrained(folder.name)
        with renewing(self.server, version):
            if below is not None:
                with write(checkpoint_weights(model, below), self.root) as base_folder:
                    reload(self.server, base_folder)
            body = {"lora_name": name, "lora_path": folder.name}
            self.server.post("/v1/load_lora_adapter", body)
            if self.loaded is not None:
                self.server.post("/v1/unload_lora_adapter", {"lora_name": self.loaded})
        if self.kept is not None:
            self.kept.cleanup()
        self.kept = folder


def reload(server: Server, folder: str) -> None:
    body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    server.post("/collective_rpc", body)


def sync_root(args: GOLDConfig) -> Path:
    if args.vllm_sync_dir is not None:
        return Path(args.vllm_sync_dir).absolute()
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


OTHER_FOLDER = "set it to a folder with more, which the server reads too"


def write(
    weights: dict[str, Tensor],
    root: Path,
    pattern: str = "model{suffix}.safetensors",
    remedy: str = OTHER_FOLDER,
) -> tempfile.TemporaryDirectory:
    """A folder with these weights, that is gone when it is closed or the run ends."""
    root.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    free = shutil.disk_usage(root).free
    if size > free:
        raise ValueError(
            f"GOLDTrainer: vllm_sync_dir must have room for {size / 2**20:.0f} MiB of weights, got "
            f"{free / 2**20:.0f} MiB in {root}; {remedy}."
        )
    folder = tempfile.TemporaryDirectory(prefix="gold-trainer-", dir=root)
    os.chmod(folder.name, 0o755)  # the server may run as another user
    try:
        save_torch_state_dict(weights, folder.name, filename_pattern=pattern)
    except SafetensorError as error:  # a disk that others fill meanwhile
        folder.cleanup()
        raise ValueError(
            f"GOLDTrainer: vllm_sync_dir must take {size / 2**20:.0f} MiB of weights, got an error "
            f"in {root} ({error}); {remedy}."
        ) from error
    return folder
