"""What the server of a teacher has to be, seen before the run: its version, its tokenizer and
template, its weights.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from gold_trainer.config import GOLDConfig
from gold_trainer.loading import find_tokenizer, hub_options, load_config
from gold_trainer.rendering.collator import Processor
from gold_trainer.rendering.prompts import tokenizer_of
from gold_trainer.teachers.served.client import HiddenStates
from gold_trainer.teachers.served.likeliest import LikeliestTokens
from gold_trainer.teachers.served.start_line import longest, start_line
from gold_trainer.teachers.served.tail import Tail
from gold_trainer.writers.vllm.requests import GENERATE
from gold_trainer.writers.vllm.server import Refused, Server

logger = logging.getLogger(__name__)

OLDEST = "0.32"  # what was tried
FIELDS = "teacher_server_timeout", "teacher_request_timeout"
PROBE = "The sum of 17 and 25 is 42, and water boils at 100 degrees; caf\u00e9, \u5317\u4eac."
CHAT = [{"role": "user", "content": "What is 17 and 25?"}]
# How far the log-probability that the server gives may be from what norm and head make of its
# hidden states. In 16 bits a logit of 32 is rounded by up to 0.125; another layer, or another
# checkpoint, is off by nats.
MOST = {torch.float32: 0.01}
MOST_16_BITS = 0.25


class Served(NamedTuple):
    """One model of a server."""

    id: str  # the name to ask for
    root: str  # the checkpoint that it was started with
    max_model_len: int

    @classmethod
    def of(cls, answer: dict[str, Any]) -> "Served":
        first, *_ = (model for model in answer["data"] if not model.get("parent"))
        return cls(str(first["id"]), os.fspath(first["root"]), int(first["max_model_len"]))


def find_server(args: GOLDConfig) -> tuple[Server, Served]:
    """Waits for it; sets the checkpoint's name where the config has the address alone."""
    assert args.teacher_model_server_url is not None, "a server is the teacher"
    name = args.teacher_model_name_or_path
    line = start_line(args, name)
    server = Server(args.teacher_model_server_url, args.teacher_request_timeout, line, FIELDS)
    server.wait(args.teacher_server_timeout)
    server.check_version(OLDEST)
    server.require(GENERATE)
    what = "a model, its root and its max_model_len"
    served = server.read("/v1/models", server.get("/v1/models"), what, Served.of)
    if name is None:
        args.teacher_model_name_or_path = _readable(server, served, args)
    needed = longest(args)
    if needed is not None and served.max_model_len < needed:
        tokens = f"max_length={needed} tokens"
        if needed != args.max_length:
            tokens = f"{needed} tokens, one more than max_length"
        raise ValueError(
            f"GOLDTrainer: the vLLM server at {server.url} must take sequences of {tokens}, got "
            f"--max-model-len {served.max_model_len}; lower max_length, or start it with: {line}"
        )
    return server, served


def _readable(server: Server, served: Served, args: GOLDConfig) -> str:
    """The checkpoint by the name that the server has for it."""
    try:
        load_config(served.root, args.teacher_model_init_kwargs, args.teacher_model_revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"GOLDTrainer: the vLLM server at {server.url} must run a checkpoint that can be read "
            f"here too, got {served.root!r}, which cannot; set teacher_model_name_or_path to where "
            "it is."
        ) from error
    return served.root


def warn_of_another(
    server: Server, served: Served, name: str, parts: str = "norm and head"
) -> None:
    """name: the checkpoint, of which parts are read. Unless the server has it from the same folder,
    or id of the hub.
    """
    root = served.root
    are_folders = os.path.exists(name) and os.path.exists(root)
    if name == root or (are_folders and os.path.samefile(name, root)):
        return
    logger.warning(
        "GOLDTrainer: the vLLM server at %s was started with %s, and teacher_model_name_or_path is "
        "%s: %s are read from the latter, and layers are not compared.",
        server.url,
        root,
        name,
        parts,
    )


