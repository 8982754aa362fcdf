"""Fields of a served teacher that contradict one another."""

import re

import pytest

from gold_trainer import GOLDConfig
from gold_trainer.teachers import source_of
from support.tiny_models import tiny
from support.trainer_cases import FIELDS


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"teacher_model_name_or_path": "http://a:1", "teacher_batch_size": 8},
            "teacher_batch_size must be None for a teacher that does not run here, got 8",
        ),
        (
            {"teacher_model_name_or_path": "gpu7:8002"},
            "begins with http://, got 'gpu7:8002'; write",
        ),
        ({"teacher_model_server_url": "gpu7:8002"}, "must be an address like .*'gpu7:8002'; begin"),
        (
            {"teacher_request_retries": 2},
            "teacher_request_retries must be left out unless",
        ),
        ({"teacher_model_server_url": "http://a:1", "seq_kd": True}, "seq_kd must be False with"),
        (
            {"teacher_model_server_url": "http://a:1", "teacher_offload": "cpu"},
            "teacher_offload must be None with teacher_model_server_url, got 'cpu'",
        ),
        (
            {
                "teacher_model_server_url": "http://a:1",
                "teacher_model_init_kwargs": {"quantization_config": {"load_in_4bit": True}},
            },
            "must be without quantization_config with teacher_model_server_url, got one; start",
        ),
        (
            {
                "teacher_model_server_url": "http://a:1",
                "teacher_model_name_or_path": "http://b:1",
            },
            "one server must be the teacher, got 'http://b:1' and .*'http://a:1'; leave one",
        ),
        (
            {"teacher_model_server_url": "http://a:1", "teacher_request_timeout": 0},
            "teacher_request_timeout must be positive and finite, got 0; 600",
        ),
    ],
)
def test_fields_that_a_server_cannot_do_are_refused(fields, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        GOLDConfig(output_dir=str(tmp_path), **(FIELDS | fields))


def test_an_object_beside_a_server_is_refused(tmp_path):
    url = {"teacher_model_server_url": "http://a:1"}
    args = GOLDConfig(output_dir=str(tmp_path), **(FIELDS | url))
    text = "must be None or a name with teacher_model_server_url, got Qwen3ForCausalLM; the server"
    with pytest.raises(ValueError, match=re.escape(text)):
        source_of(tiny("qwen3", "teacher")[0], args)
