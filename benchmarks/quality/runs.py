"""One run of the table: a fresh copy of the pre-trained student through GOLDTrainer, then its
greedy answers to the held-out questions.
"""

import json
import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PrinterCallback

from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.banner import Banner
from quality.models import build_model, build_processor
from quality.pictures import Pictures
from quality.remembered import Remembered
from quality.rows import GIVEN, LOSSES, STUDENT_FAMILY, TEACHER_FAMILY, Case, config_fields
from quality.scales import Scale
from quality.schooling import Lessons, accuracy, answers_of, curve_of, prompt_of, school

MOST_TOKENS, MOST_NEW_TOKENS = 96, 12


def is_known(chosen: dict[str, Any]) -> bool:
    """Whether GOLDConfig has these fields and values."""
    try:
        GOLDConfig(output_dir="unused", report_to="none", **chosen)
    except (TypeError, ValueError):
        return False
    return True


def texts_for(family: str, pictures: Pictures) -> list[str]:
    """That its tokenizer is trained on. The teacher's family spells the words letter by letter: a
    new word is to be read, not recognised.
    """
    spells = family == TEACHER_FAMILY
    pairs = zip(pictures.kind, pictures.answer, strict=True)
    answers = [answer for kind, answer in pairs if not (spells and kind == "word")]
    return [*pictures.question, *answers]


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
        found = {}
        for family in STUDENT_FAMILY.values():
            found[family] = build_processor(family, texts_for(family, self.prompts))
            found[family].image_processor.kept = {}
        return found

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

    def student(self, family: str, *, is_fresh: bool = False) -> Any:
        """The student as it is before every run: trained on the labelled pictures."""
        model = build_model(family, self.scale.student, self.processors[family], 1)
        if not is_fresh:
            weights = torch.load(self.folder / f"{family}.pt", weights_only=True)
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
        lessons = self.lessons(TEACHER_FAMILY, pictures)
        losses = school(model, lessons, self.scale.teacher_schooling, 0)
        del lessons
        tokenizer = self.processors[TEACHER_FAMILY].tokenizer
        answers = answers_of(model, self.lessons(TEACHER_FAMILY, self.prompts), tokenizer)
        (self.folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
        self.__dict__["teacher"] = model
        return self.keep("teacher", TEACHER_FAMILY, model, losses, started)

    def school_student(self, family: str) -> dict[str, float]:
        started = time.perf_counter()
        model = self.student(family, is_fresh=True)
        labelled = self.lessons(family, self.prompts.first(self.scale.labelled))
        losses = school(model, labelled, self.scale.student_schooling, 0)
        return self.keep(family, family, model, losses, started)

    def keep(
        self, name: str, family: str, model: Any, losses: list[float], started: float
    ) -> dict[str, Any]:
        """Weights, how they came about and what they know, for all processes."""
        is_teacher = name == "teacher"
        how = self.scale.teacher_schooling if is_teacher else self.scale.student_schooling
        numbers = {
            "parameters": model.num_parameters(),
            "steps": len(losses),
            "batch_size": how.batch_size,
            "learning_rate": how.learning_rate,
            "seconds": time.perf_counter() - started,
            **self.grade(model, family),
        }
        (self.folder / f"{name}.json").write_text(json.dumps(numbers), encoding="utf-8")
        torch.save(model.state_dict(), self.folder / f"{name}.pt")
        return numbers | {"curve": curve_of(losses)}

    def kept(self, name: str) -> dict[str, float]:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def of_every_row(self) -> dict[str, float]:
        return {"teacher_accuracy": self.kept("teacher")["accuracy"]}

    @cached_property
    def images(self) -> list[Image.Image]:
        return [Image.fromarray(picture) for picture in self.prompts.picture]

    def dataset(self, loss: str) -> list[dict[str, Any]]:
        """The labelled rows, all rows with labels, or all rows with the teacher's answers."""
        number, answers = len(self.prompts), self.prompts.answer
        path = self.folder / "answers.json"
        if loss == "labels":
            number = self.scale.labelled
        elif loss != "all_labels" and path.exists():  # else it is a rehearsal
            answers = json.loads(path.read_text(encoding="utf-8"))
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
        if case.loss in GIVEN:
            return self.kept("teacher" if case.loss == "teacher" else family)
        student = self.student(family)
        numbers = self.train(case, student, self.teacher, self.scale.steps)
        numbers["parameters"] = student.num_parameters()
        numbers["learning_rate"] = self.scale.learning_rate * case.rate
        return numbers | self.grade(student, family)

    def rehearse(self, pair: str) -> dict[str, Any]:
        """What the first run of a process would do alone: kernels are compiled, and questions are
        rendered with their labels, which the teacher's answers mostly are.
        """
        started = time.perf_counter()
        family = STUDENT_FAMILY[pair]
        student = self.student(family, is_fresh=True)
        processor = self.processors[TEACHER_FAMILY]
        teacher = build_model(TEACHER_FAMILY, self.scale.teacher, processor, 0).to(self.device)
        names = [loss.name for loss in LOSSES if pair in loss.pairs and is_known(loss.fields)]
        cases = [Case(pair, name, "off", "yes", 0) for name in ("all_labels", *names)]
        for case in [*cases, Case(pair, names[-1], "on", "no", 0)]:
            is_first = case.loss == "all_labels"
            self.train(case, student, teacher, 1 if case.policy == "off" else 4, rehearses=is_first)
        self.grade(student, family)
        return {"seconds": time.perf_counter() - started}

    def train(
        self,
        case: Case,
        student: Any,
        teacher: Any,
        num_steps: int,
        *,
        rehearses: bool = False,  # render all rows first
    ) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(case, student, teacher, num_steps, folder)
            if rehearses:
                rows: Any = trainer.train_dataset
                trainer.data_collator([rows[i] for i in range(len(rows))])
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
        tokens = sum(counts["tokens"] for counts in trainer.windows["train"].counts)
        return {"seconds": round(seconds, 2), "tokens": tokens}

    def trainer(
        self, case: Case, student: Any, teacher: Any, num_steps: int, folder: str
    ) -> GOLDTrainer:
        """Without its lines on the screen; what is learnt is as it would be."""
        is_cuda, scale = self.device.type == "cuda", self.scale
        options = config_fields(case)
        if case.policy == "on":
            options["rollout_compile"] = False  # takes longer than a run
        args = GOLDConfig(
            output_dir=folder,
            per_device_train_batch_size=scale.batch_size,
            max_steps=num_steps,
            learning_rate=scale.learning_rate * case.rate,
            lr_scheduler_type="cosine",
            warmup_steps=num_steps // 20 + 1,
            seed=case.seed,
            max_length=MOST_TOKENS,
            max_completion_length=MOST_NEW_TOKENS,
            bf16=False,
            gradient_checkpointing=False,
            compile_models="off",  # takes longer than a run
            dataloader_pin_memory=is_cuda,
            logging_first_step=False,
            logging_steps=num_steps + 1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        trainer = GOLDTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=self.dataset(case.loss),
            processing_class=self.processors[STUDENT_FAMILY[case.pair]],
            teacher_processing_class=self.processors[TEACHER_FAMILY],
        )
        for callback in (PrinterCallback, Banner):
            trainer.remove_callback(callback)
        # one kind of collator, one way of rendering and aligning: no loss here has its own
        kept = self.collated.setdefault((case.pair, type(trainer.data_collator)), {})
        trainer.data_collator = Remembered(trainer.data_collator, kept)
        return trainer
