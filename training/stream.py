"""Worker processes that write scenes and tokenised chats; the GPU draws the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from purekv.reference import tokens
from purekv.reference.data import FIRST_SEED, Geometry, draw, samples
from purekv.reference.gguf import read_gguf
from purekv.reference.questions import CATEGORIES, Turn, chat
from purekv.reference.render import Packed, pack
from purekv.reference.scene import Scene


@dataclass(frozen=True)
class Shape:
    """One kind of batch, drawn with this weight."""

    geometry: Geometry
    level: str = "standard"
    weight: float = 1.0


@dataclass
class Batch:
    shape: Shape
    packed: Packed  # B * count scenes
    tail: Tensor  # [B, L] ids behind the last visual token, padded on the right
    where: Tensor  # [n] flat places in `tail` whose next token is an answer's
    target: Tensor  # [n] that next token
    turn: Tensor  # [n] number of the answer
    category: Tensor  # [answers] index into CATEGORIES


class Speech:
    """Strings to ids, remembered."""

    def __init__(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.ids = lru_cache(maxsize=200_000)(lambda text: self.tokenizer.encode(text).ids)
        self.prefix = self.ids(f"{tokens.TURN_START}user\n{tokens.VISION_START}")
        self.between = self.ids(f"{tokens.VISION_END}{tokens.VISION_START}")
        self.pads = {"video": self.ids(tokens.VIDEO_PAD)[0], "image": self.ids(tokens.IMAGE_PAD)[0]}

    def tail(self, turns: list[Turn]) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Ids behind the visual tokens, and (place, next token, turn) of each answer token."""
        ids = list(self.ids(tokens.VISION_END))
        answers = []
        for number, turn in enumerate(turns):
            opening = f"{tokens.TURN_START}user\n" if number else ""
            ids += self.ids(
                f"{opening}{turn.prompt}{tokens.TURN_END}\n{tokens.TURN_START}assistant\n"
            )
            for token in self.ids(f"{turn.reply}{tokens.TURN_END}"):
                answers.append((len(ids) - 1, token, number))
                ids.append(token)
            ids += self.ids("\n")
        return ids, answers


def tokenizer_json(gguf: Path) -> str:
    return tokens.make_tokenizer(read_gguf(gguf)[0]).to_str()


def collate(shape: Shape, scenes: list[Scene], chats: list[list[Turn]], speech: Speech) -> Batch:
    rows = [speech.tail(turns) for turns in chats]
    length = -(-max(len(ids) for ids, _ in rows) // 16) * 16
    tail = torch.zeros(len(rows), length, dtype=torch.long)
    answers, kinds = [], []
    for b, (ids, marks) in enumerate(rows):
        tail[b, : len(ids)] = torch.tensor(ids)
        answers += [(b * length + place, token, len(kinds) + turn) for place, token, turn in marks]
        kinds += [CATEGORIES.index(turn.category) for turn in chats[b]]
    where, target, turn = torch.tensor(answers).unbind(1)
    return Batch(shape, pack(scenes), tail, where, target, turn, torch.tensor(kinds))


class Stream(IterableDataset):
    """Endless batches; `phase` (shared with the trainer) picks the list of shapes in force."""

    def __init__(
        self, phases: list[list[Shape]], phase: Synchronized, budget: int, turns: int,
        choices: float, seed: int, tokenizer: str, rank: int, ranks: int,
    ) -> None:  # fmt: skip
        self.rank, self.ranks = rank, ranks
        self.phases, self.phase, self.budget = phases, phase, budget
        self.turns, self.choices, self.seed, self.tokenizer = turns, choices, seed, tokenizer
        assert seed < FIRST_SEED  # data sets begin there

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        torch.set_num_threads(1)
        # All ranks draw the same shapes, so that none waits for another; scenes and chats differ.
        order = np.random.default_rng([self.seed, worker])
        rng = np.random.default_rng([self.seed, worker, self.rank])
        speech = Speech(self.tokenizer) if self.turns else None
        index = self.rank * workers + worker
        while True:
            shapes = self.phases[self.phase.value]
            weights = np.array([shape.weight for shape in shapes])
            shape = shapes[int(order.choice(len(shapes), p=weights / weights.sum()))]
            geometry = shape.geometry
            scenes: list[Scene] = []
            chats: list[list[Turn]] = []
            # Long media are asked more: their questions cost little beside their pixels.
            turns = self.turns and min(24, max(self.turns, geometry.visual // 100))
            for _ in range(max(1, self.budget // (geometry.visual + 28 * turns))):
                drawn = draw(self.seed, index, geometry, shape.level)
                scenes += drawn
                if speech:
                    chats.append(chat(drawn, rng, turns, shape.level, geometry.media, self.choices))
                index += workers * self.ranks
            if speech:
                yield collate(shape, scenes, chats, speech)
            else:
                nothing = torch.zeros(0, dtype=torch.long)
                yield Batch(shape, pack(scenes), nothing, nothing, nothing, nothing, nothing)


def stream(
    phases: list[list[Shape]], phase: Synchronized, budget: int, turns: int, choices: float,
    seed: int, tokenizer: str, workers: int, rank: int = 0, ranks: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    data = Stream(phases, phase, budget, turns, choices, seed, tokenizer, rank, ranks)
    extra = {"prefetch_factor": 4} if workers else {}
    return iter(DataLoader(data, batch_size=None, num_workers=workers, **extra))


def held_out(
    shape: Shape, count: int, batch: int, seed: int, tokenizer: str
) -> Iterator[tuple[Batch, list[list[Turn]]]]:
    """Balanced two-turn conversations of a data set's seed."""
    speech = Speech(tokenizer)
    scenes: list[Scene] = []
    chats: list[list[Turn]] = []
    drawn = samples(count, seed, shape.geometry, shape.level, turns=(0, 1, 0))
    for done, sample in enumerate(drawn, 1):
        scenes += sample.scenes
        chats.append(sample.turns)
        if len(chats) == batch or done == count:
            yield collate(shape, scenes, chats, speech), chats
            scenes, chats = [], []
