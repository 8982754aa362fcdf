"""Fields of GOLDConfig for completions that are generated: from what they are sampled."""

from dataclasses import dataclass, field
from typing import Any

from gold_trainer.fields.checks import as_dict, refuse_given

# Arguments of transformers' GenerationConfig and vLLM's SamplingParams -> the field to set instead.
FIELD_OF = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **dict.fromkeys(("stop", "stop_strings"), "stop_strings"),
    **dict.fromkeys(("max_new_tokens", "max_tokens"), "max_completion_length"),
    "max_length": "max_length",
    **dict.fromkeys(("n", "num_return_sequences"), "num_generations"),
    "seed": "seed",
}
# What the trainer sets itself: completions are samples, and their tokens are scored as they are.
SET_BY_TRAINER = (
    *("do_sample", "num_beams", "use_cache", "cache_implementation", "cache_config"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "stop_token_ids", "suppress_tokens"),
    *("logit_bias", "logprobs", "prompt_logprobs", "output_scores", "return_dict_in_generate"),
    *("detokenize", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
)


@dataclass
class RolloutFields:
    """Sampling of completions; the loss has temperatures of its own."""

    temperature: float = field(
        default=0.9, metadata={"help": "Sampling temperature of generated completions."}
    )
    top_p: float = field(default=0.95, metadata={"help": "Nucleus of the sampling, in (0, 1]."})
    top_k: int = field(
        default=0, metadata={"help": "Sample from the k likeliest tokens; 0 is off."}
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Sample from tokens whose probability is at least this times that of the "
            "likeliest. None is off."
        },
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata={
            "help": "Above 1 makes tokens of the prompt and of the completion so far less likely."
        },
    )
    stop_strings: list[str] | None = field(
        default=None,
        metadata={"help": "Texts that end a completion, and stay in it, as its end token does."},
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More arguments for writing completions: of transformers' GenerationConfig, "
            'as {"no_repeat_ngram_size": 4}; with use_vllm of vLLM\'s SamplingParams, as '
            '{"min_tokens": 4}.'
        },
    )

    rollout_cache_gib: float | None = field(
        default=None,
        metadata={
            "help": "Most GiB of keys and values while completions are written in this process; "
            "more rows are written one part after the other. None: half of what is free."
        },
    )
    rollout_compile: bool | None = field(
        default=None,
        metadata={
            "help": "Compile the layers of a model that writes completions in this process: some "
            "seconds once, and less time for every token. None: on a GPU.",
            "nargs": "?",
            "const": True,
        },
    )

    def check_rollouts(self) -> None:
        """What the kinds and ranges of the fields do not say."""
        if self.stop_strings is not None and not all(self.stop_strings):
            raise ValueError(
                f"GOLDConfig: stop_strings must be texts, got {self.stop_strings}; the empty one "
                "would end every completion: leave it out."
            )
        self._check_local()
        kwargs = as_dict(self.generation_kwargs)
        for name in kwargs:
            if name in FIELD_OF:
                raise ValueError(
                    f"GOLDConfig: generation_kwargs must hold what has no field, got {name!r}; set "
                    f"{FIELD_OF[name]} instead."
                )
            if name in SET_BY_TRAINER:
                raise ValueError(
                    f"GOLDConfig: generation_kwargs must leave {name} to the trainer, got "
                    f"{kwargs[name]!r}; leave it out."
                )

    def _check_local(self) -> None:
        """Fields of completions that are written in this process, where none are."""
        args: Any = self  # a GOLDConfig
        if args.seq_kd or (args.lmbda > 0 and not args.use_vllm):
            return
        why = "use_vllm=True" if args.use_vllm else "lmbda=0"
        names = "rollout_cache_gib", "rollout_compile"
        must_be = "None where no completion is written in this process"
        refuse_given(self, names, must_be, f" with {why}; leave it out")
