"""vLLM's connector of hidden states for a machine without CUDA, on whose streams and pinned memory
the stock one copies. Files, locks and answers are the stock one's.
"""

import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as stock


class _Done:
    """In the place of a CUDA event."""

    def query(self) -> bool:
        return True


class CPUHiddenStatesConnector(stock.ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending: Any) -> None:
        blocks = torch.tensor(pending.block_ids)[:, None] * self._block_size
        slots = (blocks + torch.arange(self._block_size)).flatten()
        ids = pending.token_ids.clone()
        hidden = stock.extract_from_kv_cache(self._kv_cache, slots, len(ids))
        save_file({"hidden_states": hidden.contiguous(), "token_ids": ids}, pending.filename)
        os.close(self._lock_fds.pop(pending.req_id))
        self._req_copy_events[pending.req_id] = _Done()
