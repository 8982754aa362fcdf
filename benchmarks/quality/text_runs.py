"""One run of the table of text: a plain loop with a loss of gold_kernels, on rows of tokens that
stay on the device.

B rows of L tokens, N = B (L - 1) scored ones, D hidden size, V vocabulary.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers import eager_jsd
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from gold_kernels import fused_linear_loss, fused_linear_uld
from gold_kernels.losses import JSD, make_loss
from quality import weights
from quality.scales import Schooling, TextScale, TextSize
from quality.schooling import bfloat16, curve_of, train
from quality.text_rows import LOSSES, Case


def build_model(size: TextSize, vocabulary: int, length: int, seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // size.head_dim,
        num_key_value_heads=size.hidden // size.head_dim,
        head_dim=size.head_dim,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


class FourBits(nn.Module):
    """A weight as 15 multiples of a scale for each group of a row, as symmetric integers of 4 bits
    without the lowest have them; the gradient goes straight through.
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, weight: Tensor) -> Tensor:  # (out, in)
        groups = weight.detach().unflatten(1, (-1, self.group_size))
        scales = groups.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 7
        rounded = ((groups / scales).round() * scales).flatten(1)
        return weight + (rounded - weight.detach())


def quantised_(model: LlamaForCausalLM, group_size: int) -> LlamaForCausalLM:
    """Linear layers of the decoder; the head, tied to the embeddings, keeps its bits."""
    for layer in list(model.model.layers.modules()):
        if isinstance(layer, nn.Linear):
            register_parametrization(layer, "weight", FourBits(group_size))
    return model


