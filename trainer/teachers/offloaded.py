"""A frozen teacher whose layers are in host memory or on disk: teacher_offload."""

import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gold_trainer import loading
from gold_trainer.config import GOLDConfig
from gold_trainer.data.row_errors import first_line
from gold_trainer.rendering.collator import Processor
from gold_trainer.teachers.frozen import FrozenTeacher, refuse_kinds
from gold_trainer.teachers.layer_stream import Layer, LayerStream, outermost_lists, split_layers

logger = logging.getLogger(__name__)

FOLDER = ".teacher_offload-"  # in output_dir, gone when the process ends


class OffloadedTeacher(FrozenTeacher):
    """Runs as a frozen teacher; the weights of a layer are on the device while it runs."""

    stream: LayerStream

    def __init__(self, model: nn.Module, processor: Processor, args: GOLDConfig) -> None:
        super().__init__(model, processor, args)
        self.stored: dict[nn.Parameter, Tensor] = {}
        self.folders: list[tempfile.TemporaryDirectory] = []

    @classmethod
    def load(
        cls, model: PreTrainedModel | str, processor: Processor, args: GOLDConfig
    ) -> "OffloadedTeacher":
        """With "disk" and a name, layers are never read as a whole: they stay in the files that
        they come in, or, where transformers keeps them in another form, in files of that.
        """
        if args.teacher_offload == "cpu" or not isinstance(model, str):
            loaded = cls.load_model(model, args)
            refuse_kinds(loaded, "teacher_offload")
            return cls(loaded, processor, args)
        folder = _new_folder(args)
        source = args.teacher_model_init_kwargs, args.teacher_model_revision
        hull = loading.empty_model(model, *source)
        options = {"device_map": _on_disk(hull), "offload_folder": folder.name}
        with loading.whole_weights():
            loaded = loading.load_model(model, *source, device=args.device, **options)
        stored = _map_stored(loaded)
        refuse_kinds(loaded, "teacher_offload")
        teacher = cls(loaded, processor, args)
        teacher.stored, teacher.folders = stored, [folder]
        return teacher

    def place(self, device: torch.device) -> None:
        own = self.own_device or device
        self.model.requires_grad_(False).eval()
        layers = split_layers(self.model, self.stored)
        if self.args.teacher_offload == "cpu":
            _pack(layers, is_pinned=own.type == "cuda")
        else:
            self._write(layers)
        self.stream = LayerStream(layers, own)
        self.stored = {}
        self.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(own))
        self.meet(device)

    @contextmanager
    def writing(self) -> Iterator[nn.Module]:
        with self.stream.running():
            yield self.model

    def _write(self, layers: list[Layer]) -> None:
        """Write what is not on disk yet."""
        mapped = {id(tensor) for tensor in self.stored.values()}
        sources = [tensor for layer in layers for tensor in layer.sources.values()]
        needed = sum(tensor.nbytes for tensor in sources if id(tensor) not in mapped)
        if not needed:
            return
        folder = _new_folder(self.args)
        free = shutil.disk_usage(folder.name).free
        if needed > free:
            raise ValueError(
                f"GOLDTrainer: teacher_offload='disk' must have {needed >> 20} MiB of free disk "
                f"for the teacher's layers, got {free >> 20} in {self.args.output_dir}; choose "
                "another output_dir, or give the teacher by name: its files then are enough."
            )
        self.folders.append(folder)
        write_layers(layers, folder.name, mapped)


def _pack(layers: list[Layer], *, is_pinned: bool) -> None:
    total = sum(layer.num_bytes for layer in layers) >> 20
    try:
        for layer in layers:
            layer.pack(is_pinned=is_pinned)
            layer.rest()  # what it was packed from goes, before the next one is packed
    except RuntimeError as error:  # of the allocator
        raise ValueError(
            f"GOLDTrainer: teacher_offload='cpu' must have {total} MiB of host memory for the "
            f"teacher's layers, got an error ({first_line(error)}); set "
            "teacher_offload='disk', or start fewer processes."
        ) from error


def delete_left(output_dir: str, kept: Collection[str]) -> None:
    """Folders of processes that were killed, which could not; kept: those of this run's."""
    for folder in Path(output_dir).glob(f"{FOLDER}*"):
        if str(folder.resolve()) not in kept:
            logger.warning("GOLDTrainer: deleting %s, which a run that was killed left.", folder)
            shutil.rmtree(folder, ignore_errors=True)


def write_layers(layers: list[Layer], folder: str, mapped: Collection[int] = ()) -> None:
    """Sources become memory that is mapped to files, but for those with an id in mapped."""
    for number, layer in enumerate(layers):
        own = {
            str(start): tensor.cpu().contiguous()
            for start, tensor in layer.sources.items()
            if id(tensor) not in mapped
        }
        if own:
            path = f"{folder}/{number}.safetensors"
            save_file(own, path)
            with safe_open(path, framework="pt") as file:
                for name in own:
                    layer.sources[int(name)] = file.get_tensor(name)


def _new_folder(args: GOLDConfig) -> tempfile.TemporaryDirectory:
    assert args.output_dir is not None, "TrainingArguments sets one"
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=FOLDER, dir=args.output_dir)


def _on_disk(hull: nn.Module) -> dict[str, str]:
    """A device_map: the lists of layers on disk, what is beside them in memory."""
    lists = [path for path, _ in outermost_lists(hull)]

    def places(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
        own = [*module._parameters, *module._buffers]
        for name in [*own, *dict(module.named_children())]:
            path = prefix + name
            if path in lists:
                yield path, "disk"
            elif name not in own and any(other.startswith(f"{path}.") for other in lists):
                yield from places(module.get_submodule(name), f"{path}.")
            else:
                yield path, "cpu"

    return dict(places(hull, ""))


def _map_stored(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """What a parameter is read from, as memory mapped to its file. Accelerate's hooks know the
    files; they go.
    """
    maps = (getattr(getattr(m, "_hf_hook", None), "weights_map", None) for m in model.modules())
    index = next(weights_map.dataset.index for weights_map in maps if weights_map is not None)
    remove_hook_from_module(model, recurse=True)
    stored = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            entry = index[name]
            with safe_open(entry["safetensors_file"], framework="pt") as file:
                stored[parameter] = file.get_tensor(entry["weight_name"])
    return stored
