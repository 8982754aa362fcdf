"""A fake vLLM server that keeps hidden states: it runs a tiny teacher, and writes files as vLLM's
connector does.
"""

import base64
import fcntl
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from gold_trainer.rendering.prompts import tokenizer_of
from gold_trainer.writers.vllm.requests import GENERATE
from support.vllm_stub import Stub, stub_server

DELAY = 0.02  # seconds in which the answer is there and its file is not


class ServedTeacher:
    """What the stub answers with, and what it was asked."""

    def __init__(self, stub: Stub, model: Any, processor: Any, root: Path, folder: Path) -> None:
        self.stub, self.model, self.processor, self.folder = stub, model, processor, folder
        self.tokenizer = tokenizer_of(processor)
        self.layer = model.config.get_text_config().num_hidden_layers
        self.num_layers_kept = 1
        self.max_logprobs = 20  # vLLM's default
        self.is_held = False  # the file's lock, for ever
        self.threads: list[threading.Thread] = []
        self.held: list[Any] = []
        self.most_at_a_time = self.at_work = 0
        self.lock = threading.Lock()
        entry = {"id": "served", "root": str(root), "parent": None, "max_model_len": 256}
        stub.answers["/v1/models"] = {"data": [entry]}
        stub.answers["/tokenize"] = self.tokenize
        stub.answers[GENERATE] = self.generate

    @property
    def fields(self) -> dict[str, Any]:
        """Of GOLDConfig."""
        return {
            "teacher_model_server_url": self.stub.url,
            "teacher_server_timeout": 2.0,
            "teacher_request_timeout": 30.0,
        }

    @property
    def entry(self) -> dict[str, Any]:
        return self.stub.answers["/v1/models"]["data"][0]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Requests for rows, behind the one that looks whether the weights are right."""
        return [body for body in self.stub.bodies(GENERATE) if body][1:]

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        if "messages" in body:
            ids = self.tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        else:
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        return {"tokens": list(ids)}

    def generate(self, body: dict[str, Any]) -> Any:
        if not body:
            return 400
        with self.lock:
            self.at_work += 1
            self.most_at_a_time = max(self.at_work, self.most_at_a_time)
        time.sleep(DELAY)
        with self.lock:
            self.at_work -= 1
            return self._answer(body)

    @torch.no_grad()
    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, pixels = self._inputs(body)
        output = self.model(input_ids=torch.tensor([ids]), output_hidden_states=True, **pixels)
        if "prompt_logprobs" in body.get("sampling_params", {}):
            return self._likeliest(ids, output.logits[0], body["sampling_params"])
        log_probs = output.logits[0, -1].float().log_softmax(-1)
        path = self.folder / f"{len(self.threads)}.safetensors"
        lock = open(f"{path}.lock", "wb")  # noqa: SIM115  # closed by the thread that writes
        fcntl.flock(lock, fcntl.LOCK_EX)
        hidden = self._before_the_norm(ids, pixels)
        thread = threading.Thread(target=self._write, args=(path, lock, ids, hidden), daemon=True)
        self.threads.append(thread)
        thread.start()
        next_id = int(log_probs.argmax())
        content = [{"token_id": next_id, "logprob": float(log_probs[next_id])}]
        return {
            "prompt_token_ids": ids,
            "choices": [{"index": 0, "token_ids": [next_id], "logprobs": {"content": content}}],
            "kv_transfer_params": {"hidden_states_path": str(path)},
        }

    def _likeliest(self, ids: list[int], logits: Any, params: dict[str, Any]) -> Any:
        """As vLLM: nothing of the first token, of others the token itself in front of the k."""
        k = params["prompt_logprobs"]
        if k > self.max_logprobs:
            return 400
        entries: list[Any] = [None]
        for row, token in zip(logits[:-1].float().log_softmax(-1), ids[1:], strict=True):
            values, found = row.topk(k)
            own = {"logprob": float(row[token]), "rank": 1 + int((row > row[token]).sum())}
            ranked = enumerate(zip(found.tolist(), values.tolist(), strict=True), 1)
            top = {str(i): {"logprob": value, "rank": rank} for rank, (i, value) in ranked}
            entries.append({str(token): own} | top)
        return {"prompt_token_ids": ids, "prompt_logprobs": entries, "choices": [{"index": 0}]}

    def _write(self, path: Path, lock: Any, ids: list[int], hidden: Any) -> None:
        time.sleep(DELAY)
        if self.is_held:
            self.held.append(lock)
            return
        save_file(self.tensors(hidden, torch.tensor(ids)), path)
        lock.close()

    def tensors(self, hidden: Any, ids: Any) -> dict[str, Any]:  # (L, D), (L,)
        """Of a file."""
        kept = hidden[:, None].expand(-1, self.num_layers_kept, -1).contiguous()
        return {"hidden_states": kept, "token_ids": ids}

    def _before_the_norm(self, ids: list[int], pixels: dict[str, Any]) -> Any:  # (L, D)
        """What comes out of layer self.layer: transformers has the norm behind the last one."""
        made: list[Any] = []
        layer = self.model.get_decoder().layers[self.layer - 1]
        hook = layer.register_forward_hook(
            lambda _m, _i, output: made.append(output if torch.is_tensor(output) else output[0])
        )
        self.model(input_ids=torch.tensor([ids]), **pixels)
        hook.remove()
        return made[0][0]

    def _inputs(self, body: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """Ids with the placeholders of pictures expanded, as Qwen's models have them."""
        parts = body.get("content_parts", [])
        if not parts:
            return body["token_ids"], {}
        images = [
            Image.open(io.BytesIO(base64.b64decode(part["url"].partition(",")[2])))
            for part in parts
        ]
        pixels = dict(self.processor.image_processor(images=images, return_tensors="pt"))
        merged = self.processor.image_processor.merge_size**2
        sizes = iter((pixels["image_grid_thw"].prod(1) // merged).tolist())
        image_id = self.model.config.image_token_id
        ids = [i for t in body["token_ids"] for i in ([t] * next(sizes) if t == image_id else [t])]
        types = torch.tensor([[int(i == image_id) for i in ids]])
        return ids, pixels | {"mm_token_type_ids": types}


@contextmanager
def served_teacher(model: Any, processor: Any, root: Path, folder: Path) -> Iterator[ServedTeacher]:
    """root: the checkpoint that it says it was started with; folder: where its files go."""
    folder.mkdir(exist_ok=True)
    with stub_server() as stub:
        yield ServedTeacher(stub, model, processor, root, folder)
