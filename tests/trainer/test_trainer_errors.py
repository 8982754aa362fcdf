"""What cannot be trained is refused with one message, before anything is written.

Messages of rows, of the collator and of GOLDConfig's numbers are in test_dataset.py,
test_collator.py and test_trainer_config.py; here they meet the trainer.
"""

import json
import os
import shutil
from copy import deepcopy

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from gold_trainer import GOLDConfig, GOLDTrainer, loading
from gold_trainer.__main__ import main
from support.tiny_models import save_tiny, tiny, tiny_picture, tiny_processor, tiny_rows
from support.trainer_cases import FIELDS, make_trainer

ROWS = tiny_rows(4, images=1)
TEXT_ROWS = tiny_rows(4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved students and teachers: folders[family, size]."""
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for family in ("qwen3_vl", "llama"):
        for size in ("student", "teacher"):
            paths[family, size] = str(save_tiny(folder / f"{family}-{size}", family, size))
    return paths


def refused(message, output_dir, rows=ROWS, family="qwen3_vl", **options):
    with pytest.raises(ValueError, match=message):
        make_trainer(output_dir, rows, family, **options)


def t5():
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 32, "num_layers": 1, "num_heads": 1}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=448, **sizes))


def bert():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.BertConfig(vocab_size=448, num_attention_heads=1, **sizes)
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (t5, "T5ForConditionalGeneration"),
        (bert, "BertForMaskedLM"),
        (lambda: tiny("llama")[0].model, "LlamaModel"),
        (
            lambda: transformers.LlamaForSequenceClassification(tiny("llama")[0].config),
            "LlamaForSequenceClassification",
        ),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
    ],
)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_model_that_is_no_decoder_is_refused(side, make, name, output_dir):
    message = (
        f"^GOLDTrainer: the {side} must be a decoder with a language-model head, got {name}; "
        "choose one that AutoModelForImageTextToText or AutoModelForCausalLM loads"
    )
    refused(message, output_dir, TEXT_ROWS, "llama", **{side: make()})


def test_encoder_decoder_by_name_is_refused_from_its_config(tmp_path, output_dir):
    t5().config.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"the teacher must be a decoder .* got t5; choose one"):
        GOLDTrainer(
            model=tiny("llama")[0],
            teacher_model=str(tmp_path / "t5"),
            args=GOLDConfig(output_dir=str(output_dir), **FIELDS),
            processing_class=tiny("llama")[1],
        )


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_name_that_leads_to_no_model_is_named(side, tmp_path, output_dir):
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "nowhere"), str(tmp_path / "empty"), "nobody/no-such-model"):
        message = f"^GOLDTrainer: the {side} must be a model's folder or hub id, got '{name}', whi"
        refused(f"(?s){message}.*; check its spelling", output_dir, **{side: name})


def test_teacher_is_expected(output_dir):
    with pytest.raises(ValueError, match=r"^GOLDTrainer: a teacher is expected, got None"):
        GOLDTrainer(
            model=tiny("qwen3_vl")[0], args=GOLDConfig(output_dir=str(output_dir), **FIELDS)
        )


def test_one_object_cannot_be_student_and_teacher(output_dir):
    model, _ = tiny("qwen3_vl")
    message = "^GOLDTrainer: student and teacher must be two objects, got one: .* load it a second"
    refused(message, output_dir, student=model, teacher=model)


@pytest.mark.parametrize("has_teacher", [True, False])
def test_arguments_of_another_class_are_refused(has_teacher, output_dir):
    with pytest.raises(
        ValueError,
        match=r"^GOLDTrainer: args must be a GOLDConfig, got TrainingArguments; it takes",
    ):
        GOLDTrainer(
            model=tiny("qwen3_vl")[0],
            teacher_model=tiny("qwen3_vl", "teacher")[0] if has_teacher else None,
            args=TrainingArguments(output_dir=str(output_dir), use_cpu=True),
        )


@pytest.mark.parametrize("side", ["model", "teacher_model"])
def test_misspelled_init_kwargs_are_named(side, output_dir, tmp_path):
    model, processor = tiny("llama", "student" if side == "model" else "teacher")
    model.save_pretrained(tmp_path / "weights")
    processor.save_pretrained(tmp_path / "weights")
    sides = {"model": tiny("llama")[0], "teacher_model": tiny("llama", "teacher")[0]}
    sides[side] = str(tmp_path / "weights")
    args = {f"{side}_init_kwargs": {"torchdtype": "bfloat16"}}
    with pytest.raises(ValueError, match=r"^GOLDTrainer: model_init_kwargs .*torchdtype.*spelling"):
        GOLDTrainer(
            **sides,
            args=GOLDConfig(output_dir=str(output_dir), **FIELDS, **args),
            processing_class=processor,
        )


@pytest.mark.parametrize("side", ["model", "teacher_model"])
def test_init_kwargs_of_a_loaded_model_are_refused(side, output_dir):
    message = f"^GOLDTrainer: {side}_init_kwargs must be None for a model that is loaded, got .*bf"
    refused(message, output_dir, **{f"{side}_init_kwargs": {"dtype": "bfloat16"}})


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics"])
def test_metrics_of_logits_are_refused(name, output_dir):
    with pytest.raises(
        ValueError, match=r"^GOLDTrainer: compute_metrics and preprocess_.* be None"
    ):
        GOLDTrainer(
            model=tiny("qwen3_vl")[0],
            teacher_model=tiny("qwen3_vl", "teacher")[0],
            args=GOLDConfig(output_dir=str(output_dir), **FIELDS),
            **{name: lambda *args: {}},
        )


@pytest.mark.parametrize(
    ("student", "teacher", "kinds"),
    [
        ("qwen3_vl", "qwen3", "a vision-language model as student and a text-only model as teach"),
        ("qwen3", "qwen3_vl", "a text-only model as student and a vision-language model as teach"),
    ],
)
def test_vision_language_and_text_only_do_not_pair(student, teacher, kinds, output_dir):
    message = f"^GOLDTrainer: student and teacher must take the same inputs, got {kinds}"
    refused(message, output_dir, family=student, teacher=tiny(teacher, "teacher")[0])


@pytest.mark.parametrize(("student", "teacher"), [("qwen3_vl", "qwen2_5_vl"), ("qwen3", "llama")])
def test_two_families_need_the_cross_family_loss(student, teacher, output_dir):
    message = (
        "^GOLDTrainer: student and teacher must be of one family, got "
        f"{student} and {teacher}; .*use_uld_loss=True"
    )
    refused(message, output_dir, family=student, teacher=tiny(teacher, "teacher")[0])


def test_heads_of_two_vocabularies_are_refused(output_dir):
    teacher, processor = tiny("llama", "teacher")
    rows = teacher.get_output_embeddings().out_features
    teacher.resize_token_embeddings(rows + 2048)
    message = (
        f"^GOLDTrainer: student and teacher must have one tokenizer, got heads of {rows} and "
        f"{rows + 2048} rows and a tokenizer of {len(processor)} entries; choose two models"
    )
    refused(message, output_dir, TEXT_ROWS, "llama", teacher=teacher)


def test_tokenizer_larger_than_a_head_is_refused(output_dir):
    processor = tiny_processor("llama")
    processor.add_tokens([f"<new-{i}>" for i in range(200)])
    message = rf"got heads of \d+ and \d+ rows and a tokenizer of {len(processor)} entries"
    refused(message, output_dir, TEXT_ROWS, "llama", processor=processor)


def test_teacher_folder_with_another_tokenizer_names_the_token(folders, tmp_path, output_dir):
    """Same family, same sizes, two entries exchanged: only the vocabularies tell."""
    teacher = tmp_path / "teacher"
    shutil.copytree(folders["llama", "teacher"], teacher)
    state = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(state))
    token_id = tiny_processor("llama").convert_tokens_to_ids("a")
    assert PreTrainedTokenizerFast.from_pretrained(teacher).decode([token_id]) == "b"
    message = (
        f"^GOLDTrainer: student and teacher must have one vocabulary, got token {token_id} = 'a' "
        r"and 'b' \(2 entries differ\); .*use_uld_loss=True"
    )
    refused(message, output_dir, TEXT_ROWS, "llama", teacher=str(teacher))


def test_processor_must_fit_the_student(output_dir):
    message = "^GOLDTrainer: a vision-language student needs its processor, got .*Tokenizer.*; pass"
    refused(message, output_dir, processor=tiny_processor("qwen3_vl").tokenizer)
    processor = tiny_processor("llama")
    processor.pad_token = None
    message = r"^GOLDTrainer: the tokenizer must have an eos_token and a pad_token, got .* and None"
    refused(message, output_dir, TEXT_ROWS, "llama", processor=processor)


def test_student_object_without_a_processor_asks_for_it(output_dir):
    with pytest.raises(ValueError, match=r"^GOLDTrainer: processing_class is expected .* got None"):
        GOLDTrainer(
            model=tiny("qwen3_vl")[0],
            teacher_model=tiny("qwen3_vl", "teacher")[0],
            args=GOLDConfig(output_dir=str(output_dir), **FIELDS),
        )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapter_of_the_head_is_refused(output_dir):
    peft = pytest.importorskip("peft")
    message = (
        "^GOLDTrainer: the student's lm_head must be a plain torch.nn.Linear, got "
        "peft.tuners.lora.layer.Linear; leave lm_head out of LoRA"
    )
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    refused(message, output_dir, peft_config=config)


@pytest.mark.parametrize(
    ("model_type", "architecture", "remedy"),
    [
        ("roberta", "RobertaForCausalLM", "set is_decoder=True in its config"),
        ("xlm", "XLMWithLMHeadModel", "set causal=True in its config"),
        ("xlnet", "XLNetLMHeadModel", "choose another model"),
    ],
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_model_whose_tokens_see_those_behind_them_is_refused(
    model_type, architecture, remedy, is_folder, output_dir, tmp_path
):
    config = getattr(transformers, architecture).config_class()
    assert config.model_type == model_type
    tiny_sizes = {"n_layers": 1, "num_hidden_layers": 1, "n_layer": 1}
    for name in tiny_sizes.keys() & set(vars(config)):
        setattr(config, name, 1)
    model = getattr(transformers, architecture)(config)
    if is_folder:
        config.save_pretrained(tmp_path / "folder")
        model = str(tmp_path / "folder")
    message = (
        f"^GOLDTrainer: the student must be causal, got the model type '{model_type}', whose "
        f"tokens see those behind them; {remedy}"
    )
    refused(message, output_dir, TEXT_ROWS, "llama", student=model)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_quantised_head_is_refused(side, output_dir):
    model, _ = tiny("llama", side)
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(*model.lm_head.weight.shape[::-1])
    message = f"^GOLDTrainer: the {side}'s lm_head must be a plain .* got torch.ao.*Linear; .*quant"
    refused(message, output_dir, TEXT_ROWS, "llama", **{side: model})
    model, _ = tiny("llama", side)
    weight = model.lm_head.weight.detach().to(torch.int8)
    model.lm_head = torch.nn.Linear(1, 1, bias=False)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    message = f"^GOLDTrainer: the {side}'s lm_head must hold plain floats, got Parameter of torch.i"
    refused(message, output_dir, TEXT_ROWS, "llama", **{side: model})


def test_adapter_that_cannot_be_added_is_refused(output_dir, monkeypatch):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"])
    student = peft.get_peft_model(tiny("qwen3_vl")[0], deepcopy(lora))
    message = "^GOLDTrainer: peft_config must be None for a student that has an adapter, got PeftMo"
    refused(message, output_dir, student=student, peft_config=lora)
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    message = "^GOLDTrainer: peft_config must change weights, got the prompt learning PromptTuning"
    refused(message, output_dir, peft_config=prompt)
    refused("'nope'", output_dir, peft_config=peft.LoraConfig(target_modules=["nope"]))
    monkeypatch.setattr(loading, "is_peft_available", lambda: False)
    message = "^GOLDTrainer: peft_config needs the package peft.* pip install 'gold-kernels.peft.'"
    refused(message, output_dir, peft_config=lora)


ANSWERED = ROWS[0]["messages"]
UNANSWERED = ANSWERED[:1]
TWO_PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, ANSWERED[1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "?"}, r"`messages`, or `prompt` and `completion`, are expected, got \['text'\]"),
        (
            {"question": "?", "answer": "!"},
            r".* got \['answer', 'question'\]; .*name them in prompt_column",
        ),
        ({"prompt": "?"}, "an assistant's answer is expected as `completion` .* got none; add it"),
        ({"messages": UNANSWERED}, "an assistant's answer is expected as `completion`"),
        (
            {"messages": ANSWERED, "image": 1},
            "image must be a picture: a PIL image.* got int; convert",
        ),
        (
            {"messages": TWO_PARTS, "images": [tiny_picture(1)]},
            "the prompt has 2 image parts but the row has 1 pictures; make them equal",
        ),
    ],
)
def test_columns_that_do_not_fit_show_before_weights_are_read(
    row, message, folders, output_dir, monkeypatch
):
    def load_model(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "load_model", load_model)
    names = {side: folders["qwen3_vl", side] for side in ("student", "teacher")}
    refused(f"^row 0: {message}", output_dir, [row, *ROWS], **names)
    refused(f"^row 0: {message}", output_dir, eval_rows={"a": ROWS, "b": [row]}, **names)


@pytest.mark.parametrize("beneath", [False, True])
def test_output_dir_must_be_a_folder(beneath, tmp_path):
    (tmp_path / "file").write_text("precious")
    path = tmp_path / "file" / "run" if beneath else tmp_path / "file"
    message = (
        f"^GOLDConfig: output_dir must be a folder that can be written, got {path}, where "
        f"{tmp_path / 'file'} is a file; choose another"
    )
    with pytest.raises(ValueError, match=message):
        GOLDConfig(output_dir=str(path), use_cpu=True)
    assert (tmp_path / "file").read_text() == "precious"


def test_output_dir_must_be_writable(tmp_path, monkeypatch):
    """Where tests run as root, every folder is: the answer of the system is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    message = f"got {tmp_path / 'a' / 'run'}, where {tmp_path} is read-only; choose another"
    with pytest.raises(ValueError, match=message):
        GOLDConfig(output_dir=str(tmp_path / "a" / "run"), use_cpu=True)
    assert not list(tmp_path.iterdir())


def command(folders, rows, output_dir, *flags):
    return [
        "train",
        *("--model_name_or_path", folders["llama", "student"]),
        *("--teacher_model_name_or_path", folders["llama", "teacher"]),
        *("--dataset_name", str(rows), "--output_dir", str(output_dir)),
        *("--per_device_train_batch_size", "1", "--max_steps", "3", "--lmbda", "0", "--use_cpu"),
        *("--train_sampling_strategy", "sequential", "--report_to", "none", *flags),
    ]


@pytest.fixture
def rows_file(tmp_path):
    """The third row has no answer."""
    rows = tiny_rows(3)
    del rows[2]["messages"][-1]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_message_starts_a_line_of_its_own_below_the_progress_bar(
    folders, rows_file, tmp_path, capfd
):
    assert main(command(folders, rows_file, tmp_path / "run")) == 2
    shown = capfd.readouterr().err
    assert "/3 [" in shown, "a progress bar is expected"
    assert shown.count("\nerror: row 2: an assistant's answer is expected") == 1
    assert shown.rstrip().splitlines()[-1].startswith("error: row 2")


def test_missing_checkpoint_shows_before_models_are_read(folders, rows_file, output_dir, capfd):
    flags = command(folders, rows_file, output_dir, "--resume_from_checkpoint", "checkpoint-7")
    assert main(flags) == 2
    shown = capfd.readouterr().err
    assert (
        "error: resume_from_checkpoint must be a checkpoint's folder, got 'checkpoint-7'" in shown
    )
    assert "Loading weights" not in shown
