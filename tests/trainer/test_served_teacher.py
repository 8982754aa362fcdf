"""A teacher that a vLLM server runs: the same losses, from files that it writes."""

import ast
import fcntl
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gold_trainer import GOLDConfig, models
from gold_trainer.__main__ import main
from gold_trainer.caching.store import Index, Manifest
from gold_trainer.teachers.cached import StoredRows
from gold_trainer.teachers.served.tail import read_tail
from support.cache_cases import run_of, save_pair
from support.cross_cases import TEACHER_MERGES
from support.tiny_models import save_tiny, tiny
from support.trainer_cases import FIELDS, assert_equal_gradients

ROOT = Path(__file__).parents[2]
CONNECTOR = "distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A pair of vision-language models, rows with none, one and two pictures."""
    return save_pair(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("texts"), "qwen3")


def equal_runs(pair, tmp_path, served, **fields):
    live, live_steps, _ = run_of(pair, tmp_path / "live", max_steps=2, **fields)
    losses, steps, trainer = run_of(
        pair, tmp_path / "served", max_steps=2, **fields, **served.fields
    )
    assert losses == pytest.approx(live, rel=1e-5)
    for ours, theirs in zip(steps.steps, live_steps.steps, strict=True):
        assert_equal_gradients(ours, theirs, 1e-4)
    assert trainer.teacher_model is None
    assert not [*served.folder.iterdir()], "the server's files are read once and deleted"


def test_a_run_learns_what_it_does_of_a_teacher_that_is_here(pictures, serve, tmp_path):
    with serve(pictures, "qwen3_vl") as served:
        equal_runs(pictures, tmp_path, served)
        counts = [len(body.get("content_parts", [])) for body in served.rows]
        assert {0, 1, 2} == set(counts), "precondition: rows of all kinds"
        image_id = served.model.config.image_token_id
        assert [body["token_ids"].count(image_id) for body in served.rows] == counts
        assert served.most_at_a_time == 2, "rows of a micro-batch are asked for together"


def test_two_tokenizers_learn_the_same_of_what_the_student_writes(tmp_path, serve):
    pair = save_pair(tmp_path, "qwen3", "llama")
    fields = {"lmbda": 1.0, "max_completion_length": 8, "per_device_train_batch_size": 3}
    with serve(pair, "llama", num_merges=TEACHER_MERGES) as served:
        equal_runs(pair, tmp_path, served, **fields)
        assert served.rows, "precondition: some of it is spelled on the teacher's side"


def test_an_address_in_the_teachers_place_is_enough(texts, serve, tmp_path):
    with serve(texts, "qwen3") as served:
        fields = {"teacher_model_name_or_path": f"{served.stub.url}/v1"}
        named = run_of(texts, tmp_path / "named", **served.fields)[0]
        # the same one, twice
        both = fields | {"teacher_model_server_url": f"{served.stub.url}/"}
        losses, _, trainer = run_of(texts, tmp_path / "run", **both)
        assert losses == named
        assert trainer.args.teacher_model_name_or_path == str(texts.folder / "teacher")
        assert trainer.args.teacher_model_server_url == served.stub.url
        served.entry["root"] = "/nowhere/teacher"
        with pytest.raises(ValueError, match="a checkpoint that can be read here too, got '/nowh"):
            run_of(texts, tmp_path / "run", **fields)


def test_a_cache_is_made_of_a_served_teacher(texts, serve):
    with serve(texts, "qwen3") as served:
        folders = [texts.cache("live"), texts.cache("served", **served.fields)]
    manifests = [Manifest.read(folder) for folder in folders]
    assert all(manifest.is_complete for manifest in manifests)
    indices = [Index(f, [*m.shards]) for f, m in zip(folders, manifests, strict=True)]
    assert len(indices[0]) == len(indices[1]) == len(texts.rows)
    rows = [StoredRows(f, m)._shard(0)[:] for f, m in zip(folders, manifests, strict=True)]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-5, atol=1e-5)


def test_a_cache_of_means_is_made_of_a_served_teacher(texts, serve):
    fields = {"beta": 0.0, "teacher_cache_form": "head_means", "lora_target_modules": "q_proj"}
    with serve(texts, "qwen3") as served:
        folders = [
            texts.cache(name, "--use_peft", **fields, **more)
            for name, more in (("live_means", {}), ("served_means", served.fields))
        ]
    rows = [StoredRows(f, Manifest.read(f))._shard(0)[:] for f in folders]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-4, atol=1e-4)


def test_the_stub_writes_what_vllms_own_reader_reads(texts, serve):
    """The function of the installed vLLM, without the package around it, which takes seconds."""
    (source,) = ROOT.glob(f".venv-vllm/lib/python*/site-packages/vllm/{CONNECTOR}")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    name = "load_hidden_states"
    (function,) = [node for node in tree.body if getattr(node, "name", "") == name]
    found = {"fcntl": fcntl, "load_file": load_file, "torch": torch}
    exec(compile(ast.Module([function], []), str(source), "exec"), found)
    with serve(texts, "qwen3") as served:
        ids = [20, 21, 22]
        answer = served.generate({"token_ids": ids})
        tensors = found[name](answer["kv_transfer_params"]["hidden_states_path"])
    assert tensors["token_ids"].tolist() == ids and tensors["hidden_states"].shape[:2] == (3, 1)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "idefics3", "llama"])
def test_norm_and_head_alone_are_read_and_make_the_models_logits(family, tmp_path):
    """Of a checkpoint in which nothing else is left."""
    save_tiny(tmp_path, family, "teacher")
    model, processor = tiny(family, "teacher")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        ends = ("norm.weight", "lm_head.weight", "embed_tokens.weight")
        kept = {n: file.get_tensor(n) for n in file.keys() if n.endswith(ends)}  # noqa: SIM118
    assert len(kept) < len(model.state_dict()) / 2
    # in two files, as larger ones come
    names = sorted(kept)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, of_file in parts.items():
        save_file({name: kept[name] for name in of_file}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, of_file in parts.items() for name in of_file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tail = read_tail(str(tmp_path), processor, GOLDConfig(output_dir=str(tmp_path), **FIELDS))
    seen = []
    norm = [m for n, m in model.get_decoder().named_children() if n.endswith("norm")][-1]
    hook = norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(20, 29)[None]).logits[0]
        hook.remove()
        ours = tail.log_probs(seen[0][0])
    torch.testing.assert_close(ours, logits.log_softmax(-1)[:, : ours.shape[1]])
    assert models.base_model(model).config.tie_word_embeddings == (family == "gemma3")


def test_the_start_line_serves_what_the_last_layer_makes(texts, capsys):
    argv = texts.command(teacher_model_server_url="http://gpu7:8002", max_length=512)
    assert main(["teacher-command", *argv]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"vllm serve {texts.folder / 'teacher'} --enable-scale-out --host gpu7")
    assert "--port 8002 --max-model-len 512" in line
    depth = tiny("qwen3", "teacher")[0].config.num_hidden_layers
    assert f'"eagle_aux_hidden_state_layer_ids": [{depth}]' in line
    assert main(["teacher-command", *texts.command()]) == 2
    assert "teacher_model_server_url are expected, got" in capsys.readouterr().err


def test_the_plan_counts_the_head_alone(texts, capsys):
    peaks = []
    for fields in ({}, {"teacher_model_server_url": "http://127.0.0.1:9"}):
        assert main(["plan", *texts.command(**fields)]) == 0
        peaks.append(capsys.readouterr().out)
    assert "teacher" in peaks[1] and peaks[0] != peaks[1]
