"""A teacher whose weights accelerate keeps elsewhere teaches as one that is here."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import losses_of, make_trainer

CPU = torch.device("cpu")


def offloaded(place, folder, size):
    model = tiny("llava", size)[0]  # its head is not tied
    if place == "cpu":
        cpu_offload(model, execution_device=CPU)
    else:
        disk_offload(model, str(folder), execution_device=CPU)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


def train(folder, **options):
    trainer = make_trainer(folder, tiny_rows(4, images=1), "llava", **options)
    trainer.train()
    return losses_of(trainer)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("seq_kd", [False, True])
def test_an_offloaded_teacher_gives_the_loss_of_one_in_memory(place, seq_kd, tmp_path):
    expected = train(tmp_path / "here", seq_kd=seq_kd)
    teacher = offloaded(place, tmp_path / "weights", "teacher")
    assert train(tmp_path / "away", teacher=teacher, seq_kd=seq_kd) == expected
    others = [p for name, p in teacher.named_parameters() if not name.startswith("lm_head")]
    assert all(parameter.is_meta for parameter in others)


def test_an_offloaded_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^GOLDTrainer: the student's weights must be in memory"):
        train(tmp_path / "run", student=offloaded("cpu", None, "student"))
