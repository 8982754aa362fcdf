"""A loop with accelerate: several processes, mixed precision, accumulation over micro-batches.

    python examples/accelerate_loop.py              # or
    accelerate launch --num_processes 2 examples/accelerate_loop.py

The loss is computed inside of the model that accelerate wraps, so that DDP sees every weight used.
The models are tiny and random, so that nothing is downloaded. Put from_pretrained in their place.
B sequences, L positions, N scored rows, D hidden size.
"""

import sys

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from gold_kernels import fused_linear_jsd

VOCAB_SIZE, PROMPT_LENGTH, LENGTH = 1000, 8, 24
NUM_EPOCHS, ACCUMULATION, BATCH_SIZE = 40, 2, 4


def make_model(hidden_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


class Distillation(nn.Module):
    """A student whose forward pass is the loss. The teacher is no part of what is trained."""

    def __init__(self, student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> None:
        super().__init__()
        self.student = student
        self.teacher = (teacher,)  # in a tuple: neither wrapped nor saved

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        num_items: Tensor,  # (): what the sum is divided by
    ) -> Tensor:  # ()
        (teacher,) = self.teacher
        with torch.no_grad():
            teacher_hidden = teacher.model(input_ids).last_hidden_state
        student_hidden = self.student.model(input_ids).last_hidden_state
        rows = [
            hidden[:, PROMPT_LENGTH - 1 : -1].flatten(0, 1)  # position l predicts token l + 1
            for hidden in (student_hidden, teacher_hidden)
        ]
        return fused_linear_jsd(
            rows[0],
            self.student.lm_head.weight,
            rows[1],
            teacher.lm_head.weight,
            (1 / num_items).expand(rows[0].shape[0]),
        )


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    teacher = make_model(128).eval().to(accelerator.device)
    model = Distillation(make_model(64), teacher)
    data = DataLoader(
        torch.randint(VOCAB_SIZE, (BATCH_SIZE * ACCUMULATION * accelerator.num_processes, LENGTH)),
        batch_size=BATCH_SIZE,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, data, optimizer = accelerator.prepare(model, data, optimizer)

    for epoch in range(NUM_EPOCHS):
        total = torch.zeros((), device=accelerator.device)
        for input_ids in data:
            num_scored = torch.tensor(input_ids[:, PROMPT_LENGTH:].numel(), device=input_ids.device)
            # a mean of this micro-batch: accelerate divides by the accumulation, DDP by processes;
            # where micro-batches differ in length, pass the mean count of all of them
            with accelerator.accumulate(model):
                loss = model(input_ids, num_scored)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += accelerator.reduce(loss.detach(), "mean") / len(data)
        is_told = epoch % 10 == 0 or epoch == NUM_EPOCHS - 1
        if is_told and accelerator.is_main_process:
            sys.stdout.write(f"step {epoch:2}: JSD {total.item():.4f} nats a token\n")


if __name__ == "__main__":
    main()
