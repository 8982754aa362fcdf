"""Chat templates of the tiny models: written here, with each family's own turn and picture tokens.

SmolVLM, Idefics3 and LLaVA take contents as lists of parts only, Qwen3 and Llama as strings only,
the others both; so do the templates of the real models.
"""


def _parts(picture: str, video: str = "") -> str:
    """Renders one message's content, a string or a list of parts."""
    return (
        "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
        "{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}{{ '" + picture + "' }}"
        "{%- elif part.type == 'video' -%}{{ '" + video + "' }}"
        "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
    )


def _chatml(picture: str, bos: str = "", video: str = "") -> str:
    return (
        bos
        + "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
        + _parts(picture, video)
        + "{{ '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )


def _idefics(bos: str) -> str:
    """No space between the colon and a leading picture, one before a leading text."""
    return (
        "{{ '" + bos + "' }}{%- for message in messages -%}"
        "{{ message.role | capitalize }}{{ ':' if message.content[0].type == 'image' else ': ' }}"
        "{%- for part in message.content -%}"
        "{{ '<image>' if part.type == 'image' else part.text }}"
        "{%- endfor -%}{{ '<end_of_utterance>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
    )


_GEMMA = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    + _parts("<start_of_image>")
    + "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)

# Pictures first, then the texts, each followed by a space; no end token after an answer.
_LLAVA = (
    "{%- for message in messages -%}{{ message.role | upper + ': ' }}"
    "{%- for part in message.content if part.type == 'image' -%}{{ '<image>\n' }}{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}{{ part.text + ' ' }}{%- endfor -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)

_LLAMA_HEADER = "'<|start_header_id|>' + {} + '<|end_header_id|>\n\n'"
_LLAMA = (
    "{{ bos_token }}{%- for message in messages -%}{{ "
    + _LLAMA_HEADER.format("message.role")
    + " + message.content | trim + '<|eot_id|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ " + _LLAMA_HEADER.format("'assistant'") + " }}{%- endif -%}"
)

_QWEN3 = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

_QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
TEMPLATES = {
    "qwen3_vl": _chatml(_QWEN_PICTURE, video=_QWEN_VIDEO),
    "qwen2_5_vl": _chatml(_QWEN_PICTURE, video=_QWEN_VIDEO),
    "lfm2_vl": _chatml("<image>", bos="{{ bos_token }}"),
    "smolvlm": _idefics("<|im_start|>"),
    "idefics3": _idefics("<|begin_of_text|>"),
    "gemma3": _GEMMA,
    "llava": _LLAVA,
    "qwen3": _QWEN3,
    "llama": _LLAMA,
}
