"""Fields of GOLDConfig for the teacher: which model it is, and where its weights are: here, or in a
vLLM server.
"""

import copy
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from gold_trainer.fields.checks import as_dict, refuse_given

CHOOSE = "; choose one of the two"
SHARDINGS = ("fsdp",)
OFFLOADS = ("cpu", "disk")
# Where the weights of a teacher are that is here.
PLACES = ("teacher_sharding", "teacher_device", "teacher_offload")
BARE = re.compile(r"[\w.-]+:\d{1,5}")  # an address without http://
# What is one teacher's, or runs a teacher on all processes together.
NOT_OF_SEVERAL = (
    *("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_server_url"),
    *("teacher_sharding", "teacher_batch_size", "seq_kd"),
)
# Arguments of from_pretrained with which transformers spreads one model over processes.
DISTRIBUTED = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


@dataclass
class TeacherFields:
    """A teacher given by name; one that is an object was loaded with options of its own."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher: folder or hub id."}
    )
    teacher_models: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Several teachers by id, as JSON: folders, hub ids or addresses of servers; "
            "the column teacher_id says which of them a row learns from."
        },
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a teacher from the hub."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Arguments of from_pretrained for the teacher, as {"dtype": "bfloat16"}.'
        },
    )
    teacher_sharding: str | None = field(
        default=None,
        metadata={
            "help": "fsdp: each process holds a part of the teacher, and a layer is gathered when "
            "it runs; with any engine of the student. None: each process has all of it.",
            "choices": SHARDINGS,
        },
    )
    teacher_device: str | None = field(
        default=None,
        metadata={"help": "Another device for the teacher, as cuda:1, in a run of one process."},
    )
    teacher_offload: str | None = field(
        default=None,
        metadata={
            "help": "cpu: the teacher's layers are in host memory, disk: in files; they come to "
            "the device one after the other, while those before them compute.",
            "choices": OFFLOADS,
        },
    )
    teacher_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows over which the teacher runs at a time: a multiple of "
            "per_device_train_batch_size merges micro-batches of an optimizer step, less splits "
            "one. None: the rows of a micro-batch."
        },
    )

    def check_teacher(self) -> None:
        """ValueError for a device that there is not, and for what cannot be together."""
        self._check_init_kwargs()
        self._check_several()
        if self.teacher_sharding is not None:
            names = "teacher_device", "teacher_offload"
            refuse_given(self, names, "None with teacher_sharding", CHOOSE)
        if self.teacher_device is not None:
            _check_device(self.teacher_device)
        if self.teacher_batch_size is not None:
            self._check_batch_size(self.teacher_batch_size)

    def _check_batch_size(self, size: int) -> None:
        args: Any = self  # a GOLDConfig
        own, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
        if args.has_absent_teacher:
            raise ValueError(
                f"GOLDConfig: teacher_batch_size must be None for a teacher that does not run "
                f"here, got {size} with teacher_cache or teacher_model_server_url; leave it out."
            )
        if size > own * steps or (size > own and size % own):
            raise ValueError(
                "GOLDConfig: teacher_batch_size must be below per_device_train_batch_size, or a "
                "multiple of it within a window (times gradient_accumulation_steps), got "
                f"{size} with {own} and {steps}; set {max(1, min(size // own, steps)) * own}."
            )

    def _check_several(self) -> None:
        args: Any = self  # a GOLDConfig
        given = self.teacher_models
        if given is None:
            return
        assert isinstance(given, dict), "check_fields has looked at it"
        is_text = all(isinstance(part, str) and part for pair in given.items() for part in pair)
        if not given or not is_text or any({"/", "\\"} & set(key) for key in given):
            raise ValueError(
                "GOLDConfig: teacher_models must be a dict of ids without slashes and of models by "
                f'name, got {given}; write {{"math": "PATH", "code": "PATH"}}.'
            )
        remedy = "; train with one teacher, teacher_model_name_or_path"
        refuse_given(args, NOT_OF_SEVERAL, "left out with teacher_models", remedy)
        if args.teacher_cache_form == "head_means":
            raise ValueError(
                "GOLDConfig: teacher_cache_form must be 'hidden' or 'top_k' with teacher_models, "
                "got 'head_means', which belongs to one teacher; leave it out."
            )

    def _check_init_kwargs(self) -> None:
        given = as_dict(self.teacher_model_init_kwargs)
        revision = self.teacher_model_revision
        if revision is not None and given.get("revision", revision) != revision:
            raise ValueError(
                "GOLDConfig: teacher_model_init_kwargs must be without revision where "
                f"teacher_model_revision is set, got {given['revision']!r} and {revision!r}; "
                "choose one of the two."
            )
        for name in DISTRIBUTED:
            if name in given:
                raise ValueError(
                    f"GOLDConfig: teacher_model_init_kwargs must be without {name}, got "
                    f"{given[name]!r}: its ranks would have to see the same rows; set "
                    "teacher_sharding='fsdp', or pass two models that are loaded with the same "
                    "tp_plan."
                )
        for name in PLACES:
            if "device_map" in given and getattr(self, name) is not None:
                raise ValueError(
                    f"GOLDConfig: teacher_model_init_kwargs must be without device_map where "
                    f"{name} is set, got {given['device_map']!r}; choose one of the two."
                )
        if "quantization_config" in given:
            names = "teacher_sharding", "teacher_offload"
            refuse_given(self, names, "None for a teacher in 8 or 4 bits", CHOOSE)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        is_there = device.type == "cpu" or _count(device.type) > (device.index or 0)
    except (AttributeError, RuntimeError):  # no name of a device, or none that this torch has
        is_there = False
    if not is_there:
        there, gpu = ["cpu"], torch.accelerator.current_accelerator(check_available=True)
        if gpu is not None:
            there += [f"{gpu.type}:{index}" for index in range(_count(gpu.type))]
        raise ValueError(
            f"GOLDConfig: teacher_device must be one of {', '.join(there)}, got {name!r}; None "
            "puts the teacher where the student is."
        )


def _count(kind: str) -> int:
    return torch.get_device_module(kind).device_count()


@dataclass
class ServedFields:
    """teacher_model_name_or_path is the checkpoint that the server was started with."""

    teacher_model_server_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of a vLLM server that runs the teacher; `gold-trainer "
            "teacher-command` prints its start line. The run reads norm and head of the checkpoint."
        },
    )
    teacher_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for that server when a run begins."}
    )
    teacher_request_timeout: float = field(
        default=600.0, metadata={"help": "Seconds that it may take for one row."}
    )
    teacher_request_retries: int = field(
        default=3,
        metadata={"help": "How often a row is asked for again where the server did not answer."},
    )

    @property
    def has_absent_teacher(self) -> bool:
        """Whether its weights are elsewhere, but for its head."""
        args: Any = self  # a GOLDConfig
        is_served = is_address(self.teacher_model_server_url or args.teacher_model_name_or_path)
        return args.teacher_cache is not None or is_served

    @property
    def asks_for_tokens(self) -> bool:
        """Whether a server gives the likeliest tokens, and no hidden states."""
        args: Any = self
        is_for_hidden = args.teacher_cache is not None and args.form_to_make == "hidden"
        is_served = self.teacher_model_server_url is not None
        return is_served and bool(args.loss_top_k) and not is_for_hidden

    @property
    def is_told_by_examples(self) -> bool:
        """Whether the teacher makes what it needs of examples, or needs no more."""
        args: Any = self
        return self.has_absent_teacher or args.teacher_models is not None

    def check_served(self) -> None:
        """ValueError for what a server cannot do; an address in the teacher's place moves."""
        args: Any = self
        refuse_bare_address(args.teacher_model_name_or_path)
        if is_address(args.teacher_model_name_or_path):
            take_address(args, args.teacher_model_name_or_path)
            args.teacher_model_name_or_path = None
        url = self.teacher_model_server_url
        if url is None:
            several = args_by_teacher(args).values()  # those that are servers are checked there
            if all(one.teacher_model_server_url is None for one in several):
                names = [one.name for one in fields(ServedFields)]
                remedy = "; set teacher_model_server_url"
                refuse_given(self, names, "left out unless a server is the teacher", remedy)
            return
        if not is_address(url):
            raise ValueError(
                "GOLDConfig: teacher_model_server_url must be an address like "
                f"http://localhost:8002, got {url!r}; begin it with http://."
            )
        self.teacher_model_server_url = trimmed(url)
        if args.seq_kd:
            raise ValueError(
                "GOLDConfig: seq_kd must be False with teacher_model_server_url, got True; the "
                "server is asked for hidden states alone: put its completions into the dataset."
            )
        if self.asks_for_tokens and args.teacher_temperature != 1:
            raise ValueError(
                "GOLDConfig: loss_teacher_temperature, or loss_temperature without it, must be 1 "
                f"where a server gives the tokens of loss_top_k, got {args.teacher_temperature}: "
                "its log-probabilities are at 1; set loss_teacher_temperature=1."
            )
        remedy = ": its weights are where the server is; leave one of them out"
        refuse_given(args, PLACES, "None with teacher_model_server_url", remedy)
        if "quantization_config" in as_dict(args.teacher_model_init_kwargs):
            raise ValueError(
                "GOLDConfig: teacher_model_init_kwargs must be without quantization_config with "
                "teacher_model_server_url, got one; start the server with --quantization."
            )


