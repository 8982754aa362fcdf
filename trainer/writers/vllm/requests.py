"""Prompts as a vLLM server takes them, and its answers as completions.

A prompt is sent with one placeholder a picture: the server's processor expands it. The answer has
the prompt as the server saw it, which has to be the one that the student learns from.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from gold_trainer.batches import Example
from gold_trainer.rendering.collator import Processor
from gold_trainer.rendering.prompts import prompt_ids, text_ids
from gold_trainer.writers.writer import Completion, Prompt, Sampling

GENERATE = "/inference/v1/generate"
# vLLM clamps a bias to 100. What remains of a banned token's probability is below exp(-70) at any
# temperature up to 1, unless its logit is that far above all others.
BAN = -100.0


def sampling_params(sampling: Sampling, banned_ids: Sequence[int]) -> dict[str, Any]:
    """vLLM's SamplingParams, as far as they are the same for every prompt."""
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "logprobs": 0,  # that of the sampled token alone
        "ignore_eos": True,  # the server's own idea of it: the ends are these
        "stop_token_ids": list(sampling.end_ids),
        "detokenize": bool(sampling.stop_strings),
    }
    if banned_ids:
        params["logit_bias"] = dict.fromkeys(banned_ids, BAN)
    if sampling.stop_strings:
        params["stop"] = list(sampling.stop_strings)
        params["include_stop_str_in_output"] = True
    return params | dict(sampling.generation_kwargs)


def request_body(
    prompt: Prompt, params: dict[str, Any], processor: Processor, model: str
) -> dict[str, Any]:
    example = prompt.example
    params = {
        **params,
        "n": prompt.num_completions,
        "max_tokens": prompt.room,
        "seed": prompt.seed,  # completion i gets seed + i
    }
    return body_of(model, unexpanded_ids(processor, example), example.images, params)


def body_of(
    model: str,
    token_ids: list[int],  # with one placeholder a picture
    images: Sequence[Image.Image],
    params: dict[str, Any],
) -> dict[str, Any]:
    body = {
        "model": model,
        "token_ids": token_ids,
        "return_token_ids": True,
        "sampling_params": params,
    }
    parts = [{"type": "image_url", "url": _picture_url(image)} for image in images]
    return body | ({"content_parts": parts} if parts else {})


def unexpanded_ids(processor: Processor, example: Example) -> list[int]:
    """Ids with one placeholder a picture; of a prompt that is cut, its last ones."""
    return _cut(text_ids(processor, example.prompt_text, example.adds_special_tokens), example)


def _cut(ids: list[int], example: Example) -> list[int]:
    return ids[-example.prompt_length :] if example.is_cut else ids


def refuse_videos(
    example: Example, does: str = "writes for", remedy: str = "set use_vllm=False"
) -> None:
    if example.videos:
        raise ValueError(
            f"{example.where}: vLLM {does} rows of text and pictures, got {len(example.videos)} "
            f"videos; {remedy}, or leave the row out."
        )


def check_room(prompt: Prompt, most: int, other: str) -> None:
    """vLLM would cut the completion in silence. most: --max-model-len; other: a remedy."""
    example = prompt.example
    if example.prompt_length + prompt.room > most:
        raise ValueError(
            f"{example.where}: prompt and completion must fit into vLLM's --max-model-len {most}, "
            f"got {example.prompt_length} tokens and room for {prompt.room}; set "
            f"max_length={most}, or {other}."
        )


def _picture_url(image: Image.Image) -> str:
    """The picture without loss, and hardly compressed: the server is near, and it takes a tenth of
    the time.
    """
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def read_completions(
    answer: dict[str, Any], prompt: Prompt, step: int, version: str
) -> list[Completion]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != prompt.num_completions:
        raise ValueError(
            f"{prompt.example.where}: the vLLM server must write {prompt.num_completions} "
            f"completions, got {len(choices)}; look into its log."
        )
    return [_completion(choice, prompt, step, version) for choice in choices]


def _completion(choice: dict[str, Any], prompt: Prompt, step: int, version: str) -> Completion:
    where = prompt.example.where
    versions = {span["version"] for span in choice["weight_versions"] or []}
    if choice["token_ids"] and versions != {version}:
        raise ValueError(
            f"{where}: the vLLM server must write with the weights of step {step}, version "
            f"{version!r}, got {', '.join(sorted(map(repr, versions))) or 'none'}; another run "
            "changes its weights: give each run a server of its own."
        )
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    if choice["finish_reason"] in ("abort", "error"):
        raise ValueError(
            f"{where}: the vLLM server must write to the end, got finish_reason="
            f"{choice['finish_reason']!r}; its log says why."
        )
    return Completion(choice["token_ids"], logprobs, step)


def check_expanded(
    seen: Sequence[int],  # by the server
    example: Example,
    processor: Processor,
    behind: Sequence[int] = (),  # the prompt
    side: str = "student",
) -> None:
    """ValueError where the server saw another prompt than this side has."""
    text, flag = example.prompt_text, example.adds_special_tokens
    expected = [*_cut(prompt_ids(processor, text, example.images, flag), example), *behind]
    if list(seen) == expected:
        return
    at = next((i for i, (a, b) in enumerate(zip(seen, expected, strict=False)) if a != b), None)
    at = min(len(seen), len(expected)) if at is None else at
    learns = "student learns from" if side == "student" else "teacher is shown"
    raise ValueError(
        f"{example.where}: the vLLM server must see the prompt that the {learns}, got "
        f"{len(seen)} tokens for {len(expected)}, others from token {at} on, with pictures of "
        f"{[image.size for image in example.images]}; serve the {side}'s own folder, with its "
        "processor's settings, and the same version of transformers."
    )
