"""One run of the table: a fresh copy of the pre-trained student through GOLDTrainer, then its
greedy answers to the held-out questions.
"""

import json
import tempfile
import time
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PrinterCallback

from gold_kernels import TokenAlignment
from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.banner import Banner
from gold_trainer.batches import BatchAlignment, WindowBatch
from gold_trainer.rows import Row
from quality.models import Size, build_model, build_processor
from quality.pictures import Pictures
from quality.rows import Case, config_fields
from quality.schooling import Lessons, Schooling, accuracy, answers_of, prompt_of, school

MOST_TOKENS, MOST_NEW_TOKENS = 96, 12
TEACHER_FAMILY = "idefics3"
STUDENT_FAMILY = {"same": "idefics3", "cross": "llava"}


@dataclass(frozen=True)
class Scale:
    """Sizes of models, data and trainings."""

    teacher: Size
    student: Size
    teacher_pictures: int
    prompts: int  # that students distil on; the first ones have labels
    labelled: int
    held_out: int
    teacher_schooling: Schooling
    student_schooling: Schooling  # before the run, on the labelled pictures
    steps: int
    batch_size: int
    learning_rate: float


class Remembered:
    """A collator that renders a question with its answer once: the pictures, all of one size,
    change nothing but themselves.
    """

    def __init__(self, collator: Any, batches: dict[tuple, WindowBatch]) -> None:
        self.collator, self.batches = collator, batches

    def __call__(self, rows: list[Row]) -> WindowBatch:
        parts = [self._one(row) for row in rows]
        examples = [part.examples[0] for part in parts]
        is_one = parts[0].examples is parts[0].teacher_examples
        teacher = examples if is_one else [part.teacher_examples[0] for part in parts]
        if parts[0].alignment is None:
            return WindowBatch(examples, teacher)
        groups = TokenAlignment.concatenate([part.alignment.groups for part in parts])
        reasons = [reason for part in parts for reason in part.alignment.skip_reasons]
        return WindowBatch(examples, teacher, BatchAlignment(groups, reasons))

    def _one(self, row: Row) -> WindowBatch:
        key = repr(row.prompt), row.completion
        if key not in self.batches:
            self.batches[key] = self.collator([row])
        batch = self.batches[key]
        sides = [batch.examples]
        if batch.teacher_examples is not batch.examples:
            sides.append(batch.teacher_examples)
        sides = [[replace(side[0], index=row.index, images=row.images)] for side in sides]
        return replace(batch, examples=sides[0], teacher_examples=sides[-1])