def is_address(name: Any) -> bool:
    return isinstance(name, str) and name.lower().startswith(("http://", "https://"))


def refuse_bare_address(name: Any) -> None:
    """host:port, which no folder and no hub id is."""
    if isinstance(name, str) and BARE.fullmatch(name):
        raise ValueError(
            "GOLDConfig: teacher_model_name_or_path must be a folder, a hub id or an address that "
            f"begins with http://, got {name!r}; write http://{name}."
        )


def trimmed(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def take_address(args: Any, url: str) -> None:  # a GOLDConfig
    """An address that came in the place of the teacher's name."""
    given, url = args.teacher_model_server_url, trimmed(url)
    if given is not None and trimmed(given) != url:
        raise ValueError(
            "GOLDTrainer: one server must be the teacher, got "
            f"{url!r} and teacher_model_server_url={given!r}; leave one of them out."
        )
    args.teacher_model_server_url = url


def args_by_teacher(args: Any) -> dict[str, Any]:  # GOLDConfigs
    """For each of teacher_models the config of a run with it alone. Each has a cache of its own."""
    return {key: _of_one(args, key, name) for key, name in (args.teacher_models or {}).items()}


def _of_one(args: Any, key: str, name: str) -> Any:
    one = copy.copy(args)
    one.teacher_models, one.teacher_model_name_or_path = None, name
    if args.teacher_cache is not None:
        one.teacher_cache = str(Path(args.teacher_cache) / key)
        if not args.loss_top_k:
            one.teacher_cache_form = "hidden"
    if is_address(name):
        one.check_served()
    return one
