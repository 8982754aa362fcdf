"""A vLLM server that keeps hidden states: ids and pictures in, rows of its last layer out.

The answer names a file, which the server writes meanwhile and holds a lock on. So both read one
folder. L positions, N rows, D hidden size.
"""

import fcntl
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gold_trainer.writers.vllm.requests import GENERATE, body_of
from gold_trainer.writers.vllm.server import Server

logger = logging.getLogger(__name__)

ONE_TOKEN = {"max_tokens": 1, "temperature": 1.0, "detokenize": False}  # it has to write one
POLL_SECONDS = 0.002
FIRST_PAUSE = 0.5  # seconds before the first retry; each waits twice as long as the one before


class Answer(NamedTuple):
    hidden: Tensor  # (L, D) behind the last layer, before the norm
    seen_ids: list[int]  # as the server expanded them
    next_id: int  # what it wrote behind them
    next_logprob: float


@dataclass(frozen=True)
class HiddenStates:
    """One method: ask. May be called from several threads."""

    server: Server
    model: str  # the name to ask for
    retries: int
    width: int  # D

    def ask(
        self,
        token_ids: list[int],  # with one placeholder a picture
        images: list[Image.Image],
    ) -> Answer:
        """Refused for what the server takes for wrong, OSError where it does not answer."""
        # the log-probability of what is written tells whether head and norm fit
        params = {"top_p": 1.0, "top_k": 0, "seed": 0, "logprobs": 0}
        body = body_of(self.model, token_ids, images, ONE_TOKEN | params)
        answer = post(self.server, body, self.retries)
        what = "token ids, a choice and its log-probability"
        found = self.server.read(GENERATE, answer, what, _told)
        if found.path is None:
            raise self._refusal("keep hidden states, got an answer that names no file of them")
        hidden = self._read(Path(found.path), found.seen_ids)
        return Answer(hidden, found.seen_ids, found.next_id, found.next_logprob)

    def _read(self, path: Path, seen_ids: list[int]) -> Tensor:  # (L, D)
        try:
            self._wait(path)
            tensors = load_file(path)
        except TimeoutError:
            raise
        except OSError as error:
            raise self._refusal(
                f"write hidden states where this process reads them, got {path}, which it cannot "
                f"read ({type(error).__name__}); run both on one machine, or share its folder "
                "under one path"
            ) from error
        except SafetensorError as error:
            raise self._refusal(f"write whole files, got {path} ({error})") from error
        hidden, ids = tensors.get("hidden_states"), tensors.get("token_ids")
        for used in (path, _lock_of(path)):
            with suppress(OSError):  # the folder is the server's
                used.unlink()
        expected = len(seen_ids), 1, self.width
        is_whole = hidden is not None and hidden.shape == expected
        if hidden is None or ids is None or not is_whole or ids.tolist() != seen_ids:
            shape = "none" if hidden is None else f"those of shape {tuple(hidden.shape)}"
            raise self._refusal(
                f"keep hidden states of its last layer, of shape {expected} for a row of "
                f"{len(seen_ids)} tokens of that checkpoint, got {shape}"
            )
        return hidden[:, 0]

    def _wait(self, path: Path) -> None:
        """Until the server lets go of its lock, behind its last byte."""
        end = time.monotonic() + self.server.timeout
        with open(_lock_of(path), "rb") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise TimeoutError(
                            f"GOLDTrainer: the vLLM server at {self.server.url} must write {path} "
                            f"within {self.server.timeout:g} s ({self.server.fields[1]}), got a "
                            "file that it still holds; raise it, or look into the server's log."
                        ) from None
                    time.sleep(POLL_SECONDS)

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            f"GOLDTrainer: the vLLM server at {self.server.url} must {what}; start it with: "
            f"{self.server.start_line}"
        )


def post(server: Server, body: dict[str, Any], retries: int) -> dict[str, Any]:
    """The answer to a row, which is sent once more where the server fails."""
    for attempt in range(retries + 1):
        try:
            return server.post(GENERATE, body)
        except TimeoutError:  # it is slow, and has the row: once more would be more of it
            raise
        except OSError as error:  # no answer, or one that says it failed
            if attempt == retries:
                raise
            logger.warning("%s; asking again, %d of %d.", error, attempt + 1, retries)
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


class _Told(NamedTuple):
    seen_ids: list[int]
    next_id: int
    next_logprob: float
    path: str | None


def _told(answer: dict[str, Any]) -> _Told:
    choice = answer["choices"][0]
    logprob = float(choice["logprobs"]["content"][0]["logprob"])
    parameters = answer.get("kv_transfer_params") or {}
    path = parameters.get("hidden_states_path")
    return _Told(list(answer["prompt_token_ids"]), int(choice["token_ids"][0]), logprob, path)


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")