@dataclass
class Bench:
    """What the runs of one process share."""

    folder: Path  # of pictures and weights
    scale: Scale
    device: torch.device
    collated: dict[Any, dict] = field(default_factory=dict)

    @cached_property
    def prompts(self) -> Pictures:
        return Pictures.load(self.folder / "prompts.npz")

    @cached_property
    def held_out(self) -> Pictures:
        return Pictures.load(self.folder / "held_out.npz")

    @cached_property
    def processors(self) -> dict[str, Any]:
        """Their tokenizers are trained on what students may see."""
        texts = [*self.prompts.question, *self.prompts.answer]
        return {name: build_processor(name, texts) for name in STUDENT_FAMILY.values()}

    def lessons(self, family: str, pictures: Pictures) -> Lessons:
        return Lessons.of(pictures, self.processors[family], self.device)

    @cached_property
    def held_out_lessons(self) -> dict[str, Lessons]:
        return {name: self.lessons(name, self.held_out) for name in self.processors}

    @cached_property
    def teacher(self) -> Any:
        model = build_model(TEACHER_FAMILY, self.scale.teacher, self.processors[TEACHER_FAMILY], 0)
        model.load_state_dict(torch.load(self.folder / "teacher.pt", weights_only=True))
        return model.to(self.device).eval()

    def student(self, family: str, seed: int, *, is_fresh: bool = False) -> Any:
        model = build_model(family, self.scale.student, self.processors[family], seed + 1)
        if not is_fresh:
            weights = torch.load(self.folder / f"{family}-{seed}.pt", weights_only=True)
            model.load_state_dict(weights)
        return model.to(self.device)

    def grade(self, model: Any, family: str) -> dict[str, float]:
        """Accuracy on the held-out questions."""
        tokenizer = self.processors[family].tokenizer
        return accuracy(answers_of(model, self.held_out_lessons[family], tokenizer), self.held_out)

    def school_teacher(self) -> dict[str, float]:
        """Trains it, and has it answer the questions that students distil on."""
        started = time.perf_counter()
        pictures = Pictures.load(self.folder / "teacher.npz")
        model = build_model(TEACHER_FAMILY, self.scale.teacher, self.processors[TEACHER_FAMILY], 0)
        school(model, self.lessons(TEACHER_FAMILY, pictures), self.scale.teacher_schooling, 0)
        tokenizer = self.processors[TEACHER_FAMILY].tokenizer
        answers = answers_of(model, self.lessons(TEACHER_FAMILY, self.prompts), tokenizer)
        (self.folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
        torch.save(model.state_dict(), self.folder / "teacher.pt")
        self.__dict__["teacher"] = model
        return {"seconds": time.perf_counter() - started}

    def school_student(self, family: str, seed: int) -> dict[str, float]:
        started = time.perf_counter()
        model = self.student(family, seed, is_fresh=True)
        labelled = self.lessons(family, self.prompts.first(self.scale.labelled))
        school(model, labelled, self.scale.student_schooling, seed)
        torch.save(model.state_dict(), self.folder / f"{family}-{seed}.pt")
        return {"seconds": time.perf_counter() - started}

    @cached_property
    def images(self) -> list[Image.Image]:
        return [Image.fromarray(picture) for picture in self.prompts.picture]

    def dataset(self, loss: str) -> list[dict[str, Any]]:
        """The labelled rows, all rows with labels, or all rows with the teacher's answers."""
        number, answers = len(self.prompts), self.prompts.answer
        if loss == "labels":
            number = self.scale.labelled
        elif loss != "all_labels":
            answers = json.loads((self.folder / "answers.json").read_text(encoding="utf-8"))
        return [
            {
                "prompt": prompt_of(self.prompts.question[i]),
                "images": [self.images[i]],
                "completion": [{"role": "assistant", "content": answers[i]}],
            }
            for i in range(number)
        ]

    def run(self, case: Case) -> dict[str, Any]:
        """The row's numbers."""
        family = STUDENT_FAMILY[case.pair]
        if case.loss == "teacher":
            return self.grade(self.teacher, TEACHER_FAMILY)
        student = self.student(family, case.seed)
        if case.loss == "before":
            return self.grade(student, family)
        chosen = config_fields(case)
        unknown = chosen.keys() - {spec.name for spec in fields(GOLDConfig)}
        if unknown:
            return {"status": f"no field {', '.join(sorted(unknown))}"}
        return self.train(student, case, chosen) | self.grade(student, family)

    def train(self, student: Any, case: Case, chosen: dict[str, Any]) -> dict[str, Any]:
        is_cuda, scale = self.device.type == "cuda", self.scale
        writes = {"rollout_compile": False} if case.policy == "on" else {}
        with tempfile.TemporaryDirectory() as folder:
            args = GOLDConfig(
                output_dir=folder,
                per_device_train_batch_size=scale.batch_size,
                max_steps=scale.steps,
                learning_rate=scale.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=scale.steps // 20 + 1,
                seed=case.seed,
                max_length=MOST_TOKENS,
                max_completion_length=MOST_NEW_TOKENS,
                gradient_checkpointing=False,
                dataloader_pin_memory=is_cuda,
                logging_first_step=False,
                logging_steps=scale.steps + 1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **writes,
                **chosen,
            )
            trainer = GOLDTrainer(
                model=student,
                teacher_model=self.teacher,
                args=args,
                train_dataset=self.dataset(case.loss),
                processing_class=self.processors[STUDENT_FAMILY[case.pair]],
                teacher_processing_class=self.processors[TEACHER_FAMILY],
            )
            for callback in (PrinterCallback, Banner):
                trainer.remove_callback(callback)
            trainer.data_collator = Remembered(trainer.data_collator, self.kept(case))
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
        tokens = sum(counts["tokens"] for counts in trainer.windows["train"].counts)
        return {"seconds": round(seconds, 2), "tokens": tokens}

    def kept(self, case: Case) -> dict[tuple, WindowBatch]:
        """Collated questions of one kind of loss: beta and cross-entropy change nothing there."""
        of_collating = {k: v for k, v in config_fields(case).items() if "crossentropy" not in k}
        return self.collated.setdefault((case.pair, repr(sorted(of_collating.items()))), {})
