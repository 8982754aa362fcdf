"""A server in a thread that answers as vLLM does, and remembers what it was asked."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors.torch import load_file
from torch import Tensor

GENERATE = "/inference/v1/generate"
CONFIG: dict[str, Any] = {
    "model_config": {
        "dtype": "torch.float32",
        "max_model_len": 256,
        "logprobs_mode": "processed_logprobs",
    },
    "scheduler_config": {"max_num_seqs": 8},
    "lora_config": None,
    "weight_transfer_config": None,
}


class Stub:
    """answers: of a path, in place of the usual one: a status, a JSON, or a function of the body
    that makes one of them.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []  # path with its query, body
        self.answers: dict[str, Any] = {}
        self.config = json.loads(json.dumps(CONFIG))
        self.written = [5, 6, 7]
        self.version = "default"
        self.weights: list[dict[str, Tensor]] = []  # of every reload, and every adapter
        self.folders: list[Path] = []
        self.expand: Callable[[dict[str, Any]], list[int]] = lambda body: body["token_ids"]
        self.lock = threading.Lock()
        self.url = ""

    @property
    def fields(self) -> dict[str, Any]:
        """Of GOLDConfig."""
        return {"use_vllm": True, "vllm_server_base_url": self.url, "vllm_server_timeout": 2.0}

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def bodies(self, path: str) -> list[Any]:
        return [body for called, body in self.calls if called == path]

    def answer(self, path: str, query: str, body: Any) -> tuple[int, Any]:
        with self.lock:
            self.calls.append((f"{path}?{query}" if query else path, body))
        given = self.answers.get(path)
        given = given(body) if callable(given) else given
        if isinstance(given, int):
            return given, {"error": {"message": f"refused with {given}"}}
        if given is not None:
            return 200, given
        return 200, self._usual(path, body)

    def _usual(self, path: str, body: Any) -> Any:
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/v1/models":
            return {"data": [{"id": "served"}]}
        if path == "/server_info":
            return {"vllm_config": self.config}
        if path == "/collective_rpc":
            self._load(body["kwargs"]["weights_path"])
        elif path == "/v1/load_lora_adapter" and body:
            self._load(body["lora_path"])
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == GENERATE and body:
            return self._completions(body)
        return {"success": True}

    def _load(self, folder: str) -> None:
        self.folders.append(Path(folder))
        (file,) = Path(folder).glob("*.safetensors")
        self.weights.append(load_file(file))

    def _completions(self, body: Any) -> Any:
        return {
            "prompt_token_ids": self.expand(body),
            "choices": [
                {
                    "index": i,
                    "token_ids": self.written,
                    "finish_reason": "stop",
                    "weight_versions": [{"version": self.version, "start": 0, "end": 3}],
                    "logprobs": {"content": [{"logprob": -1.0} for _ in self.written]},
                }
                for i in range(body["sampling_params"]["n"])
            ],
        }


def late(seconds: float) -> Callable[[Any], int]:
    def answer(body: Any) -> int:
        time.sleep(seconds)
        return 200

    return answer


@contextmanager
def stub_server() -> Iterator[Stub]:
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            url = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or "null")
            status, answer = stub.answer(url.path, url.query, body)
            if status == 0:  # it dies
                self.close_connection = True
                return
            content = json.dumps(answer).encode()
            with suppress(ConnectionError):  # whoever asked may have waited long enough
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = handle_one  # names of http.server

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
