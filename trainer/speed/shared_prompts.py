"""Rows of a micro-batch that begin with the same prompt, which then stands in their sequence once.

Completions of one prompt stand one behind the other, each of which sees the prompt and itself. What
a layer does token by token, and a vision tower picture by picture, is done once a prompt; attention
takes keys and values of a prompt again for each of its completions. So each token gets what it
would in a row of its own.

P prompts, L positions of the longest one with all its completions, T tokens of all, N scored ones.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from gold_trainer.batches import Example
from gold_trainer.speed.grouping import length_of


class Trunk(NamedTuple):
    """A prompt and those that begin with it."""

    example: Example  # the prompt, and all of their completions as if they were one
    members: list[int]  # places of the examples among all
    sizes: list[int]  # of their completions

    def parts(self, length: int) -> list[int]:
        """Lengths of prompt and completions, of the length of all."""
        return [length - sum(self.sizes), *self.sizes]


def trunks_of(examples: Sequence[Example]) -> list[Trunk]:
    return [_trunk(examples, members) for members in _by_prompt(examples)]


def _by_prompt(examples: Sequence[Example]) -> list[list[int]]:
    """Places of those that begin alike."""
    found: dict[object, list[int]] = {}
    for place, example in enumerate(examples):
        media = tuple(map(id, (*example.images, *example.videos)))
        found.setdefault((example.prompt, media), []).append(place)
    return list(found.values())


def _trunk(examples: Sequence[Example], members: list[int]) -> Trunk:
    completions = [examples[place].written_ids for place in members]
    joined = examples[members[0]].with_completion(list(chain.from_iterable(completions)))
    return Trunk(joined, members, [len(ids) for ids in completions])


class Counts(NamedTuple):
    """Positions that a model computes of some rows."""

    shared: int  # with each prompt once
    packed: int  # with each row for itself
    padded: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Counts":
        lengths = [length_of(example) for example in examples]
        repeated = (own[1:] for own in _by_prompt(examples))
        spared = sum(examples[i].prompt_length for own in repeated for i in own)
        return cls(sum(lengths) - spared, sum(lengths), len(lengths) * max(lengths))


class Keys(NamedTuple):
    """What queries of each segment see of the sequence: its own tokens and, before them, others."""

    places: Tensor  # (T_k,) of the keys of one segment behind those of the other
    bounds: Tensor  # (segments + 1,) where each begins among these, and where the last one ends
    longest: int


class Segments(NamedTuple):
    """A prompt, a completion, or the only completion of a prompt with it."""

    bounds: Tensor  # (segments + 1,) int32
    longest: int
    offsets: Tensor  # (T,) by which positions in the (P, L) are too high
    keys: Keys


def segments_of(shared: Sequence[Sequence[int]]) -> Segments:
    """shared: lengths of each prompt, and of the completions behind it. The number of segments,
    some of them empty, follows from that of completions: layers are compiled for a number.
    """
    sizes, key_sizes, offsets, places, start = [], [], [], [], 0
    for prompt, *completions in shared:
        ends = list(accumulate(completions, initial=prompt))
        parts = [(0, prompt), *zip(ends[:-1], completions, strict=True)]
        if len(completions) == 1:  # one segment is enough
            parts = [(0, ends[-1])]
        for first, size in parts:
            before = min(first, prompt)  # tokens of the prompt
            sizes.append(size)
            key_sizes.append(before + size)
            offsets.append(torch.full((size,), first - before))
            places.append(torch.arange(start, start + before))
            places.append(torch.arange(start + first, start + first + size))
        start += ends[-1]
    num_empty = 2 * sum(len(completions) for _, *completions in shared) - len(sizes)
    sizes, key_sizes = ([*own, *[0] * num_empty] for own in (sizes, key_sizes))
    bounds, key_bounds = (
        torch.tensor([0, *accumulate(own)], dtype=torch.int32) for own in (sizes, key_sizes)
    )
    keys = Keys(torch.cat(places), key_bounds, max(key_sizes))
    return Segments(bounds, max(sizes), torch.cat(offsets), keys)


def scored_places(
    trunks: Sequence[Trunk],
    shared: Sequence[Sequence[int]],
    width: int,  # L
) -> Tensor:  # (N,) flat positions p * L + l, in the order of the examples
    """The token before it predicts a token: the prompt's last one the first of each completion."""
    found: dict[int, Tensor] = {}
    for p, (trunk, (prompt, *completions)) in enumerate(zip(trunks, shared, strict=True)):
        start = p * width + prompt
        for member, size in zip(trunk.members, completions, strict=True):
            rows = torch.arange(start, start + size) - 1
            rows[:1] = p * width + prompt - 1
            found[member] = rows
            start += size
    return torch.cat([found[member] for member in sorted(found)])
