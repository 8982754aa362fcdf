"""Caches that do not fit a run, and runs that cannot have one, end in one sentence."""

import json
import shutil

import pytest

from gold_trainer import GOLDConfig
from support.cache_cases import run_of, save_in_hub, save_rows


def refusal(pair, **options):
    with pytest.raises(ValueError) as caught:
        run_of(
            pair, pair.folder / "run", **{"teacher_cache": str(pair.folder / "cache"), **options}
        )
    message = " ".join(str(caught.value).split())
    assert str(pair.folder / "cache") in message or "teacher_cache" in message
    assert ("; " in message or ": " in message) and message.endswith(".")
    return message


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 100}, "was made with max_length 256, this run has 100: set max_length as"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            "was made with chat_template_kwargs",
        ),
        ({"bf16": True}, "was made with precision no, this run has bf16: set bf16 or fp16 as"),
        (
            {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
            'was made with teacher_model_init_kwargs {}, this run has {"dtype": "bfloat16"}',
        ),
        (
            {"on_long_prompt": "truncate_left"},
            "was made with prompts_cut_to None, this run has 192: on_long_prompt, max_length and",
        ),
        ({"teacher_cache_form": "head_means", "beta": 0.0}, "holds teacher_cache_form=hidden, th"),
    ],
)
def test_a_run_with_another_setting_is_refused_by_its_name(made, fields, message):
    assert message in refusal(made, **fields)


