"""Labels into a model by a plain loop, and its greedy answers by stock generate.

What came before distillation: the teacher's whole training, and the student's. A GOLDTrainer would
do, and would spend most of a small model's step on pictures that the loop keeps on the device.

N pictures, B of a batch, L_p tokens of the longest prompt, L_a of the longest answer and its end.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from quality.pictures import DEVIATION, MEAN, Pictures
from quality.scales import Schooling

IGNORED = -100
MOST_NEW_TOKENS = 12
ANSWERED = 1000  # rows at a time


def prompt_of(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


class Lessons(NamedTuple):
    """Pictures with question and answer as one model reads them, on its device."""

    pixels: Tensor  # (N, 3, SIZE, SIZE) of 8 bits
    prompt_ids: Tensor  # (questions, L_p), padded on the left
    prompt_mask: Tensor
    question: Tensor  # (N,) which of them
    answer_ids: Tensor  # (N, L_a), IGNORED behind the end token
    pad_token_id: int

    @classmethod
    def of(cls, pictures: Pictures, processor: Any, device: torch.device) -> "Lessons":
        tokenizer = processor.tokenizer
        questions = list(dict.fromkeys(pictures.question))
        texts = [
            processor.apply_chat_template(prompt_of(q), tokenize=False, add_generation_prompt=True)
            for q in questions
        ]
        picture = Image.fromarray(pictures.picture[0])
        prompts = processor(
            text=texts,
            images=[[picture]] * len(texts),
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        answers = tokenizer(pictures.answer, add_special_tokens=False)["input_ids"]
        answer_ids = torch.full((len(answers), max(map(len, answers)) + 1), IGNORED)
        for row, ids in enumerate(answers):
            answer_ids[row, : len(ids) + 1] = torch.tensor([*ids, tokenizer.eos_token_id])
        places = {question: place for place, question in enumerate(questions)}
        channels_first = np.ascontiguousarray(pictures.picture.transpose(0, 3, 1, 2))
        return cls(
            torch.from_numpy(channels_first).to(device),
            prompts["input_ids"].to(device),
            prompts["attention_mask"].to(device),
            torch.tensor([places[question] for question in pictures.question], device=device),
            answer_ids.to(device),
            tokenizer.pad_token_id,
        )

    def __len__(self) -> int:
        return len(self.question)

    def prompts(self, rows: Tensor, model: Any) -> dict[str, Tensor]:  # (B,)
        """What generate takes."""
        pixels = (self.pixels[rows].float() / 255 - MEAN) / DEVIATION
        if model.config.model_type == "idefics3":  # a row may have several pictures
            pixels = pixels[:, None]
        which = self.question[rows]
        return {
            "input_ids": self.prompt_ids[which],
            "attention_mask": self.prompt_mask[which],
            "pixel_values": pixels,
        }

    def answered(self, rows: Tensor, model: Any) -> dict[str, Tensor]:  # (B,)
        """What forward takes, with labels."""
        inputs, answers = self.prompts(rows, model), self.answer_ids[rows]
        is_answer = answers != IGNORED
        ids = answers.masked_fill(~is_answer, self.pad_token_id)
        no_labels = torch.full_like(inputs["input_ids"], IGNORED)
        return {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], ids], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], is_answer.long()], 1),
            "labels": torch.cat([no_labels, answers], 1),
        }


def bfloat16(device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def school(model: Any, lessons: Lessons, how: Schooling, seed: int) -> list[float]:
    """Train in place on the answers' cross-entropy; losses of the steps taken."""
    device = lessons.pixels.device

    def loss_of(rows: Tensor) -> Tensor:
        with bfloat16(device):
            return model(**lessons.answered(rows, model), use_cache=False).loss

    return train(model.to(device), loss_of, len(lessons), how, seed)


def train(
    model: Any,
    loss_of: Callable[[Tensor], Tensor],  # of rows (B,)
    number: int,  # of rows
    how: Schooling,
    seed: int,
) -> list[float]:
    """Train in place; gives losses of the steps taken."""
    model.train()
    device = model.device
    is_cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), how.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=is_cuda
    )
    losses: list[Tensor] = []
    started = time.perf_counter()
    for rows in batches(number, how, seed, device):
        seconds = time.perf_counter() - started
        share = max(len(losses) / how.steps, seconds / how.most_seconds)
        if losses and share >= 1:
            break
        warm = min(1.0, 20 * (len(losses) + 1) / how.steps)
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * warm * (1 + math.cos(math.pi * min(1, share))) / 2
        loss = loss_of(rows)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0, foreach=is_cuda)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    return torch.stack(losses).tolist()


def curve_of(losses: Sequence[float]) -> list[float]:
    """Means of a hundred steps each."""
    parts = (losses[i : i + 100] for i in range(0, len(losses), 100))
    return [round(sum(part) / len(part), 2) for part in parts]


def batches(number: int, how: Schooling, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Rows of each step: all of them in a new order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(how.steps):
        while len(order) < how.batch_size:
            order = torch.cat([order, torch.randperm(number, generator=generator)])
        yield order[: how.batch_size].to(device)
        order = order[how.batch_size :]


@torch.no_grad()
def answers_of(model: Any, lessons: Lessons, tokenizer: Any) -> list[str]:
    """Greedy, by stock generate."""
    model.eval()
    device, texts = lessons.pixels.device, []
    for rows in torch.arange(len(lessons), device=device).split(ANSWERED):
        inputs = lessons.prompts(rows, model)
        ids = model.generate(**inputs, max_new_tokens=MOST_NEW_TOKENS, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def accuracy(answers: Sequence[str], pictures: Pictures) -> dict[str, float]:
    """Share of answers that are the right text, of all and of each kind."""
    is_right = np.array([a == b for a, b in zip(answers, pictures.answer, strict=True)])
    kinds = np.array(pictures.kind)
    by_kind = {kind: float(is_right[kinds == kind].mean()) for kind in dict.fromkeys(pictures.kind)}
    return {"accuracy": float(is_right.mean()), **by_kind}
