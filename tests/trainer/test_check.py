"""gold-trainer check: what a run would refuse, counted before it, and what it would see."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from gold_trainer import loading
from gold_trainer.__main__ import main
from gold_trainer.checking.tables import pieces_of, print_examples
from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.rendering.prompts import prompt_ids
from support.bad_rows import ANSWER, BAD, QUESTION, skips_of, text_rows, with_bad
from support.tiny_models import save_tiny, save_tiny_pair, tiny, tiny_picture, tiny_rows
from support.trainer_cases import make_trainer

CHAT = [QUESTION, ANSWER]
# Rows of a text model that are refused, each for a reason of its own.
REFUSED = {
    "an assistant's answer is expected": BAD["no_answer"],
    "max_length=256 leaves no room for a completion": BAD["long_prompt"],
    "completion must be text in Unicode, got the lone surrogate": BAD["other"],
    "columns must go with 'messages', got prompt": {"messages": CHAT, "prompt": "a"},
    "tools must be a list of JSON schemas": {"messages": CHAT, "tools": 3},
    "a text-only student takes no pictures": {"messages": CHAT, "image": "0.png"},
    "a conversation must be a list of messages": {"messages": []},
    "a message must have a role": {"messages": [{"content": "x"}, ANSWER]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "llama", "qwen3_vl"):
        save_tiny_pair(folder / family, family)
    save_tiny(folder / "qwen3_more" / "teacher", "qwen3", "teacher", num_merges=20)
    return folder


@pytest.fixture
def check(models, tmp_path, monkeypatch, capsys):
    """Runs the command on rows: exit code and what it printed. Weights are never read."""
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setenv("COLUMNS", "120")

    def run(rows, *flags, families=("qwen3", "qwen3"), command="check"):
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        student, teacher = families
        code = main(
            [
                *(command, "--model_name_or_path", str(models / student / "student")),
                *("--teacher_model_name_or_path", str(models / teacher / "teacher")),
                *("--dataset_name", str(data), "--output_dir", str(tmp_path / "run")),
                *("--report_to", "none", "--use_cpu", "--max_length", "256"),
                *("--max_completion_length", "8", "--dataloader_num_workers", "2", *flags),
            ]
        )
        shown = capsys.readouterr()
        assert not (tmp_path / "run").exists()
        return code, shown.out if code < 2 else shown.err

    return run


def report_of(check, tmp_path, rows, *flags, **options):
    code, _ = check(rows, *flags, "--output", str(tmp_path / "report.json"), **options)
    return code, json.loads((tmp_path / "report.json").read_text())


def test_each_kind_of_refusal_is_counted_with_its_rows_and_one_message(check, tmp_path):
    kinds = list(REFUSED.values())
    rows = with_bad([*text_rows(30), *kinds, kinds[0], kinds[0]], {0: kinds[1]})
    code, report = report_of(check, tmp_path, rows)
    assert code == 1
    found = {
        message: refusal
        for refusal in report["train"]["refusals"]
        for message in REFUSED
        if message in refusal["message"]
    }
    assert found.keys() == REFUSED.keys()
    assert len(report["train"]["refusals"]) == len(REFUSED)
    counts = [found[message]["count"] for message in REFUSED]
    assert counts == [3, 2] + [1] * (len(REFUSED) - 2)
    assert [found[message]["rows"] for message in REFUSED][:3] == [[31, 39, 40], [0, 32], [33]]
    assert (report["train"]["rows"], report["train"]["refused"]) == (41, 11)
    code, shown = check(rows)
    assert code == 1
    assert "train: 41 rows, 11 refused" in shown
    assert all(refusal["message"] in shown for refusal in found.values())
    assert "11 rows are refused: mend or drop them, or set on_bad_row=skip" in shown


def test_training_leaves_out_what_the_check_refuses(check, tmp_path):
    rows = with_bad(text_rows(9), dict(enumerate(REFUSED.values())))
    report = report_of(check, tmp_path, rows)[1]
    trainer = make_trainer(tmp_path / "out", rows, "qwen3", on_bad_row="skip", max_steps=5)
    trainer.train()
    reasons: dict[str, int] = {}
    for refusal in report["train"]["refusals"]:
        name = f"/{refusal['reason']}"
        reasons[name] = reasons.get(name, 0) + refusal["count"]
    assert skips_of(trainer)[-1] == {"": float(report["train"]["refused"]), **reasons}


def test_lengths_are_those_that_training_has(check, tmp_path):
    rows = text_rows(21)
    code, report = report_of(check, tmp_path, rows)
    assert code == 0
    tokenizer = tiny("qwen3")[1]
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], 256)
    examples = [collator.example(row) for row in RowDataset(rows, needs_completion=True, is_text=1)]
    prompts = sorted(example.prompt_length for example in examples)
    answers = [len(example.written_ids) for example in examples]
    actual = report["train"]["distributions"]
    assert actual["student and teacher, prompt"]["median"] == prompts[10]
    assert actual["student and teacher, completion"]["max"] == max(answers)
    shares = report["train"]["shares"]
    above = sum(answer > 8 for answer in answers) / 21
    assert shares["student and teacher, completions above max_completion_length=8"] == above
    assert 0 < above < 1
    limit = f"--max_length={max(prompts) + 6}"
    shares = report_of(check, tmp_path, rows, limit, "--max_completion_length=2")[1]["train"]
    room = max(prompts) + 6
    cut = sum(e.prompt_length + len(e.written_ids) > room for e in examples) / 21
    assert shares["shares"][f"student and teacher, completions cut by max_length={room}"] == cut
    assert 0 < cut < 1


def test_pictures_are_read_and_their_tokens_counted(check, tmp_path):
    tiny_picture(1).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    parts = [{"type": "text", "text": "Look: <|image_pad|>"}]
    rows = [
        {"messages": CHAT, "image": "good.png"},
        {"messages": CHAT, "images": ["good.png", "good.png"]},
        {"messages": CHAT},
        {"messages": CHAT, "image": "broken.png"},
        {"messages": CHAT, "image": "none.png"},
        {"messages": CHAT, "image": "https://example.com/a.png"},
        {"messages": [{"role": "user", "content": parts}, ANSWER]},
        {"messages": [{"role": "user", "content": "<image> <image>"}, ANSWER], "image": "good.png"},
    ]
    code, report = report_of(check, tmp_path, rows, families=("qwen3_vl", "qwen3_vl"))
    assert code == 1
    reasons = sorted(refusal["reason"] for refusal in report["train"]["refusals"])
    assert reasons == ["other", "other", "picture", "picture", "picture"]
    found = report["train"]["distributions"]
    assert found["pictures, of a row"] == {"min": 0, "median": 1, "p95": 1.9, "max": 2}
    assert found["pictures, width"]["max"] == tiny_picture(1).width
    processor, picture = tiny("qwen3_vl")[1], tiny_picture(1)
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    tokens = len(prompt_ids(processor, placeholder, [picture])) - 2
    assert found["student and teacher, pictures of a row"]["max"] == 2 * tokens > 2


def test_two_families_are_shown_side_by_side_with_groups_per_token(check, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "red bar " * 20}, ANSWER]}, *text_rows(4)]
    options = {"families": ("qwen3", "llama")}
    code, shown = check(rows, "--use_uld_loss", "--num_examples", "1", **options)
    assert code == 0
    assert "<|im_start|>assistant" in shown and "<|start_header_id|>assistant" in shown
    assert "[A][ bar][.]" in shown and "groups per token: 1" in shown
    assert "\x1b" not in shown
    _, report = report_of(check, tmp_path, rows, "--use_uld_loss", **options)
    found = report["train"]["distributions"]
    student, teacher = (found[f"{side}, prompt"]["max"] for side in ("student", "teacher"))
    assert student < teacher
    limit = f"--max_length={teacher:.0f}"
    code, report = report_of(check, tmp_path, rows, "--use_uld_loss", limit, **options)
    (refusal,) = report["train"]["refusals"]
    assert code == 1 and refusal["reason"] == "long_prompt"
    assert refusal["message"].startswith("on the teacher's side, row 0: the prompt has")


def test_rows_to_evaluate_on_are_checked_too(check, tmp_path):
    rows = with_bad(text_rows(8), {6: BAD["no_answer"], 7: BAD["other"]})
    flags = ("--dataset_train_split", "train[:5]", "--dataset_test_split", "train[5:]")
    flags += ("--eval_strategy", "steps", "--eval_steps", "1", "--lmbda", "1.0")
    code, report = report_of(check, tmp_path, rows, *flags)
    assert code == 1
    assert {name: part["refused"] for name, part in report.items()} == {"train": 0, "eval": 2}


def test_long_prompts_that_are_cut_are_no_refusals(check, tmp_path):
    rows = with_bad(text_rows(3), {1: BAD["long_prompt"]})
    code, report = report_of(check, tmp_path, rows, "--on_long_prompt", "truncate_left")
    assert code == 0
    assert report["train"]["shares"]["student and teacher, prompts cut to 248 tokens"] == 0.25


@pytest.mark.parametrize("limit", [2, 100])
def test_of_a_stream_as_many_rows_are_read_as_a_run_takes(limit, check, tmp_path):
    rows = with_bad(text_rows(40), {3: BAD["no_answer"], 35: BAD["no_answer"]})
    flags = ("--dataset_streaming", "--max_steps", str(limit))
    code, report = report_of(check, tmp_path, rows, *flags)
    assert code == 1  # 8 rows a step
    assert report["train"]["rows"] == min(limit * 8, 42)
    assert report["train"]["refused"] == (1 if limit == 2 else 2)


@pytest.mark.parametrize(
    ("rows", "flags", "families", "message"),
    [
        (text_rows(2), [], ("qwen3", "llama"), "must be of one family, got qwen3 and llama; set"),
        (text_rows(2), ["--use_uld_loss"], ("qwen3", "qwen3_vl"), "must take the same inputs"),
        ([], [], ("qwen3", "qwen3"), "split 'train' has no rows"),
        ([], ["--dataset_streaming", "--max_steps=1"], ("qwen3", "qwen3"), "must have rows, got n"),
        ([{"messages": CHAT, "id": 7}], [], ("qwen3", "qwen3"), "got id, which nothing uses"),
        (text_rows(2), ["--beta", "2"], ("qwen3", "qwen3"), "beta must be in [0, 1], got 2"),
        (
            text_rows(2),
            ["--use_peft", "--lora_target_modules", "lm_head"],
            ("qwen3", "qwen3"),
            "lm_head must be a plain torch.nn.Linear",
        ),
        (text_rows(2), [], ("qwen3", "qwen3_more"), "must have one vocabulary, got token"),
        (text_rows(2), ["--num_examples=x"], ("qwen3", "qwen3"), "a whole number, got 'x'; 0 sho"),
        (text_rows(2), ["--output=/none/r.json"], ("qwen3", "qwen3"), "a folder that exists, got"),
        (text_rows(2), ["--output", "."], ("qwen3", "qwen3"), "must be a file, got the folder '.'"),
        (text_rows(2), ["--lrate", "2"], ("qwen3", "qwen3"), "unknown flag --lrate"),
        (
            text_rows(2),
            ["--on_long_prompt", "truncate_left"],
            ("qwen3_vl", "qwen3_vl"),
            "'skip' for a vision-language student",
        ),
    ],
)
def test_what_is_wrong_with_fields_or_the_pair_ends_with_code_2(
    rows, flags, families, message, check
):
    code, error = check(rows, *flags, families=families)
    assert code == 2
    assert message in error and error.count("error: ") == 1 and "Traceback" not in error


def test_an_adapter_and_the_other_name_of_the_command(check):
    code, shown = check(text_rows(3), "--use_peft", command="check-data")
    assert code == 0
    assert "all rows can be used" in shown and "rows: conversations: the chat template" in shown
    code, shown = check([BAD["no_answer"], *text_rows(3)], "--on_bad_row", "skip")
    assert code == 1
    assert "1 rows are refused; on_bad_row=skip leaves them out" in shown


def test_a_file_of_fields_is_read_as_train_reads_it(models, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(BAD["no_answer"]))
    fields = {
        "model_name_or_path": models / "qwen3" / "student",
        "teacher_model_name_or_path": models / "qwen3" / "teacher",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "run",
        "dataloader_num_workers": 1,
        "use_cpu": "true",
    }
    config = tmp_path / "run.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    assert main(["check", str(config)]) == 1
    assert "no_answer: row 0: an assistant's answer is expected" in capsys.readouterr().out
    assert main(["check-data", str(config), "--seq_kd", "true"]) == 0
    assert "the completion is written in training" in capsys.readouterr().out


def test_scored_tokens_are_in_colour_on_a_terminal():
    tokenizer = tiny("qwen3")[1]
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)
    row = RowDataset(tiny_rows(1), needs_completion=True, is_text=True)[0]
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=100)
    print_examples(console, [collator([row])], {"student": tokenizer})
    assert "\x1b[" in file.getvalue() and "[.]" not in file.getvalue()
    assert "scored tokens in colour" in file.getvalue()


def test_pieces_of_tokens_make_the_text_also_where_a_character_is_several_tokens():
    tokenizer = tiny("qwen3")[1]
    text = "A b\u00e4r \U0001f43b \u6f22."
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert len(pieces) == len(ids) > len(text.split())
    assert "".join(pieces) == text and "" in pieces


def test_help_imports_nothing_slow():
    code = "import sys; from gold_trainer.__main__ import main; c = main(['check', '--help']); "
    code += "sys.exit(c or any(name in sys.modules for name in ('torch', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Exit code 0, 1 where a row is refused, 2" in done.stdout
    assert "--num_examples" in done.stdout