def test_another_chat_template_tokenizer_or_teacher_is_refused_by_its_name(pair):
    student, teacher = pair.folder / "student", pair.folder / "teacher"
    template = student / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text + "{# another #}")
    assert "was made with chat_template " in refusal(pair)
    template.write_text(text)
    weights = bytearray(pair.weights.read_bytes())
    for i in range(len(weights) // 2, len(weights)):  # as another step of training would
        weights[i] ^= 1
    pair.weights.write_bytes(weights)
    assert "was made with weights" in refusal(pair)
    assert "the teacher has other weights" in refusal(pair)
    shutil.rmtree(teacher)
    run_of(pair, pair.folder / "run", teacher_cache=str(pair.folder / "cache"))  # gone: no matter


def test_a_teacher_of_the_hub_is_known_by_its_commit(pair):
    cache_dir = pair.folder / "hub"
    options = {
        "teacher_model_name_or_path": save_in_hub(pair, cache_dir, "a" * 40),
        "teacher_model_init_kwargs": {"cache_dir": str(cache_dir)},
    }
    fields = options | {"teacher_model_init_kwargs": json.dumps({"cache_dir": str(cache_dir)})}
    cache = pair.cache("cache_of_hub", **fields)
    options["teacher_cache"] = str(cache)
    run_of(pair, pair.folder / "run", **options)
    save_in_hub(pair, cache_dir, "b" * 40)
    assert "was made with commit aaaaaaaa" in refusal(pair, **options)
    run_of(pair, pair.folder / "run", **options, teacher_model_revision="a" * 40)


def test_a_row_that_is_not_there_is_named_with_what_has_changed(pair):
    last = len(pair.rows) - 1
    for name, text, message in (
        ("user", "Something else?", "the row has changed since it was cached (prompt)"),
        ("assistant", "Another.", "the row has changed since it was cached (completion)"),
    ):
        rows = [{"messages": [dict(m) for m in row["messages"]]} for row in pair.rows]
        (changed,) = (m for m in rows[last]["messages"] if m["role"] == name)
        changed["content"] = text
        told = refusal(pair, rows=rows)
        assert told.startswith(f"row {last}: ") and message in told
        assert "run gold-trainer cache-teacher again, which adds what is missing" in told
    rows = [*pair.rows, {"messages": [dict(m) for m in pair.rows[0]["messages"]]}]
    rows[-1]["messages"][-1]["content"] = "A new one."
    told = refusal(pair, rows=rows)
    assert told.startswith(f"row {last + 1}: ") and "is not among the rows that were cached" in told


def test_a_cache_keeps_its_rows_when_the_command_runs_with_fewer(pair):
    save_rows(pair.folder / "rows.jsonl", pair.rows[:2])
    pair.cache("cache", "--cache_shard_mib=0.001")
    rows = [*pair.rows, pair.rows[0]]  # one of them twice: nothing is missing
    run_of(pair, pair.folder / "run", teacher_cache=str(pair.folder / "cache"), rows=rows)


def test_a_row_is_refused_when_it_comes_too(made, monkeypatch):
    rows = [{"messages": [dict(m) for m in row["messages"]]} for row in made.rows]
    rows[3]["messages"][-1]["content"] = "Another."
    monkeypatch.setattr("gold_trainer.teachers.cached.NUM_CHECKED", 1)  # first and last
    assert refusal(made, rows=rows, max_steps=3).startswith("row 3: teacher_cache ")


def test_folders_that_are_no_cache_or_not_all_of_one(pair):
    cache = pair.folder / "cache"
    names = sorted(path.name for path in cache.glob("rows-*.safetensors"))
    assert len(names) > 2
    shard = cache / names[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert f"{shard.stem} is missing or ends early" in refusal(pair)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"in {shard.stem} is damaged; delete that shard" in refusal(pair, max_steps=3)
    shard.unlink()
    assert f"{shard.stem} is missing or ends early, " in refusal(pair)
    pair.cache("cache", "--cache_shard_mib=0.001")  # the remedy
    run_of(pair, pair.folder / "run", teacher_cache=str(cache), max_steps=3)
    head = cache / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1])
    assert "head.safetensors is missing or ends early" in refusal(pair)
    pair.cache()
    run_of(pair, pair.folder / "run", teacher_cache=str(cache))
    edit(cache / "cache.json", lambda values: values.update(is_complete=False))
    assert "is half written; run gold-trainer cache-teacher again, which goes on" in refusal(pair)
    edit(cache / "cache.json", lambda values: values.update(format=99))
    assert "cannot be read (format 99, 1 is expected)" in refusal(pair)
    (cache / "cache.json").unlink()
    assert "that gold-trainer cache-teacher has written, got" in refusal(pair)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lmbda": 0.5}, "lmbda must be 0 with teacher_cache, got 0.5; nobody knows what the"),
        ({"teacher_sharding": "fsdp"}, "teacher_sharding must be None with teacher_cache, got 'f"),
        ({"lmbda": 0.0, "seq_kd": True}, "seq_kd must be False with teacher_cache, got True; the"),
        (
            {"teacher_cache": None, "teacher_cache_form": "hidden"},
            "teacher_cache_form must be None without teacher_cache, got 'hidden'",
        ),
        (
            {"teacher_cache_form": "head_means", "beta": 0.5},
            "the loss must be the forward KL, loss='jsd' and beta=0, where teacher_cache has he",
        ),
        (
            {"teacher_cache_form": "head_means", "use_uld_loss": True},
            "use_uld_loss must be False where teacher_cache has head_means, got True",
        ),
    ],
)
def test_configs_that_cannot_be(fields, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        GOLDConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            **({"lmbda": 0.0, "teacher_cache": str(tmp_path)} | fields),
        )
    assert str(caught.value).startswith("GOLDConfig: ") and message in str(caught.value)


def test_places_of_a_teacher_are_read_by_the_command_and_named_in_training(pair, caplog):
    cache = pair.cache("offloaded", teacher_offload="cpu", teacher_device="cpu")
    places = {"teacher_offload": "cpu", "teacher_device": "cpu"}
    run_of(pair, pair.folder / "run", teacher_cache=str(cache), **places)
    told = [
        r.getMessage() for r in caplog.records if "for gold-trainer cache-teacher alone" in r.msg
    ]
    assert [line.split()[1] for line in told] == ["teacher_offload='cpu'", "teacher_device='cpu'"]


def test_a_teacher_that_is_an_object_is_refused(made):
    from support.tiny_models import tiny
    from support.trainer_cases import make_trainer

    with pytest.raises(ValueError, match="teacher_model must be None or a name with teacher_cache"):
        make_trainer(
            made.folder / "run",
            made.rows,
            "qwen3",
            teacher=tiny("qwen3", "teacher")[0],
            teacher_cache="x",
        )
