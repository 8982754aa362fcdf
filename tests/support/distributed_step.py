"""One process of test_distributed: two steps on fixed rows between two evaluations, weights and
losses from rank 0. Some rows have a view of the teacher's; what pictures tell weighs the tokens.

torchrun --nproc_per_node 2 -m support.rank SECONDS
    support.distributed_step OUT_DIR BATCH_SIZE ACCUMULATION
"""

import sys

from gold_trainer import GOLDConfig, GOLDTrainer
from support.rank import leave_state
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import losses_of


def main(output_dir: str, batch_size: int, accumulation: int) -> None:
    student, processor = tiny("qwen3_vl")
    rows = tiny_rows(8, images="mixed")
    rows[2]["teacher_images"] = rows[0]["images"]
    rows[5]["teacher_messages"] = [{"role": "user", "content": "It is red, as you know."}]
    trainer = GOLDTrainer(
        model=student,
        teacher_model=tiny("qwen3_vl", "teacher")[0],
        args=GOLDConfig(
            output_dir=output_dir,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            lmbda=0.0,
            token_weighting="picture_detail",
            max_length=256,
            max_completion_length=64,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    leave_state(trainer, output_dir, losses=losses_of(trainer), eval_losses=[before, after])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
