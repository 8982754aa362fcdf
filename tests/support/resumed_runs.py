"""Runs that are compared to the last bit: their fields and the comparison."""

import torch

NUM_STEPS = 5  # of 2 micro-batches of 2 rows: checkpoint-2 is within the first epoch of 3 steps
FIELDS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": NUM_STEPS,
    "train_sampling_strategy": "random",
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "learning_rate": 1e-3,
    "max_grad_norm": 1.0,
    "max_completion_length": 6,
    "seed": 4,  # lmbda = 0.5: both policies before and after the checkpoint
}


def assert_same_run(actual, expected, first_step=0):
    """Losses and the policies' losses of every step, and all weights, to the last bit."""
    names = ("loss", "on_policy_loss", "off_policy_loss", "completion_length", "learning_rate")
    logs = [
        [
            {name: entry.get(name) for name in names}
            for entry in trainer.state.log_history
            if "loss" in entry and entry["step"] > first_step
        ]
        for trainer in (actual, expected)
    ]
    assert len(logs[1]) == NUM_STEPS - first_step
    assert logs[0] == logs[1]
    weights = expected.model.state_dict()
    for name, weight in actual.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
