"""Fields of GOLDConfig for what makes a step faster and changes nothing of what it computes."""

from dataclasses import dataclass, field

COMPILE_MODELS = ("regional", "off")


@dataclass
class SpeedFields:
    """Their defaults are what is fastest of all that was measured."""

    compile_models: str | None = field(
        default=None,
        metadata={
            "help": "regional: layers of student and teacher are compiled for training, one piece "
            "of code for all layers of a kind, in the first steps; layers that cannot be are named "
            "and run as they are. off: none are. None: regional on a CUDA GPU.",
            "choices": COMPILE_MODELS,
        },
    )
    group_by_length: bool | None = field(
        default=None,
        metadata={
            "help": "Sort the rows of an optimizer step by length before they go into its "
            "micro-batches: less padding, the same loss and gradient, the same rows in the step. "
            "Only rows that learn from the dataset's completions. None: on a CUDA GPU.",
            "nargs": "?",
            "const": True,
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Put the rows of a micro-batch into one sequence, in which a row sees only "
            "itself, instead of padding them to the longest: the same loss and gradient. Refused "
            "for models that cannot.",
        },
    )
    share_prompts: bool | None = field(
        default=None,
        metadata={
            "help": "A prompt, with its pictures, is computed once for all of its completions in a "
            "micro-batch (num_generations): the same loss and gradient. None: on a CUDA GPU, where "
            "it saves a fifth of the tokens or more, of models that can. True is refused for "
            "models that cannot.",
            "nargs": "?",
            "const": True,
        },
    )
