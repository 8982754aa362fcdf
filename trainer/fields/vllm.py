"""Fields of GOLDConfig for rollouts that vLLM writes, in a server or in this process."""

from dataclasses import dataclass, field, fields
from typing import Any

from gold_trainer.fields.checks import refuse_given

# Fields of one mode, or of one way to bring weights over: what the other would ignore is refused.
OF_SERVER = (
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
    *("vllm_request_timeout", "vllm_weight_sync", "vllm_sync_dir", "vllm_group_port"),
    *("async_rollouts", "vllm_merge_adapter", "vllm_tensor_parallel_size"),
)
OF_COLOCATE = ("vllm_enable_sleep_mode",)
UNREAD = ", which nothing would read"


@dataclass
class VLLMFields:
    """The student's completions (on-policy) come from vLLM; those of the teacher do not."""

    use_vllm: bool = field(
        default=False, metadata={"help": "vLLM writes the student's completions: docs/vllm.md."}
    )
    vllm_mode: str = field(
        default="server",
        metadata={
            "help": "server: a vLLM server that runs elsewhere, `gold-trainer vllm-command` prints "
            "its start line; colocate: an engine in each training process.",
            "choices": ("server", "colocate"),
        },
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of the server, in place of vllm_server_host and vllm_server_port."
        },
    )
    vllm_server_host: str = field(default="127.0.0.1", metadata={"help": "Host of the server."})
    vllm_server_port: int = field(default=8001, metadata={"help": "Port of the server."})
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the server when a run begins."}
    )
    vllm_request_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds that the server may take for one request before the run ends."},
    )
    vllm_weight_sync: str = field(
        default="disk",
        metadata={
            "help": "How new weights reach the server. disk: through vllm_sync_dir; nccl: from GPU "
            "to GPU, with vllm installed here too.",
            "choices": ("disk", "nccl"),
        },
    )
    vllm_sync_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that the server reads new weights from; None: shared memory, for a "
            "server on this machine."
        },
    )
    vllm_group_port: int = field(
        default=51216, metadata={"help": "Port where the processes of nccl meet."}
    )
    vllm_merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "Send an adapter merged into a copy of the weights; otherwise the "
            "adapter alone."
        },
    )
    vllm_sync_frequency: int = field(
        default=1, metadata={"help": "Steps between two transfers of new weights to vLLM."}
    )
    async_rollouts: int = field(
        default=0,
        metadata={
            "help": "1: a server writes the rollouts of the next step while this one is learnt, "
            "with weights that are one step old; vllm_sync_frequency is 1 then."
        },
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of prompt and completion in vLLM; None: max_length."},
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "GPUs that vLLM spreads the model over."}
    )
    vllm_gpu_memory_utilization: float | None = field(
        default=None,
        metadata={
            "help": "Share of a GPU's memory that vLLM takes; None: 0.9 in a server, 0.3 beside a "
            "student that trains (colocate)."
        },
    )
    vllm_model_impl: str = field(
        default="vllm",
        metadata={
            "help": "Whose implementation of the model vLLM runs.",
            "choices": ("auto", "vllm", "transformers"),
        },
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={"help": "Free the engine's memory while the student learns (colocate)."},
    )

    @property
    def vllm_url(self) -> str:
        url = self.vllm_server_base_url
        return (url or f"http://{self.vllm_server_host}:{self.vllm_server_port}").rstrip("/")

    @property
    def vllm_memory_share(self) -> float:
        if self.vllm_gpu_memory_utilization is not None:
            return self.vllm_gpu_memory_utilization
        return 0.9 if self.vllm_mode == "server" else 0.3

    @property
    def vllm_model_length(self) -> int | None:
        """Tokens that a sequence may have in vLLM, as far as the run says it."""
        own: Any = self
        return own.max_length if self.vllm_max_model_length is None else self.vllm_max_model_length

    def check_vllm(self) -> None:
        """Fields that nothing would read, or that contradict one another."""
        own: Any = self
        if not self.use_vllm:
            names = sorted(f.name for f in fields(VLLMFields))
            refuse_given(self, names, "left out unless vLLM writes", "; set use_vllm=True")
            return
        if own.lmbda == 0:
            raise ValueError(
                "GOLDConfig: use_vllm must be False where no micro-batch is on-policy, got True "
                "and lmbda=0.0; vLLM writes what the student learns from: raise lmbda."
            )
        others = OF_COLOCATE if self.vllm_mode == "server" else OF_SERVER
        refuse_given(self, others, f"left out with vllm_mode={self.vllm_mode!r}", UNREAD)
        if self.async_rollouts and self.vllm_sync_frequency > 1:
            raise ValueError(
                "GOLDConfig: vllm_sync_frequency must be 1 with async_rollouts=1, got "
                f"{self.vllm_sync_frequency}, with which rollouts would be older than one step; "
                "leave one of them out."
            )
        self._check_address()
        ignored = "vllm_sync_dir" if self.vllm_weight_sync == "nccl" else "vllm_group_port"
        why = f"with vllm_weight_sync={self.vllm_weight_sync!r}"
        refuse_given(self, (ignored,), f"left out {why}", UNREAD)
        length, max_length = self.vllm_max_model_length, own.max_length
        if length is not None and max_length is not None and length < max_length:
            raise ValueError(
                "GOLDConfig: vllm_max_model_length must be at least max_length, got "
                f"{length} and {max_length}; lower max_length, or leave vllm_max_model_length out."
            )

    def _check_address(self) -> None:
        url = self.vllm_server_base_url
        if url is None:
            return
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                "GOLDConfig: vllm_server_base_url must be an address like http://localhost:8001, "
                f"got {url!r}; begin it with http://."
            )
        names = "vllm_server_host", "vllm_server_port"
        remedy = f" and {url!r}; the address has both"
        refuse_given(self, names, "left out beside vllm_server_base_url", remedy)
