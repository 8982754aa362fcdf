"""Requests to a vLLM server, and what its answers mean."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import requests
from packaging.version import InvalidVersion, Version

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

POLL_SECONDS = 1.0
# What an answer of 403 or 404 says of how the server was started.
MISSING: dict[str, str] = {
    "/inference/v1/generate": "--enable-scale-out",
    "/v1/load_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment",
}
OF_ALL = ("/version", "/v1/models", "/tokenize")  # however it was started
DEVELOPMENT = "VLLM_SERVER_DEV_MODE=1 in its environment"


class Refused(ValueError):
    """The server is there and does not do what it was asked for; the text is its own."""


@dataclass(frozen=True)
class Server:
    """One server. Methods may be called from several threads."""

    url: str
    timeout: float  # seconds for one request
    start_line: str  # what a shell starts it with
    # Fields of the two times, for messages: until it is healthy, and of one request.
    fields: tuple[str, str] = ("vllm_server_timeout", "vllm_request_timeout")

    def wait(self, seconds: float) -> None:
        """Until it is healthy."""
        end = time.monotonic() + seconds
        while True:
            reason = self._unhealthy(max(1.0, end - time.monotonic()))
            if reason is None:
                return
            if time.monotonic() + POLL_SECONDS > end:
                raise ConnectionError(
                    f"GOLDTrainer: a vLLM server is expected at {self.url}, got {reason} within "
                    f"{seconds:g} s ({self.fields[0]}); start it with: {self.start_line}"
                )
            time.sleep(POLL_SECONDS)

    def _unhealthy(self, seconds: float) -> str | None:
        try:
            status = _request("GET", f"{self.url}/health", timeout=min(10.0, seconds)).status_code
        except requests.RequestException as error:
            return f"no answer ({type(error).__name__})"
        return None if status == 200 else f"the answer {status}"

    def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]:
        try:
            return self._answer("GET", path, params=params)
        except Refused as error:
            raise ValueError(
                f"GOLDTrainer: the vLLM server at {self.url} must answer {path}, got a refusal "
                f"({error}); start it with: {self.start_line}"
            ) from error

    def post(
        self, path: str, body: Any = None, params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The answer's JSON; {} for one that is none. Refused for a request that the server takes
        for wrong.
        """
        return self._answer("POST", path, json=body, params=params)

    def read(self, path: str, answer: Any, what: str, reader: Callable[[Any], Found]) -> Found:
        """What the reader finds in an answer; ValueError where it has not what vLLM's has."""
        try:
            return reader(answer)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            got = " ".join(str(answer).split())[:200]
            raise ValueError(
                f"GOLDTrainer: the vLLM server at {self.url} must answer {path} with {what}, got "
                f"{got}; ask vLLM itself, without what stands before it, started with: "
                f"{self.start_line}"
            ) from error

    def check_version(self, oldest: str) -> None:
        answer = self.get("/version")
        version = self.read("/version", answer, "its version", lambda it: str(it["version"]))
        try:
            is_older = Version(version) < Version(oldest)
        except InvalidVersion:  # of a build from source
            logger.warning(
                "GOLDTrainer: the vLLM server at %s is of version %r, which cannot be compared; "
                "%s or newer is expected.",
                self.url,
                version,
                oldest,
            )
            return
        if is_older:
            raise ValueError(
                f"GOLDTrainer: the vLLM server at {self.url} must be of version {oldest} or newer, "
                f"got {version}; pip install -U vllm where it runs."
            )

    def require(self, path: str) -> None:
        """ValueError unless it answers a POST without a body by asking for one."""
        response = self._send("POST", path, json={})
        if response.status_code in (403, 404, 405):
            self.post(path, {})  # which says why

    def _send(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            return _request(method, self.url + path, timeout=self.timeout, **options)
        except requests.Timeout as error:
            raise TimeoutError(
                f"GOLDTrainer: the vLLM server at {self.url} must answer {path} within "
                f"{self.timeout:g} s ({self.fields[1]}), got nothing; raise it, or look into "
                "the server's log and start it again."
            ) from error
        except requests.RequestException as error:
            raise self._gone(path, type(error).__name__) from error

    def _answer(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self._send(method, path, **options)
        text = _message(response)
        if response.status_code == 401:
            raise ValueError(
                f"GOLDTrainer: the vLLM server at {self.url} must take requests without a key, got "
                f"401 of {path}; start it without --api-key, within a network of your own: "
                f"{self.start_line}"
            )
        if response.status_code in (403, 404, 405) and path in OF_ALL:
            raise ValueError(
                f"GOLDTrainer: a vLLM server is expected at {self.url}, got "
                f"{response.status_code} of {path}, which vLLM always has; start one with: "
                f"{self.start_line}"
            )
        if response.status_code in (403, 404) and path != "/v1/unload_lora_adapter":
            if "model" in text and "does not exist" in text:
                raise Refused(text)
            needed = MISSING.get(path, DEVELOPMENT)
            raise ValueError(
                f"GOLDTrainer: the vLLM server at {self.url} must have {path}, got "
                f"{response.status_code}; it was started without {needed}: start it with: "
                f"{self.start_line}"
            )
        if response.status_code == 429 or response.status_code >= 500:
            raise self._gone(path, f"{response.status_code}: {text}")
        if response.status_code != 200:
            raise Refused(text)
        try:
            answer = response.json() if response.content else {}
        except requests.JSONDecodeError:
            answer = {}  # some say in words that they have done it
        return answer if isinstance(answer, dict) else {}

    def _gone(self, path: str, reason: str) -> ConnectionError:
        return ConnectionError(
            f"GOLDTrainer: the vLLM server at {self.url} must answer {path}, got {reason}; it has "
            f"ended or failed, its log says why: start it again with: {self.start_line}"
        )


def _request(method: str, url: str, **options: Any) -> requests.Response:
    """Ask on a connection of its own, as one that was kept may be closed by the time it is needed,
    and past the proxies of the environment, which know no address of this machine.
    """
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, **options)


def _message(response: requests.Response) -> str:
    """What a refusal says, in one line."""
    if response.status_code == 200:
        return ""
    try:
        body = response.json()
    except requests.JSONDecodeError:
        return " ".join(response.text.split())[:300]
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]
