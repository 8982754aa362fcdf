"""Two tokenizers with chat templates of their own, and what is compared of an answer."""

from copy import copy, deepcopy
from functools import lru_cache

from gold_kernels import CompletionAligner
from gold_kernels.tokens.token_bytes import TokenBytes
from gold_trainer.config import GOLDConfig
from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.rendering.pairing import CompletionPairs, PairCollator
from support.tokenizers_cases import table

USER = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "A red bar."}
TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
CHATML = (
    "{% for m in messages %}" + TURN + "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)
# Opens thoughts in the generation prompt and writes them around every answer, as Qwen3.5 does.
THINKS = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n<think>\\n' if add_generation_prompt else '' }}"
)
# Opens thoughts in the generation prompt and writes none in a conversation, as R1-Distill does.
OPENS = CHATML.replace("assistant\\n", "assistant\\n<think>\\n")


@lru_cache
def _base(name):
    """One for all templates: it takes half a second to make another."""
    tokenizer = deepcopy(table(name).tokenizer)
    marks = ["<|im_start|>", "<|im_end|>", "<|eom_id|>", "<|base_end|>"]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": marks}, replace_extra_special_tokens=False
    )
    tokenizer.eos_token = tokenizer.pad_token = "<|base_end|>"
    return tokenizer


def chat_tokenizer(name, template):
    tokenizer = copy(_base(name))
    tokenizer.chat_template = template
    return tokenizer


_TABLES: dict[int, TokenBytes] = {}  # by tokenizer: they take a second to make


def table_of(collator):
    """The bytes of a tokenizer whose template ends turns with these tokens."""
    backend = id(collator.tokenizer.backend_tokenizer)
    if backend not in _TABLES:
        _TABLES[backend] = TokenBytes(collator.tokenizer)
    made = copy(_TABLES[backend])
    made.end_ids = collator.end_ids
    return made


def paired(student, teacher):
    """Collators -> their pairs, with tables that are made once."""
    pairs = CompletionPairs.__new__(CompletionPairs)
    pairs.args = GOLDConfig(output_dir="unused", use_uld_loss=True)
    pairs.aligner = CompletionAligner(table_of(student), table_of(teacher))
    pairs.is_warned = set()
    return PairCollator(student, teacher, pairs)


def pair_collator(student, teacher):
    return paired(*(GOLDCollator(side, [side.eos_token_id], None) for side in (student, teacher)))


def row_of(answer):
    rows = [{"messages": [USER, answer]}]
    return RowDataset(rows, needs_completion=True, is_text=True)[0]


def grouped_text(tokenizer, example, base_rows, scalar_rows):
    rows = sorted({*base_rows.tolist(), *scalar_rows.tolist()})
    return tokenizer.decode([example.written_ids[row] for row in rows])


def seen(tokenizer, example):
    return example.prompt_text + tokenizer.decode(example.written_ids)


def grouped_texts(batch, student, teacher):
    groups = batch.alignment.groups
    return [
        grouped_text(student, batch.examples[0], *groups.sides[0][0:3:2]),
        grouped_text(teacher, batch.teacher_examples[0], *groups.sides[1][0:3:2]),
    ]
