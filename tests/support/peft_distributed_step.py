"""One process of test_peft_distributed: three steps of a student that is its own teacher, between
two evaluations; weights and losses from rank 0.

torchrun --nproc_per_node 2 -m support.rank SECONDS
    support.peft_distributed_step OUT_DIR BATCH_SIZE ACCUMULATION
"""

import sys

import peft

from gold_trainer import GOLDConfig, GOLDTrainer
from support.rank import leave_state
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import FIELDS, losses_of


def main(output_dir: str, batch_size: int, accumulation: int) -> None:
    student, processor = tiny("qwen3_vl")
    rows = tiny_rows(8, images="mixed")
    # It changes the model from the start, so that there is something to learn.
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "qkv"],  # qkv: of the vision tower
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    fields = {
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": True,
        "max_steps": 3,
        "learning_rate": 0.5,
    }
    trainer = GOLDTrainer(
        model=student,
        args=GOLDConfig(output_dir=output_dir, **(FIELDS | fields)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
        peft_config=config,
    )
    model = trainer.model
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found = {"losses": losses_of(trainer), "eval_losses": [before, after]}
    leave_state(trainer, output_dir, **found, trained=trained, start=start)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