def check_teacher(states: HiddenStates, tail: Tail, processor: Processor, args: GOLDConfig) -> None:
    """ValueError for a server that runs another teacher than the checkpoint's, or sees its rows in
    other tokens.
    """
    _check_words(states.server, states.model, processor, args)
    _check_weights(states, tail, processor, str(args.teacher_model_name_or_path))


def check_likeliest(tokens: LikeliestTokens, processor: Processor, args: GOLDConfig) -> None:
    """ValueError for a server that sees rows in other tokens, or gives fewer of them. Which weights
    it has, it alone knows.
    """
    _check_words(tokens.server, tokens.model, processor, args)
    ids = tokenizer_of(processor)(PROBE)["input_ids"]
    with _not_refused(tokens.server, f"give prompt_logprobs of loss_top_k={tokens.k} tokens"):
        answer = tokens.ask(ids, [])
    tokens.rows(answer.entries[1:])


@contextmanager
def _not_refused(server: Server, what: str) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise ValueError(
            f"GOLDTrainer: the vLLM server at {server.url} must {what}, got a refusal ({error}); "
            f"start it with: {server.start_line}"
        ) from error


def _check_words(server: Server, model: str, processor: Processor, args: GOLDConfig) -> None:
    name = str(args.teacher_model_name_or_path)
    _check_tokenizer(server, model, processor, name)
    options = hub_options(args.teacher_model_init_kwargs, args.teacher_model_revision)
    _check_template(server, model, find_tokenizer(name, options), name)


def _check_tokenizer(server: Server, model: str, processor: Processor, name: str) -> None:
    """The server gets ids, and must mean the same by them as the tokenizer here."""
    expected = tokenizer_of(processor)(PROBE, add_special_tokens=False)["input_ids"]
    body = {"model": model, "prompt": PROBE, "add_special_tokens": False}
    got = _tokens(server, body)
    if got != expected:
        raise ValueError(
            f"GOLDTrainer: the vLLM server at {server.url} must have the tokenizer of the rows, "
            f"got {len(got)} tokens for {len(expected)} of {PROBE!r}, or others; serve {name}, "
            "or set use_uld_loss=True, the loss across tokenizers."
        )


def _check_template(server: Server, model: str, tokenizer: Any, name: str) -> None:
    """The server's chat template must be the checkpoint's: one of another kind, as a base model,
    differs in it.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        return
    try:
        expected = tokenizer.apply_chat_template(
            CHAT, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception:  # of a template that does not take so short a conversation
        return
    got = _tokens(server, {"model": model, "messages": CHAT, "add_generation_prompt": True})
    if list(got) != list(expected):
        raise ValueError(
            f"GOLDTrainer: the vLLM server at {server.url} must have the chat template of {name}, "
            f"got another, {len(got)} tokens for {len(expected)} of a question; start it with: "
            f"{server.start_line}"
        )


def _tokens(server: Server, body: dict[str, Any]) -> list[int]:
    with _not_refused(server, "turn a text into tokens"):
        answer = server.post("/tokenize", body)
    return server.read("/tokenize", answer, "tokens", lambda it: list(it["tokens"]))


@torch.no_grad()
def _check_weights(states: HiddenStates, tail: Tail, processor: Processor, name: str) -> None:
    """Norm and head of the checkpoint make of the server's hidden states what the server makes."""
    ids = tokenizer_of(processor)(PROBE)["input_ids"]
    with _not_refused(states.server, f"take a row of {len(ids)} tokens"):
        answer = states.ask(ids, [])
    ours = float(tail.log_probs(answer.hidden[-1:])[0, answer.next_id])
    if not abs(ours - answer.next_logprob) <= MOST.get(answer.hidden.dtype, MOST_16_BITS):
        raise ValueError(
            f"GOLDTrainer: the vLLM server at {states.server.url} must run {name} and keep what "
            f"its last layer makes, got the log-probability {answer.next_logprob:.3f} of a token "
            f"where norm and head of that checkpoint give {ours:.3f} of its last layer's states; "
            f"start it with: {states.server.start_line}"
        )
