"""A teacher that sees other pictures or another context than the student, behind which stands the
same completion: the step equals the eager float64 step with two prompts.
"""

from copy import deepcopy

import pytest
from peft import LoraConfig

from gold_trainer import GOLDConfig, GOLDTrainer
from support.cache_cases import run_of, save_pair, save_rows
from support.cross_cases import (
    assert_step_is_eager,
    make_sides,
)
from support.eager_step import completion_of, eager_step
from support.teacher_views import hinted, views
from support.tiny_models import tiny, tiny_picture
from support.trainer_cases import (
    FIELDS,
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
    make_trainer,
    record_completions,
)


def trainer_of(folder, rows, family, **fields):
    recorder = GradientRecorder()
    fields = {"per_device_train_batch_size": len(rows), "callbacks": [recorder]} | fields
    return make_trainer(folder, rows, family, **fields), recorder


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3"])
def test_off_policy_step_and_evaluation_equal_the_eager_step(family, tmp_path):
    student, processor = tiny(family)
    rows, seen = views(family)
    completions = [completion_of(family, processor, row) for row in rows]
    trainer, recorder = trainer_of(
        tmp_path, rows, family, student=student, eval_rows=rows, per_device_eval_batch_size=5
    )
    teacher = tiny(family, "teacher")[0]
    expected, gradients = eager_step(
        student, teacher, processor, rows, completions, teacher_rows=seen
    )
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert evaluated == pytest.approx(expected, rel=1e-5)
    assert_equal_gradients(recorder.gradients, gradients, 1e-4)


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_what_either_side_writes_stands_behind_both_prompts(writer, tmp_path):
    """The teacher is prompted with its own view, the student with its own."""
    student, processor = tiny("qwen3_vl")
    before = deepcopy(student)
    rows, seen = views("qwen3_vl")
    fields = {"lmbda": 1.0} if writer == "student" else {"seq_kd": True}
    trainer, recorder = trainer_of(tmp_path, rows, "qwen3_vl", student=student, **fields)
    prompts, complete = [], trainer.rollouts.writers[writer].complete

    def recorded(given, sampling):
        prompts.extend(prompt.example for prompt in given)
        return complete(given, sampling)

    trainer.rollouts.writers[writer].complete = recorded
    sampled = record_completions(trainer, writer)
    trainer.train()
    own = rows if writer == "student" else seen
    assert [len(e.images) for e in prompts] == [len(row["images"]) for row in own]
    assert ["It is red." in e.prompt_text for e in prompts] == [writer == "teacher"] * 2 + 3 * [
        False
    ]
    teacher = tiny("qwen3_vl", "teacher")[0]
    expected, gradients = eager_step(before, teacher, processor, rows, sampled, teacher_rows=seen)
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert_equal_gradients(recorder.gradients, gradients, 1e-4)


def test_across_families_the_teacher_sees_its_view_in_its_own_template(tmp_path):
    rows, seen = views("lfm2_vl")
    sides, eager = make_sides("lfm2_vl", "qwen3_vl"), {"teacher_rows": seen}
    assert_step_is_eager(tmp_path, sides, rows, eager=eager)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_student_that_is_its_own_teacher_learns_from_the_hint_alone(tmp_path):
    """The adapter begins with nothing: without a hint both sides are one."""
    rows, _ = views("qwen3")
    losses = []
    for some in (rows[2:4], rows[:2]):
        trainer = GOLDTrainer(
            model=tiny("qwen3")[0],
            args=GOLDConfig(output_dir=str(tmp_path), **FIELDS),
            train_dataset=some,
            processing_class=tiny("qwen3")[1],
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
        )
        trainer.train()
        losses.append(losses_of(trainer)[0])
    assert losses[0] < 1e-6 < 1e-3 < losses[1]


WEIGHTED = {"token_weighting": "support.weightings:unsure"}


def test_a_cache_knows_what_the_teacher_sees(tmp_path, capsys):
    """Its loss is that of a teacher that is asked, log-probabilities as well; another hint or
    picture is another row.
    """
    pair = save_pair(tmp_path)
    rows, _ = views("qwen3_vl")
    save_rows(tmp_path / "rows.jsonl", rows)
    cache = pair.cache("cache", "--dataloader_num_workers=1")
    live, cached = (
        run_of(pair, tmp_path / f"run{i}", rows=rows, **fields)[0]
        for i, fields in enumerate((WEIGHTED, WEIGHTED | {"teacher_cache": str(cache)}))
    )
    assert cached == pytest.approx(live, rel=1e-5)
    for place, column, value, part in (
        (0, "teacher_messages", hinted(rows[0], "It is blue. ")[:1], "prompt"),
        (2, "teacher_images", [tiny_picture(9)], ".*pictures or videos"),
    ):
        others = [dict(row) for row in rows]
        others[place][column] = value
        with pytest.raises(ValueError, match=f"row {place}: .* has changed since .*{part}"):
            run_of(pair, tmp_path / "other", rows=others, teacher_cache=str(cache))
