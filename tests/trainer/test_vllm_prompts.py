"""Which prompts a vLLM server gets, and how their pictures are written: a stub answers."""

from dataclasses import replace

import pytest

from support.trainer_cases import make_trainer
from support.vllm_cases import PROMPTS, prompts_of
from support.vllm_stub import GENERATE


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_pictures_that_become_several_parts_are_sent_as_one_placeholder(family, stub, tmp_path):
    """The server's processor writes their rows and columns, as the student's does."""
    run = make_trainer(tmp_path, PROMPTS, family, lmbda=1.0, max_length=None, **stub.fields)
    prompt = next(p for p in prompts_of(run) if len(p.example.images) == 2)
    processor = run.processing_class
    tokenizer, image_id = processor.tokenizer, run.model.config.image_token_id

    def expanded(body):
        text = tokenizer.decode(body["token_ids"])
        inputs = processor(text=text, images=prompt.example.images, add_special_tokens=False)
        return inputs["input_ids"][0]

    stub.expand = expanded
    writer, sampling = run.rollouts.writers["student"], run.rollouts.sampling["student"]
    writer.sync_weights(run.model, 0)
    assert writer.complete([prompt], sampling)[0][0].token_ids == [5, 6, 7]
    (body,) = stub.bodies(GENERATE)[1:]
    assert body["token_ids"].count(image_id) == 2
    assert len(expanded(body)) == prompt.example.prompt_length > len(body["token_ids"])
    stub.expand = lambda body: body["token_ids"]
    with pytest.raises(ValueError, match="got 23 tokens for 64, others from token 6 on"):
        writer.complete([prompt], sampling)


def test_a_server_is_not_asked_for_rows_that_keep_sharded_ranks_together(stub, tmp_path):
    """A picture for the vision tower on this rank, where others have one: only a model that runs
    here has to see it.
    """
    runs = [make_trainer(tmp_path, PROMPTS, lmbda=1.0, **fields) for fields in (stub.fields, {})]
    numbers = []
    for run in runs:
        rows = [run.train_dataset[i] for i in range(len(PROMPTS))]
        examples = [e for e in run.data_collator(rows).examples if not e.images]
        picture = run.window_source.pictures_for_all.example("student", "images")
        batch = replace(run.data_collator(rows), examples=examples, unscored=[picture])
        prompts = run.rollouts._prompts("student", [batch], 0, {})
        numbers.append([prompt.example.index for prompt in prompts])
    own = [e.index for e in examples]
    assert own and numbers == [own, [*own, picture.index]]
