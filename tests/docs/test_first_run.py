"""The page on a first run: its rows, its file and its commands run as they stand, with tiny models
in the place of those of the hub.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from gold_trainer import flags
from gold_trainer.__main__ import main
from support.tiny_models import save_tiny

PAGE = (Path(__file__).parents[2] / "docs" / "first_run.md").read_text(encoding="utf-8")
HUB = re.compile(r"HuggingFaceTB/SmolVLM2-2.2B-Instruct|Qwen/Qwen2.5-VL-7B-Instruct")


def block(language: str, beginning: str) -> str:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (text,) = (text for name, text in found if name == language and text.startswith(beginning))
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's files are; models of the hub are tiny ones of the same family."""
    folder = tmp_path_factory.mktemp("first")
    save_tiny(folder / "student", "smolvlm")
    save_tiny(folder / "teacher", "qwen2_5_vl", "teacher")
    run = block("yaml", "model_name_or_path")
    names = HUB.findall(run)
    assert len(names) == 2
    for name, model in zip(names, ("student", "teacher"), strict=True):
        run = run.replace(name, model)
    (folder / "run.yaml").write_text(run)
    (folder / "rows.jsonl").write_text(block("json", "{") * 5)
    (folder / "pictures").mkdir()
    for number in (1, 2):
        Image.new("RGB", (32, 32), "red").save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.mark.parametrize("command", ["check", "plan"])
def test_commands_before_the_run_accept_it(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    line = re.search(rf"^gold-trainer ({command} run.yaml.*)$", PAGE, re.MULTILINE)[1]
    assert main(line.split()) == 0
    shown = capsys.readouterr().out
    assert ("all rows can be used" in shown) if command == "check" else ("peak" in shown)


def test_the_run_trains_evaluates_and_goes_on_and_its_student_loads(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    few = ["--max_steps", "2", "--eval_steps", "1", "--warmup_steps", "0"]
    assert main(["train", "run.yaml", *few]) == 0
    shown = capsys.readouterr().out
    table = PAGE[PAGE.index("| value | healthy |") :].partition("\n\n")[0]
    names = re.findall(r"^\| `(\w+)`(?: \((one|two) tokenizers?\))?", table, re.MULTILINE)
    assert len(names) > 5
    assert [name for name, case in names if case != "one" and f"'{name}'" not in shown] == []
    assert main(["train", "run.yaml", *few, "--resume_from_checkpoint", "true"]) == 0
    assert "2 of 2 are done" in capsys.readouterr().out
    namespace: dict = {}
    exec(block("", "from transformers import"), namespace)
    assert namespace["model"].peft_config and isinstance(namespace["answer"], str)


FULL_SIZE = {  # of the configs of SmolVLM2-2.2B and Qwen2.5-VL-7B
    "student": (
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64}
        | {"vocab_size": 49280},
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
        | {"num_attention_heads": 16, "patch_size": 14, "image_size": 384},
        {"scale_factor": 3},
    ),
    "teacher": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
        | {"layer_types": ["full_attention"] * 28},
        {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
        | {"out_hidden_size": 3584, "patch_size": 14, "window_size": 112},
        {},
    ),
}
RUNS = (
    [],
    ["--teacher_model_init_kwargs", '{"quantization_config": {"load_in_4bit": true}}'],
    ["--use_peft", "false", "--dtype", "float32"],
)


@pytest.fixture(scope="module")
def full_size(folder, tmp_path_factory):
    """The models of the page without their weights, and with tiny processors."""
    target = tmp_path_factory.mktemp("full")
    for side, (text, vision, more) in FULL_SIZE.items():
        shutil.copytree(folder / side, target / side)
        next((target / side).glob("*.safetensors")).unlink()
        file = target / side / "config.json"
        config = json.loads(file.read_text())
        config.update(more, tie_word_embeddings=False, dtype="bfloat16")
        config["text_config"].update(text, tie_word_embeddings=False, dtype="bfloat16")
        config["vision_config"].update(vision, dtype="bfloat16")
        rotary = config["text_config"].get("rope_parameters") or {}
        if "mrope_section" in rotary:
            rotary["mrope_section"] = [16, 24, 24]
        file.write_text(json.dumps(config))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    text = [json.dumps({"messages": row["messages"]}) for row in rows]
    (target / "rows.jsonl").write_text("\n".join(text))
    shutil.copy(folder / "run.yaml", target)
    return target


@pytest.mark.parametrize("place", range(len(RUNS)))
def test_memory_of_the_page_is_what_the_plan_computes(place, full_size, monkeypatch, capsys):
    monkeypatch.chdir(full_size)
    table = PAGE[PAGE.index("| run | peak GiB") :].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == len(RUNS)
    assert main(["plan", "run.yaml", "--tokens", "2048", *RUNS[place]]) == 0
    shown = capsys.readouterr().out
    assert "2.25B parameters" in shown and "8.29B parameters" in shown
    peak = float(re.search(r"^peak +([\d.]+) GiB", shown, re.MULTILINE)[1])
    assert f"{peak:.1f}" == table[place].split("|")[2].strip()


def test_each_field_that_is_named_is_one_of_the_trainer():
    named = {
        "".join(found) for found in re.findall(r"`(?:--)?(\w+): |`--(\w+) |^(\w+): ", PAGE, re.M)
    }
    own = {"gpu_memory"}  # of a command
    assert {"seq_kd", "lmbda", "resume_from_checkpoint", "max_length"} <= named
    assert named - own <= set(flags.all_names())
