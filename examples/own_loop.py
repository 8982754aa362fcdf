"""A training loop of your own: a student learns what its teacher predicts, without full logits.

    python examples/own_loop.py

The models are tiny and random, so that nothing is downloaded. Put from_pretrained in their place.
B sequences, L positions, N scored rows, D hidden size, V vocabulary.
"""

import sys

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from gold_kernels import fused_linear_jsd

VOCAB_SIZE, PROMPT_LENGTH, LENGTH = 1000, 8, 24
NUM_STEPS, NUM_MICRO_BATCHES, BATCH_SIZE = 40, 2, 4


def make_model(hidden_size: int, num_layers: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
    )
    return Qwen3ForCausalLM(config)


def scored_hidden(
    model: Qwen3ForCausalLM,
    input_ids: Tensor,  # (B, L)
    is_scored: Tensor,  # (B, L) bool: tokens of the completion
) -> Tensor:  # (N, D)
    """Hidden states that predict a scored token: the head is left to the loss."""
    hidden = model.model(input_ids).last_hidden_state  # (B, L, D)
    return hidden[:, :-1][is_scored[:, 1:]]  # position l predicts token l + 1


def main() -> None:
    torch.manual_seed(0)
    teacher, student = make_model(128, 3).eval(), make_model(64, 2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    batches = [torch.randint(VOCAB_SIZE, (BATCH_SIZE, LENGTH)) for _ in range(NUM_MICRO_BATCHES)]
    is_scored = (torch.arange(LENGTH) >= PROMPT_LENGTH).expand(BATCH_SIZE, LENGTH)
    num_items = NUM_MICRO_BATCHES * is_scored.sum()  # of all micro-batches (and ranks) of a step

    for step in range(NUM_STEPS):
        total = torch.zeros(())
        for input_ids in batches:
            with torch.no_grad():
                teacher_hidden = scored_hidden(teacher, input_ids, is_scored)
            student_hidden = scored_hidden(student, input_ids, is_scored)
            loss = fused_linear_jsd(
                student_hidden,
                student.lm_head.weight,
                teacher_hidden,
                teacher.lm_head.weight,
                (1 / num_items).expand(student_hidden.shape[0]),  # the mean, in parts
                beta=0.5,
            )
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == NUM_STEPS - 1:
            sys.stdout.write(f"step {step:2}: JSD {total.item():.4f} nats a token\n")


if __name__ == "__main__":
    main()
