"""cuDNN's attention is for micro-batches of one shape; outside of a step its flag is as it was."""

from copy import deepcopy

import pytest
import torch

from gold_trainer.speed import attention
from gold_trainer.writers import Prompt
from support.tiny_models import tiny_rows, with_lengths
from support.trainer_cases import losses_of, make_trainer


def seen_in(folder, lengths, *, is_on, **fields):
    """For each micro-batch, whether cuDNN's attention may run, and under which tag is compiled."""
    rows = with_lengths([deepcopy(tiny_rows(1)[0]) for _ in lengths], lengths)
    fields["train_sampling_strategy"] = "sequential"
    fields = {"per_device_train_batch_size": 2, "max_steps": len(rows) // 2, **fields}
    trainer = make_trainer(folder, rows, "qwen3", eval_rows=rows[:2], **fields)
    trainer.fast.attention.is_on = is_on
    compute_loss, seen = trainer.compute_loss, []

    def watched(*args, **kwargs):
        tag = torch.compiler.config.cache_key_tag
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        assert (attention.TAG in tag) != seen[-1]
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert len(losses_of(trainer)) == len(seen)
    trainer.evaluate()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert attention.TAG not in torch.compiler.config.cache_key_tag
    return seen


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5, 5, 5, 5], [True, True]),
        ([5, 5, 9, 9, 5, 5], [True, False, True]),
        ([5, 9, 5, 5, 7, 9], [False, False, False]),  # the first has padding
    ],
)
def test_the_first_shape_alone_has_cudnn(lengths, expected, tmp_path):
    assert seen_in(tmp_path, lengths, is_on=True) == [*expected, False], "the last: an evaluation"


def test_without_a_gpu_nothing_is_decided_in_a_step(tmp_path):
    assert seen_in(tmp_path, [5, 9, 5, 5], is_on=False) == [True, True, False]


def test_a_flag_of_the_user_stays_as_it_was():
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with attention.without_cudnn():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_prompts_are_read_without_it(tmp_path):
    rows = [{**row, "messages": row["messages"][:1]} for row in tiny_rows(3)]
    trainer = make_trainer(tmp_path, rows, "qwen3", lmbda=1.0, max_length=None)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    prompts = [Prompt(e.unanswered(), 4, 1000 * e.index) for e in batch.examples]
    seen = []
    hook = trainer.model.register_forward_pre_hook(
        lambda *call: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    writer = trainer.rollouts.writers["student"]
    list(writer.complete(prompts, trainer.rollouts.sampling["student"]))
    hook.remove()
    assert seen and not seen[0] and torch.backends.cuda.cudnn_sdp_enabled()
