"""Distil across tokenizers without the trainer: align a completion by bytes, then the hybrid loss.

    python examples/two_tokenizers.py

Tokenizers are trained on the spot, and hidden states and heads are random: nothing is downloaded.
N_s, N_t completion tokens of student and teacher, G groups, D hidden size, V vocabulary (V_s, V_t).
"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gold_kernels import CompletionAligner, VocabOverlap, fused_linear_uld

TEXT = "Bees make honey, and honeybees make more honey than bumblebees make."
END = "<|end|>"


def make_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the more entries, the longer its tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    bpe.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def main() -> None:
    torch.manual_seed(0)
    student_tokenizer = make_tokenizer("Money makes hungry bees fly.", 268)
    teacher_tokenizer = make_tokenizer(TEXT, 290)
    aligner = CompletionAligner.from_tokenizers(student_tokenizer, teacher_tokenizer)
    overlap = VocabOverlap.from_tokenizers(student_tokenizer, teacher_tokenizer)

    student_ids = [*student_tokenizer(TEXT)["input_ids"], student_tokenizer.eos_token_id]
    teacher_ids = aligner.teacher_ids(student_ids)  # the same bytes, and its own end of turn
    alignment = aligner.align(student_ids, teacher_ids)
    sys.stdout.write(
        f"{len(student_ids)} and {len(teacher_ids)} tokens meet in {alignment.num_groups} groups\n"
        f"{overlap.report()}\n"
    )

    v_student, v_teacher = len(student_tokenizer), len(teacher_tokenizer)
    student_hidden = torch.randn(len(student_ids), 32, requires_grad=True)  # (N_s, D_s)
    student_head = torch.randn(v_student, 32, requires_grad=True)  # (V_s, D_s)
    teacher_hidden, teacher_head = torch.randn(len(teacher_ids), 48), torch.randn(v_teacher, 48)
    optimizer = torch.optim.Adam([student_hidden, student_head], lr=0.05)
    for step in range(100):
        loss = fused_linear_uld(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            alignment=alignment,
            overlap=overlap,
            beta=0.0,  # forward KL on the entries that both vocabularies have
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == 99:
            sys.stdout.write(f"step {step:2}: {loss.item():.4f} a group\n")


if __name__ == "__main__":
    main()
