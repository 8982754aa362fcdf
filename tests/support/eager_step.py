"""What a training step must compute, the slow way: row by row, no padding, full logits, float64.

Written from the processors' own output, and without anything of trainer/.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from gold_kernels.jsd.reference import jsd_rows

# What follows the prompt where the assistant says {}, up to the token that ends the turn.
COMPLETIONS = {
    "qwen3_vl": "{}<|im_end|>",
    "qwen2_5_vl": "{}<|im_end|>",
    "lfm2_vl": "{}<|im_end|>",
    "smolvlm": " {}<end_of_utterance>",
    "idefics3": " {}<end_of_utterance>",
    "gemma3": "{}<end_of_turn>",
    "llava": " {} </s>",
    "qwen3": "{}<|im_end|>",
    "llama": "{}<|eot_id|>",
    "mllama": "{}<|eot_id|>",
    "paligemma": "{}<|eot_id|>",
    "granite_vision": "{}<|eot_id|>",
}
EXTENDED_WITH_ZEROS = ("token_type_ids", "mm_token_type_ids")
EXTENDED_BY_THE_LAST = ("cross_attention_mask", "image_attention_mask")


def completion_of(family: str, processor: Any, row: dict[str, Any]) -> list[int]:
    """Token ids of a row's answer, end of turn included."""
    tokenizer = getattr(processor, "tokenizer", processor)
    text = COMPLETIONS[family].format(row["messages"][-1]["content"])
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_inputs(processor: Any, row: dict[str, Any]) -> dict[str, Tensor]:
    """A row's prompt, pictures and videos as the processor makes it, without a second bos token."""
    tokenizer = getattr(processor, "tokenizer", processor)
    prompt = row["messages"][:-1]
    pictures = row.get("images") or None
    if row.get("videos"):
        parts = [{"type": "video", "video": video} for video in row["videos"]]
        parts += [{"type": "image", "image": picture} for picture in pictures or ()]
        parts.append({"type": "text", "text": prompt[0]["content"]})
        return dict(
            processor.apply_chat_template(
                [{"role": "user", "content": parts}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    if tokenizer is not processor:
        parts = [{"type": "image"} for _ in pictures or ()]
        parts.append({"type": "text", "text": prompt[0]["content"]})
        prompt = [{"role": "user", "content": parts}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    options = {"return_tensors": "pt", "add_special_tokens": not has_bos}
    if pictures:
        return dict(processor(text=[text], images=[pictures], **options))
    return dict(processor(text=[text], **options))


def scored_logits(model, inputs: dict[str, Tensor], completion_ids: list[int]) -> Tensor:
    """Logits (N, V) that predict the completion."""
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    ids = torch.tensor([completion_ids], dtype=torch.int64)
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in EXTENDED_WITH_ZEROS:
        if name in inputs:
            is_suffix = "labels" in inputs  # PaliGemma's causal tokens have type 1
            types = torch.full_like(ids, int(is_suffix))
            inputs[name] = torch.cat([inputs[name], types], dim=1)
    for name in EXTENDED_BY_THE_LAST:
        if name in inputs:
            last = inputs[name][:, -1:].expand(-1, ids.shape[1], *inputs[name].shape[2:])
            inputs[name] = torch.cat([inputs[name], last], dim=1)
    inputs.pop("labels", None)
    return model(**inputs).logits[0, length - 1 : -1]


def eager_step(
    student,
    teacher,
    processor: Any,
    rows: list[dict[str, Any]],
    completions: list[list[int]],
    *,
    beta: float = 0.5,
    row_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    weights: tuple[float, float] = (1.0, 0.0),
    token_weights: Callable[..., Tensor] | None = None,
    teacher_rows: list[dict[str, Any]] | None = None,  # as the teacher sees them
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over all completion tokens of the batch, and its gradient by parameter name.

    The loss is row_loss of student's and teacher's logits, else the JSD; weights are those of the
    loss and of the cross-entropy. token_weights gives the weights of a row's tokens from its place
    in the batch, the logits and the completion.
    """
    student, teacher = deepcopy(student).to(dtype), deepcopy(teacher).to(dtype)
    num_items = sum(map(len, completions))
    total = 0.0
    for place, (row, completion_ids) in enumerate(zip(rows, completions, strict=True)):
        inputs = prompt_inputs(processor, row)
        seen = inputs
        if teacher_rows is not None:
            seen = prompt_inputs(processor, teacher_rows[place])
        with torch.no_grad():
            teacher_logits = scored_logits(teacher, seen, completion_ids)[:, :vocab_size]
        student_logits = scored_logits(student, inputs, completion_ids)[:, :vocab_size]
        if row_loss is None:
            loss_rows = jsd_rows(student_logits, teacher_logits, beta=beta)
        else:
            loss_rows = row_loss(student_logits, teacher_logits)
        if token_weights is not None:
            own = token_weights(place, student_logits, teacher_logits, torch.tensor(completion_ids))
            loss_rows = loss_rows * own.detach()
        crossentropy = torch.nn.functional.cross_entropy(
            student_logits, torch.tensor(completion_ids), reduction="sum"
        )
        loss = (weights[0] * loss_rows.sum() + weights[1] * crossentropy) / num_items
        loss.backward()
        total += loss.item()
    gradients = {
        name: parameter.grad
        for name, parameter in student.named_parameters()
        if parameter.grad is not None
    }
    return total, gradients
