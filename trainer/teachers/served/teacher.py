"""A teacher that a vLLM server runs, on other GPUs or another machine.

N_t scored rows of a batch, D_t hidden size.
"""

import torch
from torch import Tensor

from gold_trainer.batches import Example, SideInputs
from gold_trainer.collator import Processor
from gold_trainer.config import GOLDConfig
from gold_trainer.teachers.absent import AbsentTeacher
from gold_trainer.teachers.served.check import check_teacher, find_server, warn_of_another
from gold_trainer.teachers.served.client import HiddenStates
from gold_trainer.teachers.served.tail import Tail, read_tail
from gold_trainer.writers.background import Background
from gold_trainer.writers.vllm.requests import check_expanded, refuse_videos, unexpanded_ids
from gold_trainer.writers.vllm.server import Refused

REQUESTS = 64  # at a time, of each rank: the server makes batches of them


class ServedTeacher(AbsentTeacher):
    """Norm and head are here; rows of a micro-batch are asked for together."""

    def __init__(self, states: HiddenStates, tail: Tail, processor: Processor) -> None:
        self.states, self.tail, self.processor = states, tail, processor
        self.side = tail.side

    @classmethod
    def open(cls, name: str, processor: Processor, args: GOLDConfig) -> "ServedTeacher":
        """name: the checkpoint; processor is the one that its rows are made with."""
        server, served = find_server(args)
        warn_of_another(server, served, name)
        tail = read_tail(name, processor, args)
        width = tail.side.head.weight.shape[1]
        states = HiddenStates(server, served.id, args.teacher_request_retries, width)
        check_teacher(states, tail, processor, args)
        return cls(states, tail, processor)

    def place_rows(self, device: torch.device) -> None:
        super().place_rows(device)
        self.tail.norm.to(device)

    @torch.no_grad()
    def hidden_rows(self, inputs: SideInputs) -> Tensor:  # (N_t, D_t)
        examples = [example for example in inputs.examples if example.written_ids]
        asked = Background(self._rows_of, examples, REQUESTS)
        weight = self.side.head.weight
        empty = torch.empty(0, weight.shape[1], dtype=weight.dtype, device="cpu")
        rows = torch.cat([*asked.results(), empty])
        return self.tail(rows.to(self.device))

    def _rows_of(self, example: Example) -> Tensor:  # (n, D_t) of the last layer
        refuse_videos(example, "is asked for", "leave teacher_model_server_url out")
        # what the last token would predict is not scored
        behind = example.written_ids[:-1]
        ids = [*unexpanded_ids(self.processor, example), *behind]
        try:
            answer = self.states.ask(ids, example.images)
        except Refused as error:
            raise ValueError(
                f"{example.where}: the vLLM server at {self.states.server.url} must take the row, "
                f"got a refusal ({error}) of {example.prompt_length + len(behind)} tokens with "
                f"pictures of {[image.size for image in example.images]}; change the row, or how "
                "the server is started."
            ) from error
        check_expanded(answer.seen_ids, example, self.processor, behind, "teacher")
        return answer.hidden[-1 - len(behind) :]
