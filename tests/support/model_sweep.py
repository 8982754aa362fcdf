"""Every architecture that transformers can build tiny, through the trainer's path, against eager
float64 steps. `make sweep` runs it (benchmarks/sweep_models.py).

An architecture is tried in a process of its own, so that a crash or a hang ends itself alone.
"""

import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from gold_trainer import GOLDConfig, models
from gold_trainer.data.dataset import RowDataset
from gold_trainer.loading import disable_dropout
from gold_trainer.objectives import SameVocabulary
from gold_trainer.rendering.prompts import process_prompts
from gold_trainer.router_loss import coefficient_of
from gold_trainer.sides import Side
from gold_trainer.speed import packing
from gold_trainer.speed.segments import attention_is
from gold_trainer.teachers import FrozenTeacher
from support.eager_step import completion_of, eager_step
from support.tiny_configs import architecture as architecture_of
from support.tiny_configs import tiny_models
from support.tiny_models import tiny, tiny_processor, tiny_rows
from support.tiny_more import tiny_more

TIMEOUT_SECONDS = 300
WORKERS = 2
BETA = 0.5
# float64, but for what models compute in float32 whatever their dtype: positions, norms, routers
MAX_LOSS_ERROR, MAX_GRAD_ERROR, MAX_ROLLOUT_ERROR = 1e-5, 1e-4, 1e-4
# class -> how a tiny one with its processor is made, and the name of that
WITH_PICTURES = {
    "Qwen3VLForConditionalGeneration": (tiny, "qwen3_vl"),
    "Qwen2_5_VLForConditionalGeneration": (tiny, "qwen2_5_vl"),
    "Lfm2VlForConditionalGeneration": (tiny, "lfm2_vl"),
    "SmolVLMForConditionalGeneration": (tiny, "smolvlm"),
    "Idefics3ForConditionalGeneration": (tiny, "idefics3"),
    "Gemma3ForConditionalGeneration": (tiny, "gemma3"),
    "LlavaForConditionalGeneration": (tiny, "llava"),
    "MllamaForConditionalGeneration": (tiny_more, "mllama"),
    "PaliGemmaForConditionalGeneration": (tiny_more, "paligemma"),
    "LlavaNextForConditionalGeneration": (tiny_more, "granite_vision"),
}
# whose processor takes no row without a picture, or whose text sees other rows' padding
ONE_PICTURE_EACH = ("paligemma", "mllama")
MAPPINGS = {
    "text": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "pictures": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
EXACT, REFUSED, FAILED, NOT_TRIED = "exact", "refused", "failed", "not tried"


@dataclass
class Outcome:
    model_type: str
    architecture: str
    kind: str  # text or pictures
    outcome: str = NOT_TRIED
    tried: str = "text"  # text, or pictures
    loss_error: float | None = None  # relative, the larger of both padding sides
    grad_error: float | None = None
    rollouts: str = ""  # together, or by length
    routers: str = ""
    reason: str = ""


def architectures() -> list[tuple[str, str, str]]:
    """(model type, class, kind); one that stands in both lists counts as one of pictures."""
    found = {}
    for kind, names in MAPPINGS.items():
        for model_type, architecture in names.items():
            found[model_type, architecture] = kind
    return sorted((*key, kind) for key, kind in found.items())


@dataclass
class Pair:
    """Student and teacher in one dtype, and what they read."""

    student: nn.Module
    teacher: nn.Module
    processor: Any
    rows: list[dict[str, Any]]
    family: str  # whose template and tokenizer these are
    dtype: torch.dtype = torch.float64

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


def trainer_step(pair: Pair, padding_side: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one micro-batch, as GOLDTrainer.compute_loss makes them."""
    pair.tokenizer.padding_side = padding_side
    pair.student.zero_grad()
    args = GOLDConfig(output_dir="runs/sweep", beta=BETA, use_cpu=True, report_to="none")
    for side, model in (("student", pair.student), ("teacher", pair.teacher)):
        models.check_decoder(model, side)
    student = Side.of(pair.student, "student", pair.processor, args)
    teacher = FrozenTeacher(pair.teacher, pair.processor, args)
    objective = SameVocabulary(args, student, teacher.side)
    is_text = pair.processor is pair.tokenizer
    rows = RowDataset(pair.rows, needs_completion=True, is_text=is_text)
    batch = objective.prepare(
        objective.collator([rows[i] for i in range(len(rows))]),
        lambda tensor: tensor.to(pair.dtype) if tensor.is_floating_point() else tensor,
    )
    teacher_hidden = teacher.hidden_rows(batch.teacher)

    def loss_at_head(hidden: Tensor) -> Tensor:
        heads = student.head, teacher.side.head
        return objective.loss(hidden, heads[0], teacher_hidden, heads[1], batch, None)[0]

    model = pair.student
    loss, _ = student.run(model, model, batch.student, loss_at_head)
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), gradients


def error_of(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of a parameter's gradient, relative to its norm, or to a hundredth of
    the norm of all: a bias in front of a softmax has a gradient of 0 but for rounding.
    """
    scale = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = [torch.zeros((), dtype=scale.dtype)]
    for name in actual.keys() | expected.keys():
        one = expected.get(name, torch.zeros(()))
        distance = (actual.get(name, torch.zeros(())) - one).norm()
        errors.append(distance / max(one.norm(), 1e-2 * scale))
    return torch.stack([error.double() for error in errors]).max().item()


def first_logits(pair: Pair, prompts: list[str]) -> Tensor:  # (B, V)
    """Logits of what generate() writes first, with padding on the left."""
    inputs = process_prompts(pair.processor, prompts, [[]] * len(prompts))
    output = pair.student.generate(
        **inputs,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=pair.tokenizer.pad_token_id,
    )
    return output.logits[0]


def causality_error(pair: Pair) -> float:
    """How far a later token moves the logits of those before it."""
    ids = torch.arange(4, 44).view(2, 20)
    other = ids.clone()
    other[:, 12:] += 60
    mask = torch.ones_like(ids)
    with torch.no_grad():
        one, two = (pair.student(input_ids=i, attention_mask=mask).logits for i in (ids, other))
    moved = (one - two)[:, :12].abs().max() / one.std()
    return moved.item()


def rollout_error(pair: Pair) -> float:
    """How far padding moves the student's first logits of a prompt; float32, as stock masks of
    float64 make NaN of padding.
    """
    pair.student.float()
    prompts = ["A", "A picture of a cat on a mat, and much more text than that.", "Two words"]
    together = first_logits(pair, prompts)
    alone = torch.cat([first_logits(pair, [prompt]) for prompt in prompts])
    is_finite = torch.isfinite(alone)
    return ((together - alone)[is_finite].abs().max() / alone[is_finite].std()).item()


def packing_error(pair: Pair) -> float:
    """How far other rows of one sequence move the student's logits, where rows may be packed."""
    config = pair.student.config
    if config.model_type not in (*packing.TEXT, *packing.PICTURES):
        return 0.0
    lengths = torch.tensor([[5], [13], [9]])
    mask = (torch.arange(13) < lengths).long()
    ids = torch.arange(4, 43).view(3, 13)
    student = deepcopy(pair.student).eval()
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        alone = torch.cat(
            [
                student(input_ids=row[None, :n]).logits[0]
                for row, n in zip(ids, lengths, strict=True)
            ]
        )
        with attention_is(packing.OF_ROWS, packing._configs(student)):
            packed, _ = packing.packed(student, inputs, mask, mask.flatten().nonzero()[:, 0])
            together = student(**packed).logits[0]
    return ((together - alone).abs().max() / alone.std()).item()


def router_outcome(pair: Pair) -> str:
    """Whether the stock loss is cross-entropy plus our coefficient times aux_loss."""
    config = pair.student.config
    text_config = config.get_text_config()
    if not hasattr(text_config, "output_router_logits"):
        return ""
    config.output_router_logits = text_config.output_router_logits = True
    ids = torch.arange(4, 40).view(2, 18)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with torch.no_grad():
            output = pair.student(**inputs, labels=ids)
    except IndexError:  # of a stock model none of whose two layers has a router
        return ""
    finally:
        config.output_router_logits = text_config.output_router_logits = False
    logits, targets = output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    extra = output.loss - nn.functional.cross_entropy(logits, targets)
    auxiliary = getattr(output, "aux_loss", None)
    if auxiliary is None:
        return "" if abs(extra) < 1e-5 else f"wrong: the stock loss has {extra.item():.1e} more"
    expected = coefficient_of(pair.student) * auxiliary
    is_equal = abs(extra - expected) < 1e-5 + 1e-4 * expected
    return "added" if is_equal else f"wrong: {expected.item():.1e} for {extra.item():.1e}"


def pairs_of(model_type: str, architecture: str) -> Iterator[Pair]:
    """As many as there are ways to build them; the first that runs is taken."""
    if architecture in WITH_PICTURES:
        make, name = WITH_PICTURES[architecture]
        (student, processor), (teacher, _) = make(name), make(name, "teacher")
        rows = tiny_rows(3, images=1 if name in ONE_PICTURE_EACH else "mixed")
        yield Pair(student.double(), teacher.double(), processor, rows, name)
        return
    processor = tiny_processor("llama")
    ids = {key: getattr(processor, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for student, teacher in tiny_models(model_type, architecture, (0, 1), **ids):
        for model in (student, teacher):
            model.generation_config.eos_token_id = processor.eos_token_id
        disable_dropout(student)
        # RWKV changes weights in place in eval mode, Reformer wants to be told
        student.train(model_type in ("rwkv", "reformer"))
        for dtype in (torch.float64, torch.float32):  # some models have no float64
            models_of = deepcopy(student).to(dtype), deepcopy(teacher).to(dtype)
            yield Pair(*models_of, processor, tiny_rows(3), "llama", dtype)


def eager(pair: Pair) -> tuple[float, dict[str, Tensor]]:
    completions = [completion_of(pair.family, pair.processor, row) for row in pair.rows]
    heads = {m.get_output_embeddings().weight.shape[0] for m in (pair.student, pair.teacher)}
    vocab_size = None if len(heads) == 1 else len(pair.tokenizer)
    return eager_step(
        *(pair.student, pair.teacher, pair.processor, pair.rows, completions),
        beta=BETA,
        vocab_size=vocab_size,
        dtype=pair.dtype,
    )


def compare(result: Outcome, pair: Pair) -> None:
    """Fill in what the trainer makes of a pair that can be built."""
    fresh = deepcopy(pair)  # some models keep states of their last forward
    try:
        steps = [trainer_step(pair, side) for side in ("left", "right")]
    except ValueError as error:
        is_named = str(error).startswith(("GOLDTrainer:", "row "))
        result.outcome = REFUSED if is_named else FAILED
        result.reason = one_line(error)
        return
    except Exception as error:
        result.outcome, result.reason = FAILED, one_line(error)
        return
    try:
        expected_loss, expected = eager(fresh)
    except Exception as error:
        result.outcome, result.reason = FAILED, one_line(error)
        return
    result.loss_error = max(abs(loss / expected_loss - 1) for loss, _ in steps)
    result.grad_error = max(error_of(gradients, expected) for _, gradients in steps)
    is_exact = result.loss_error < MAX_LOSS_ERROR and result.grad_error < MAX_GRAD_ERROR
    result.outcome = EXACT if is_exact else FAILED
    result.reason = "" if is_exact else "another loss or gradient than the eager step"
    if not is_exact:
        return
    try:
        finish(result, pair)
    except Exception as error:
        result.outcome, result.reason = FAILED, one_line(error)


def finish(result: Outcome, pair: Pair) -> None:
    """What an exact step does not show."""
    if pair.family == "llama" and (moved := causality_error(pair)) > MAX_ROLLOUT_ERROR:
        result.outcome, result.reason = FAILED, f"a later token moves logits by {moved:.1e}"
    if (error := packing_error(pair)) > MAX_ROLLOUT_ERROR:
        result.outcome, result.reason = FAILED, f"other rows move logits by {error:.1e}"
    result.routers = router_outcome(pair)
    if "wrong" in result.routers:
        result.outcome, result.reason = FAILED, result.routers
    if pair.family in ONE_PICTURE_EACH:
        return  # whose prompts here are text
    result.rollouts = "together" if models.may_pad_left(pair.student) else "by length"
    if result.rollouts == "together" and (error := rollout_error(pair)) > MAX_ROLLOUT_ERROR:
        result.outcome, result.reason = FAILED, f"padding moves a rollout by {error:.1e}"


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def is_encoder_decoder(name: str) -> bool:
    """Whether a config alone says that it is one."""
    try:
        return architecture_of(name).config_class().is_encoder_decoder
    except Exception:  # a default config that is none
        return False


def try_architecture(model_type: str, architecture: str, kind: str) -> Outcome:
    """In this process."""
    failures: list[str] = []
    tried = "pictures" if architecture in WITH_PICTURES else "text"
    result, reasons = Outcome(model_type, architecture, kind, tried=tried), []
    if kind == "pictures" and is_encoder_decoder(architecture):
        result.outcome = REFUSED
        result.reason = one_line(models.not_a_decoder(architecture, "student"))
        return result
    pairs = pairs_of(model_type, architecture)
    while True:
        try:
            pair = next(pairs)
        except StopIteration:
            break
        except Exception as error:
            reasons.append(one_line(error))
            break
        try:
            models.check_decoder(pair.student, "student")
        except ValueError as error:
            result.outcome, result.reason = REFUSED, one_line(error)
            return result
        compare(result, pair)
        if result.outcome != FAILED or result.loss_error is not None:
            return result
        try:
            eager(pair)  # which may have failed just now
        except Exception as error:  # the stock model alone, without anything of the trainer
            reasons.append(one_line(error))
        else:
            failures.append(result.reason)
        result.outcome = NOT_TRIED
    if failures:
        result.outcome = FAILED
    result.reason = (failures or reasons)[0]
    return result


def _child(connection: Any, case: tuple[str, str, str]) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    connection.send(try_architecture(*case))


def try_apart(case: tuple[str, str, str]) -> Outcome:
    """In a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, case))
    process.start()
    there.close()
    try:
        if here.poll(TIMEOUT_SECONDS):
            return here.recv()
        reason = f"no answer within {TIMEOUT_SECONDS} s"
    except EOFError:
        reason = "the process died"
    finally:
        process.kill()
        process.join()
    return Outcome(*case, outcome=NOT_TRIED, reason=reason)


def sweep(cases: list[tuple[str, str, str]]) -> list[Outcome]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(try_apart, cases))
