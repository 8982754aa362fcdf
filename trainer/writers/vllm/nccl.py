"""Weights from GPU to GPU: this process and the workers of a vLLM server in one group of NCCL.

Written after vLLM's own protocol; no test runs it, for want of a GPU.
"""

import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from gold_trainer.writers.vllm.server import Server


def check_nccl() -> None:
    """Refuse a run without a GPU or vLLM's communicator, before models are loaded."""
    if not torch.cuda.is_available():
        raise ValueError(
            "GOLDTrainer: vllm_weight_sync='nccl' needs a GPU here, got none; set it to 'disk'."
        )
    try:
        import vllm.distributed.weight_transfer.nccl_common  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "GOLDTrainer: vllm_weight_sync='nccl' needs the package vllm here too, whose "
            f"communicator it is ({error}); pip install vllm, or set it to 'disk'."
        ) from error


class NcclGroup:
    """This process is rank 0, the workers come behind it."""

    def __init__(self, server: Server, port: int) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self.server = server
        address = own_address(server.url)
        size = server.get("/get_world_size")["world_size"] + 1
        meeting = {"master_address": address, "master_port": port, "world_size": size}
        with ThreadPoolExecutor(1) as pool:  # both sides wait for each other
            body = {"init_info": {**meeting, "rank_offset": 1, "packed": False}}
            asked = pool.submit(server.post, "/init_weight_transfer_engine", body)
            self.communicator: Any = trainer_init(meeting)
            asked.result()

    def send(self, weights: dict[str, Tensor]) -> None:
        self.server.post("/start_weight_update")
        info = {
            "names": list(weights),
            "dtype_names": [str(t.dtype).removeprefix("torch.") for t in weights.values()],
            "shapes": [list(t.shape) for t in weights.values()],
        }
        pool = ThreadPoolExecutor(1)
        try:
            asked: Future = pool.submit(self.server.post, "/update_weights", {"update_info": info})
            stream = torch.cuda.current_stream()
            for tensor in weights.values():
                if asked.done():
                    asked.result()  # refused: nobody would receive
                self.communicator.broadcast(tensor.to("cuda"), src=0, stream=stream)
            stream.synchronize()
            asked.result()
        finally:
            pool.shutdown(wait=False)  # after an error here the server waits for what never comes
        self.server.post("/finish_weight_update")


def own_address(url: str) -> str:
    """The address of this machine that the server sees."""
    host = urlparse(url).hostname or "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # of datagrams: nothing is sent
        return str(probe.getsockname()[0])
