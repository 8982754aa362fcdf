"""A LightningModule: Lightning's loop, devices, precision and accumulation, with the fused loss.

    pip install lightning
    python examples/lightning_module.py

Lightning runs training_step inside of the module that it wraps, so that DDP sees every weight used.
The models are tiny and random, so that nothing is downloaded. Put from_pretrained in their place.
B sequences, L positions, N scored rows, D hidden size.
"""

import lightning
import torch
from torch import Tensor
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


class Distillation(lightning.LightningModule):
    def __init__(self, student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> None:
        super().__init__()
        self.student = student
        self.teacher = (teacher.eval(),)  # in a tuple: neither wrapped, nor trained, nor saved

    def on_fit_start(self) -> None:
        self.teacher[0].to(self.device)

    def training_step(self, input_ids: Tensor, batch_idx: int) -> Tensor:  # (B, L) -> ()
        (teacher,) = self.teacher
        with torch.no_grad():
            teacher_hidden = teacher.model(input_ids).last_hidden_state
        student_hidden = self.student.model(input_ids).last_hidden_state
        rows = [
            hidden[:, PROMPT_LENGTH - 1 : -1].flatten(0, 1)  # position l predicts token l + 1
            for hidden in (student_hidden, teacher_hidden)
        ]
        # a mean of this micro-batch: Lightning divides by the accumulation, DDP by processes
        loss = fused_linear_jsd(
            rows[0], self.student.lm_head.weight, rows[1], teacher.lm_head.weight
        )
        self.log("jsd", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        if self.current_epoch % 10 == 0 or self.current_epoch == NUM_EPOCHS - 1:
            jsd = self.trainer.callback_metrics["jsd"]
            self.print(f"step {self.current_epoch:2}: JSD {jsd.item():.4f} nats a token")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    lightning.seed_everything(0)
    module = Distillation(make_model(64), make_model(128))
    rows = torch.randint(VOCAB_SIZE, (BATCH_SIZE * ACCUMULATION, LENGTH))
    trainer = lightning.Trainer(
        max_epochs=NUM_EPOCHS,
        accumulate_grad_batches=ACCUMULATION,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=BATCH_SIZE))


if __name__ == "__main__":
    main()