@dataclass
class TextBench:
    """What the runs of one process share."""

    folder: Path
    scale: TextScale
    device: torch.device
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> dict[str, Tensor]:
        """part -> rows of L tokens; bytes_per_token of what is held out."""
        with np.load(self.folder / "tokens.npz") as file:
            return {name: torch.from_numpy(file[name]).to(self.device) for name in file}

    @cached_property
    def sources(self) -> str:
        return (self.folder / "sources.txt").read_text(encoding="utf-8")

    def model(self, name: str, *, is_fresh: bool = False) -> LlamaForCausalLM:
        """teacher, small or int4, in float32 as they are before every run."""
        model = self._build(name)
        if not is_fresh:
            model.load_state_dict(self.state("small" if name == "small" else "teacher"))
        if name == "int4":
            quantised_(model, self.scale.group_size)
        return model.to(self.device)

    def state(self, name: str) -> dict[str, Tensor]:
        """What was kept, read once."""
        if name not in self.states:
            path = self.folder / f"{name}.pt"
            self.states[name] = torch.load(path, map_location=self.device, weights_only=True)
        return self.states[name]

    def _build(self, name: str) -> LlamaForCausalLM:
        scale, is_small = self.scale, name == "small"
        size = scale.student if is_small else scale.teacher
        if not scale.weights:
            return build_model(size, scale.vocabulary, scale.length, int(is_small))
        config = LlamaConfig.from_pretrained(self.folder)
        if is_small:
            config.num_hidden_layers = size.layers
        with self.device:  # random weights of so many take seconds of a CPU
            return LlamaForCausalLM(config)

    @cached_property
    def teacher(self) -> LlamaForCausalLM:
        return self.model("teacher").bfloat16().eval()

    def school_teacher(self) -> dict[str, Any]:
        if self.scale.weights:
            started = time.perf_counter()
            model = weights.load(Path(self.scale.weights)).to(self.device)
            return self._keep("teacher", model, Schooling(0, 0, 0.0), [], started)
        rows = torch.cat([self.tokens["teacher"], self.tokens["distil"]])
        return self._school("teacher", rows, self.scale.teacher_schooling)

    def school_student(self, name: str) -> dict[str, Any]:
        return self._school(name, self.tokens["distil"], self.scale.student_schooling)

    def _school(self, name: str, rows: Tensor, how: Schooling) -> dict[str, Any]:
        """Train on what follows in the text, from fresh weights or the teacher's layers."""
        started = time.perf_counter()
        model = self.model(name, is_fresh=True)
        if self.scale.weights:
            weights.thin_(model, self.model("teacher"))
        losses = self.train(model, rows, how, Case(name, "labels", "", "yes"))
        return self._keep(name, model, how, losses, started)

    def _keep(
        self, name: str, model: Any, how: Schooling, losses: list[float], started: float
    ) -> dict[str, Any]:
        """Weights, how they came about and what they know, for all processes."""
        torch.save(model.state_dict(), self.folder / f"{name}.pt")
        seconds = time.perf_counter() - started
        numbers = {
            **{"parameters": model.num_parameters(), "steps": len(losses), "seconds": seconds},
            **{"batch_size": how.batch_size, "learning_rate": how.learning_rate},
            "tokens": len(losses) * how.batch_size * (self.scale.length - 1),
            **self.grade(model),
        }
        (self.folder / f"{name}.json").write_text(json.dumps(numbers), encoding="utf-8")
        return numbers | {"curve": curve_of(losses)}

    def kept(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def of_every_row(self) -> dict[str, Any]:
        return {"teacher_perplexity": self.kept("teacher")["perplexity"], "text": self.sources}

    def run(self, case: Case) -> dict[str, Any]:
        if case.loss == "teacher":
            return self.kept("teacher")
        if case.loss == "before" and case.student == "small":
            return self.kept("small")
        model = self.model(case.student)
        if case.loss == "before":
            return {"parameters": model.num_parameters(), "steps": 0, **self.grade(model)}
        started = time.perf_counter()
        is_int4 = case.student == "int4"
        scale = self.scale
        rate = case.rate * (scale.int4_learning_rate if is_int4 else scale.learning_rate)
        how = Schooling(scale.int4_steps if is_int4 else scale.steps, scale.batch_size, rate)
        losses = self.train(model, self.tokens["distil"], how, case)
        seconds = time.perf_counter() - started  # train's last act reads the losses
        tokens = len(losses) * how.batch_size * (self.scale.length - 1)
        numbers = {"seconds": seconds, "tokens": tokens, "parameters": model.num_parameters()}
        return numbers | {"learning_rate": rate, "steps": len(losses), **self.grade(model)}

    def rehearse(self, student: str) -> dict[str, Any]:
        """A step of each loss, so that kernels are compiled."""
        started = time.perf_counter()
        fresh = self.model("teacher", is_fresh=True).bfloat16()
        for name in LOSSES:
            case = Case("small", name, "precise", "yes")
            how = Schooling(1, self.scale.batch_size, 1e-4)
            self.train(self.model("small", is_fresh=True), self.tokens["distil"], how, case, fresh)
        return {"seconds": time.perf_counter() - started}

    def train(
        self, model: Any, rows: Tensor, how: Schooling, case: Case, teacher: Any = None
    ) -> list[float]:
        """Train in place; gives losses of the steps taken."""

        def loss_of(chosen: Tensor) -> Tensor:
            return self.loss(model, rows[chosen].long(), case, teacher)

        return train(model, loss_of, len(rows), how, case.seed)

    def sides(self, model: Any, ids: Tensor, teacher: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        """((student's hidden states (N, D_s) and head (V, D_s), the teacher's), labels (N,))."""
        with bfloat16(self.device):
            hidden = model.model(ids, use_cache=False).last_hidden_state
        with torch.no_grad():
            teacher_hidden = teacher.model(ids, use_cache=False).last_hidden_state
        tensors = (hidden[:, :-1].flatten(0, 1), model.lm_head.weight)
        tensors += (teacher_hidden[:, :-1].flatten(0, 1), teacher.lm_head.weight)
        return tuple(t.bfloat16() for t in tensors), ids[:, 1:].flatten()

    def loss(self, model: Any, ids: Tensor, case: Case, teacher: Any) -> Tensor:
        if case.loss == "labels":
            with bfloat16(self.device):
                logits = model(ids, use_cache=False).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        tensors, labels = self.sides(model, ids, teacher or self.teacher)
        if case.precision == "eager_bf16":
            return eager_jsd(*tensors, LOSSES[case.loss][1]["beta"])
        name, numbers = LOSSES[case.loss]
        options: dict[str, Any] = {"labels": labels} if case.crossentropy == "yes" else {}
        if case.precision == "fast":
            options["logits_dtype"] = torch.bfloat16
        if name == "uld":
            return fused_linear_uld(*tensors, **options)
        return fused_linear_loss(make_loss(name, **numbers), *tensors, **options)

    @torch.no_grad()
    def grade(self, model: Any) -> dict[str, float]:
        """Numbers on held-out text: perplexity of a token, its bits a byte, how often the likeliest
        token is the teacher's, and KL(P || Q) in nats.
        """
        sums: dict[str, Tensor] = {}
        number = 0
        for ids in self._held_out():
            tensors, labels = self.sides(model, ids, self.teacher)
            _, values = fused_linear_loss(JSD(0.0), *tensors, labels=labels, return_metrics=True)
            number += len(labels)
            for name in ("cross_entropy", "top1_agreement", "forward_kl"):
                sums[name] = sums.get(name, 0) + values[name].double().sum()
        means = {name: (total / number).item() for name, total in sums.items()}
        nats = means["cross_entropy"]
        return {
            "perplexity": math.exp(nats),
            "bits_per_byte": nats / math.log(2) / self.tokens["bytes_per_token"].item(),
            "agreement": means["top1_agreement"],
            "kl": means["forward_kl"],
        }

    def _held_out(self) -> Iterator[Tensor]:
        rows = self.tokens["held_out"][: self.scale.held_out]
        return (part.long() for part in rows.split(self.scale.batch_size))
