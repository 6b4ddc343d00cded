"""Trains the embedded reference model in three calls; training/README.md has the commands.

    tower     the vision tower alone, with a label for every visual token
    answers   tower and low-rank updates together, on question-answer chats
    evaluate  teacher-forced exact match on held-out scenes

Each stage stops by its own clock, so the length of a run is what was paid for and no more.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import Value
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from language import (
    answer_logits,
    effective,
    init_lora,
    language,
    layer,
    random_base,
    stack_base,
)
from language import rope_tables as text_rope
from ranks import Ranks
from safetensors.torch import save_file
from state import load_state, save_state
from stream import Batch, Shape, Speech, held_out, stream, tokenizer_json
from torch import Tensor
from tower import OUT, any_size, block, init_tower, patchify, tower
from tower import rope_tables as frame_rope

from purekv.reference.data import MEDIA, image, page, video
from purekv.reference.gguf import llama_weights, read_gguf
from purekv.reference.questions import CATEGORIES
from purekv.reference.render import ASSETS, Owners, Renderer, load_clip
from purekv.reference.scene import COLOURS, DIRECTIONS, GLYPHS, PALETTES, SHAPES


@dataclass(frozen=True)
class Model:
    """What tells one reference model from another, beside the seed."""

    depth: int  # of the tower
    layers: int  # of the language model, from the first
    rank: int  # of its updates


MODELS = {"first": Model(8, 30, 32), "second": Model(6, 24, 16)}
TOWER_PHASES = [
    [
        Shape(video(4, 10), "standard", 2),
        Shape(video(4, 8), "hard", 2),
        Shape(video(4, 6)),
        Shape(video(3, 14), "hard"),
        Shape(video(12, 8), "standard", 0.7),
        Shape(video(32, 6), "hard", 0.5),  # late readings of the clock
        Shape(video(64, 6), "standard", 1),
        Shape(image(12)),
        Shape(image(16), "hard"),
        Shape(page(12), "hard"),
        Shape(page(20), "hard"),
        Shape(page(28), "hard"),
        Shape(page(32), "standard"),
    ],
]
# From the easiest; each is in force up to a share of the whole time. What is hard about a prompt
# (many patches, many images, many entries of a page) is learnt on small frames first: it is cheap.
ANSWER_PHASES = [
    (
        0.05,
        [
            Shape(video(4, 6), "easy"), Shape(video(6, 6)), Shape(video(4, 8)),
            Shape(page(10), "easy"), Shape(page(12)), Shape(page(10, 3)),
            Shape(image(8, 2)), Shape(image(6, 4)),
        ],
    ),
    (
        0.2,
        [
            Shape(video(8, 8), "standard", 3), Shape(video(8, 6)), Shape(video(6, 8), "hard", 2),
            Shape(video(16, 6)), Shape(video(32, 6), "standard", 0.7),
            Shape(page(14)), Shape(page(12), "hard"), Shape(page(12, 4)),
            Shape(image(9, 3)), Shape(image(6, 8)), Shape(image(6, 16)), Shape(video(5, 7, 2)),
        ],
    ),
    (
        0.5,
        [
            Shape(video(10, 10), "standard", 2), Shape(video(9, 8), "hard", 1.5),
            Shape(video(16, 6)), Shape(video(12, 9)), Shape(video(16, 8), "hard"),
            Shape(video(32, 6), "standard", 1.2), Shape(video(64, 6), "standard", 1.2),
            Shape(page(20), "hard"), Shape(page(24)), Shape(page(16, 4)),
            Shape(image(12, 4)), Shape(image(6, 16), "standard", 0.7),
            Shape(image(8, 16), "standard", 0.7), Shape(image(16), "hard", 0.5),
            Shape(video(7, 8, 2)), Shape(video(16, 6, 2), "standard", 0.7),
            Shape(video(10, 8), "easy", 0.5),
        ],
    ),
    (
        1.0,
        [
            Shape(video(10, 10), "standard", 2), Shape(video(10, 10), "hard"),
            Shape(video(9, 8), "standard", 0.5), Shape(video(16, 6), "standard", 0.5),
            Shape(video(16, 8), "standard", 1.2), Shape(video(7, 12), "standard", 0.7),
            Shape(video(20, 10), "standard", 0.8), Shape(video(32, 8), "standard", 1.2),
            Shape(video(14, 12), "standard", 0.5), Shape(video(40, 10), "standard", 1.2),
            Shape(video(64, 8), "standard", 1.6), Shape(video(64, 6), "standard", 0.6),
            Shape(video(16, 16), "standard", 0.9),
            Shape(page(32), "standard", 1), Shape(page(24), "standard", 0.5),
            Shape(page(24), "hard", 0.4), Shape(page(32, 2), "standard", 0.6),
            Shape(page(32, 4), "standard", 0.9),
            Shape(image(16, 4), "standard", 1.2), Shape(image(12, 4), "hard", 0.8),
            Shape(image(8, 4), "standard", 1), Shape(image(8, 8), "standard", 0.7),
            Shape(image(16, 8), "standard", 0.7), Shape(image(16, 16), "standard", 1),
            Shape(image(8, 16), "standard", 0.7),
            Shape(video(8, 8, 2), "standard", 0.7), Shape(video(10, 10, 2), "standard", 0.4),
            Shape(video(20, 10, 2), "standard", 0.7), Shape(video(8, 8), "easy", 0.3),
        ],
    ),
]  # fmt: skip
EVALUATED = [
    (Shape(video(10, 10)), 640), (Shape(video(16, 8)), 320), (Shape(page(32)), 128),
    (Shape(image(16, 4)), 128), (Shape(video(8, 8, 2)), 128), (Shape(video(10, 10), "hard"), 320),
    (Shape(video(40, 10)), 320), (Shape(video(64, 8)), 320), (Shape(video(16, 16)), 160),
    (Shape(page(32, 4)), 96), (Shape(image(16, 16)), 96), (Shape(video(20, 10, 2)), 96),
]  # fmt: skip
HELD_OUT_SEED = 77
PLACE_BINS = 5
HEADS = {
    "shape": 1 + len(SHAPES), "left": 1 + len(GLYPHS), "right": 1 + len(GLYPHS),
    "colour": len(COLOURS), "motion": 1 + len(DIRECTIONS), "plate": len(PALETTES), "tens": 10,
    "ones": 10, "letter": 1 + len(GLYPHS), "digit": 1 + len(GLYPHS), "x": PLACE_BINS,
    "y": PLACE_BINS,
}  # fmt: skip


def main() -> None:
    args = parse()
    ranks = Ranks(args.device)
    torch.manual_seed(args.seed + ranks.rank)
    np.random.seed(args.seed + ranks.rank)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.suppress_errors = True  # an uncompiled layer is slow, not wrong
    Run(args, ranks).go()
    ranks.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("tower", "answers", "evaluate"))
    parser.add_argument("--model", choices=tuple(MODELS), default="first")
    parser.add_argument("--gguf", type=Path, help="SmolLM2; absent: random weights, for timing")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, where --gguf is absent")
    parser.add_argument("--state", type=Path, help="state, or folder of weights, to start from")
    parser.add_argument("--save", type=Path, required=True, help="state to write (.safetensors)")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and log")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--begin", type=float, default=0.0, help="share of the schedule already run"
    )
    parser.add_argument(
        "--end", type=float, default=1.0, help="share of the schedule run after this"
    )
    parser.add_argument("--budget", type=int, default=60_000, help="tokens a step")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--choices", type=float, default=0.3, help="share of multiple choice")
    parser.add_argument(
        "--emphasis", default="", help="category=times, comma-separated: how much its answers count"
    )
    parser.add_argument(
        "--favour", default="", help="media=times, comma-separated: how much oftener they are shown"
    )
    parser.add_argument("--tower-lr", type=float, default=4e-4)
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--aux", type=float, default=0.3, help="weight of the token labels' loss")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--abort-at", type=float, default=150, help="seconds; 0: never")
    parser.add_argument("--abort-below", type=float, default=0.40, help="mean training accuracy")
    parser.add_argument("--eval-share", type=float, default=1.0)
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    return parser.parse_args()


def factors(text: str, names: Sequence[str]) -> dict[str, float]:
    """ "a=2,b=3" as numbers, by name."""
    times = {name: float(n) for name, n in (one.split("=") for one in text.split(",") if one)}
    unknown = set(times) - set(names)
    assert not unknown, f"not among {', '.join(names)}: {', '.join(unknown)}"
    return times


class Run:
    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args, self.ranks, self.clock = args, ranks, time.time()
        self.device, self.dtype = ranks.device, getattr(torch, args.dtype)
        args.out.mkdir(parents=True, exist_ok=True)
        self.log_file = (args.out / f"{args.stage}.jsonl").open("a")
        self.renderer = Renderer(self.device, clip)
        self.model = MODELS[args.model]
        generator = torch.Generator().manual_seed(args.seed)
        self.tower = init_tower(generator, self.model.depth)
        self.heads = {}
        for name, size in HEADS.items():
            self.heads[f"{name}.weight"] = torch.randn(size, OUT, generator=generator) * OUT**-0.5
            self.heads[f"{name}.bias"] = torch.zeros(size)
        self.lora = init_lora(generator, self.model.layers, self.model.rank)
        self.groups = {"tower": self.tower, "heads": self.heads, "lora": self.lora}
        state, moments, stage = load_state(args.state) if args.state else ({}, {}, "")
        taken = {}
        for name, group in self.groups.items():
            # A model of fewer layers goes on from what fits of another's.
            given = state.get(name, {})
            fits = {k: v for k, v in given.items() if k in group and v.shape == group[k].shape}
            group.update(fits)
            for key in group:
                group[key] = group[key].to(self.device).requires_grad_()
            taken[name] = f"{len(fits)} of {len(given)}"
        self.emphasis: Tensor | None = None
        if args.emphasis:
            times = factors(args.emphasis, CATEGORIES)
            self.emphasis = torch.tensor([times.get(c, 1.0) for c in CATEGORIES]).to(self.device)
        self.optimizer = self.make_optimizer()
        if args.stage == stage == "answers":
            settings = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": settings})
        self.block, self.layer = block, layer
        if not args.eager:
            self.block, self.layer = (
                torch.compile(f, backend=args.backend) for f in (block, layer)
            )
        if args.stage != "tower":
            self.load_language()
        took = round(time.time() - self.clock, 1)
        self.log(event="ready", stage=args.stage, seconds=took, weights=taken)

    def load_language(self) -> None:
        if self.args.gguf:
            _, tensors = read_gguf(self.args.gguf)
            weights = {k: torch.from_numpy(v) for k, v in llama_weights(tensors, 9, 3).items()}
        else:
            weights = random_base(torch.Generator().manual_seed(0), self.model.layers)
        self.base = stack_base(weights, self.model.layers, self.device, self.dtype)
        if self.args.gguf:
            self.tokenizer = tokenizer_json(self.args.gguf)
        else:
            self.tokenizer = self.args.tokenizer.read_text()
        self.speech = Speech(self.tokenizer)

    def make_optimizer(self) -> torch.optim.AdamW:
        towers = [*self.tower.values(), *self.heads.values()]
        groups = [
            {
                "params": towers,
                "lr": self.args.tower_lr,
                "peak": self.args.tower_lr,
                "weight_decay": 0.01,
            }
        ]
        if self.args.stage != "tower":
            groups.append(
                {
                    "params": list(self.lora.values()),
                    "lr": self.args.lora_lr,
                    "peak": self.args.lora_lr,
                    "weight_decay": 0.0,
                }
            )
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=fused)

    def go(self) -> None:
        if self.args.stage == "evaluate":
            self.evaluate()
            return
        self.train()
        if self.ranks.rank == 0:
            self.checkpoint()
        if self.args.stage == "answers" and self.args.eval_share > 0:
            self.evaluate()

    # One step

    def cast(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.dtype) for name, value in group.items()}

    def see(self, batch: Batch, train: bool) -> tuple[Tensor, Owners]:
        """Visual embeddings [B * count, N, 576] and what each token shows."""
        pixels, owners = self.renderer.render(batch.packed)
        noise = None
        if train:  # most of the batches look as if a codec had touched them
            noise = torch.rand((), device=self.device) * 6 if np.random.rand() < 0.6 else None
        with torch.no_grad():
            patches = patchify(pixels, noise).to(self.dtype)
        cos, sin = frame_rope(batch.shape.geometry.grid, self.device)
        seen = tower(self.cast(self.tower), patches, cos, sin, self.block)
        return seen.reshape(len(pixels), -1, OUT), owners

    def answer(self, batch: Batch, seen: Tensor, layers: list[tuple[Tensor, ...]]) -> Tensor:
        """Logits [n, vocabulary] at the answers' places."""
        embed = self.base["embed"]
        tail = batch.tail.to(self.device, non_blocking=True)
        geometry = batch.shape.geometry
        prefix, between = self.speech.prefix, self.speech.between
        seen = seen.view(len(tail), geometry.count, -1, OUT)

        def words(ids: list[int]) -> Tensor:
            row = F.embedding(torch.tensor(ids, device=self.device), embed)
            return row.expand(len(tail), -1, -1)

        parts = [words(prefix), seen[:, 0]]
        for k in range(1, geometry.count):
            parts += [words(between), seen[:, k]]
        x = torch.cat([*parts, F.embedding(tail, embed)], 1)
        length = tail.shape[1]
        cos, sin = text_rope(
            len(prefix), geometry.patches, geometry.grid, geometry.count, len(between), length,
            self.device,
        )  # fmt: skip
        x, cos, sin = any_size(x, 0, 1), any_size(cos, 0), any_size(sin, 0)
        hidden = language(layers, self.base["norm"], x, cos, sin, self.layer)[:, -length:]
        return answer_logits(hidden, batch.where.to(self.device, non_blocking=True), embed)

    def label_loss(
        self, batch: Batch, seen: Tensor, owners: Owners
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of each token's own labels, and their accuracies."""
        things = batch.packed.things.to(self.device, non_blocking=True)
        names = ("thing", "text", "left", "right", "letter", "digit")
        thing, text, left, right, letter, digit = (
            getattr(owners, name).flatten(1) for name in names
        )
        # A character hides what is behind it.
        is_text, is_thing = text > 0, (thing > 0) & (text == 0)
        geometry = batch.shape.geometry
        grid, patches = geometry.grid, geometry.patches

        def of_thing(number: int) -> Tensor:
            return things[:, :, number].gather(1, (thing - 1).clamp(min=0))

        steps = torch.tensor(list(DIRECTIONS.values()), device=self.device)
        sign = things[:, :, None, 7:9].sign()
        moving = (sign == steps).all(-1)  # [B, K, directions]
        motion = torch.where(moving.any(-1), moving.int().argmax(-1) + 1, 0)
        motion = motion.gather(1, (thing - 1).clamp(min=0))
        palette = torch.zeros_like(text)
        is_board = torch.zeros_like(is_text)
        roles = [texts.role for texts in batch.packed.texts]
        for number, texts in enumerate(batch.packed.texts):
            own = text == number + 1
            fields = texts.fields.to(self.device, non_blocking=True)
            palette = torch.where(own, fields[:, 6:7], palette)
            if texts.role == "board" and "clock" in roles:
                is_board = own
        line = (torch.arange(grid, device=self.device) * 2 + 1) * PLACE_BINS // (2 * grid)
        place_y = line.view(1, 1, -1, 1).expand(len(seen), patches, -1, grid).flatten(1)
        place_x = line.view(1, 1, 1, -1).expand(len(seen), patches, grid, -1).flatten(1)
        time = torch.arange(patches, device=self.device)[:, None].expand(-1, grid**2).flatten()
        time = time.expand(len(seen), -1)
        owned = is_text | is_thing
        moves = is_thing if geometry.frames > 1 else is_thing & False
        labels = {
            "shape": (torch.where(is_thing, of_thing(0) + 1, 0), is_thing, 0.03),
            "left": (left, is_text, 0.03),
            "right": (right, is_text, 0.03),
            "colour": (of_thing(1), is_thing, 0.0),
            "motion": (motion, moves, 0.0),
            "plate": (palette, is_text, 0.0),
            "tens": (time // 10, is_board, 0.0),
            "ones": (time % 10, is_board, 0.0),
            "letter": (letter, letter > 0, 0.0),  # of which entry a character is a part
            "digit": (digit, digit > 0, 0.0),
            "x": (place_x, owned, 0.02),
            "y": (place_y, owned, 0.02),
        }
        features = F.rms_norm(seen.float(), (OUT,)).to(self.dtype)
        names = list(HEADS)
        weight = torch.cat([self.heads[f"{name}.weight"] for name in names]).to(self.dtype)
        bias = torch.cat([self.heads[f"{name}.bias"] for name in names]).to(self.dtype)
        logits = F.linear(features, weight, bias).float().flatten(0, 1)
        loss, accuracy = seen.new_zeros((), dtype=torch.float32), {}
        for name, part in zip(names, logits.split([HEADS[n] for n in names], 1), strict=True):
            target, counted, least = labels[name]
            share = counted.float() + least * ~counted
            each = F.cross_entropy(part, target.flatten(), reduction="none").view_as(share)
            loss = loss + (each * share).sum() / share.sum().clamp(min=1)
            right_ones = (part.argmax(-1).view_as(target) == target) & counted
            accuracy[name] = right_ones.sum() / counted.sum().clamp(min=1)
        return loss, accuracy

    # The loop

    def train(self) -> None:
        args = self.args
        answers = args.stage == "answers"
        phases = [shapes for _, shapes in ANSWER_PHASES] if answers else TOWER_PHASES
        times = factors(args.favour, MEDIA)
        phases = [
            [replace(s, weight=s.weight * times.get(s.geometry.media, 1.0)) for s in shapes]
            for shapes in phases
        ]
        phase = Value("i", self.phase_at(args.begin) if answers else 0)
        turns = args.turns if answers else 0
        tokenizer = self.tokenizer if answers else ""
        seed = args.seed * 1000 + round(100 * args.begin) + (500 if answers else 0)
        batches = stream(
            phases, phase, args.budget, turns, args.choices, seed, tokenizer, args.workers,
            self.ranks.rank, self.ranks.size,
        )  # fmt: skip
        start, said, step, fresh = time.time(), time.time(), 0, 0
        sums = torch.zeros(len(CATEGORIES), 2, device=self.device)
        visual = videos = 0
        losses: list[Tensor] = []
        labels: dict[str, Tensor] = {}
        saved = start
        aborted = False
        while (spent := self.ranks.agree(math.inf if aborted else time.time() - start)) < (
            args.seconds
        ):
            progress = args.begin + (args.end - args.begin) * spent / args.seconds
            if answers:
                phase.value = self.phase_at(progress)
            warm = min(1.0, (step + 1) / 60)
            rate = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            batch = next(batches)
            seen, owners = self.see(batch, train=True)
            loss, labels = self.label_loss(batch, seen, owners)
            losses_now = [loss.detach()]
            if answers:
                logits = self.answer(batch, seen, effective(self.base, self.lora))
                target = batch.target.to(self.device, non_blocking=True)
                talk = self.talk_loss(batch, logits, target)
                loss = talk + args.aux * loss
                losses_now.append(talk.detach())
                sums += self.score(batch, logits.detach(), target)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.ranks.average([p.grad for p in params])
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            self.optimizer.step()
            losses.append(torch.stack(losses_now))
            step += 1
            videos += len(seen) // batch.shape.geometry.count
            visual += seen.shape[0] * seen.shape[1]
            if time.time() - said > 5 or step in (1, 5, 20):
                mean = torch.stack(losses[fresh:]).mean(0).tolist()
                fresh = len(losses)
                took = time.time() - said
                self.log(
                    step=step, t=round(time.time() - start, 1), progress=round(progress, 3),
                    loss=[round(x, 4) for x in mean], videos=videos, vis_per_s=round(visual / took),
                    step_s=round(took / max(1, visual) * seen.shape[0] * seen.shape[1], 3),
                    shape=str(batch.shape.geometry.visual), **self.named(sums),
                    labels={k: round(v.item(), 3) for k, v in labels.items()},
                )  # fmt: skip
                accuracy = (sums[:, 0] / sums[:, 1].clamp(min=1)).mean().item()
                if not math.isfinite(sum(mean)):
                    raise SystemExit("the loss is not finite: stopped")
                waited = time.time() - start
                if (
                    answers
                    and args.begin == 0
                    and 0 < args.abort_at < waited
                    and accuracy < args.abort_below
                ):
                    self.log(event="abort", accuracy=accuracy)
                    aborted = True
                sums.zero_()
                visual, said = 0, time.time()
            if self.ranks.rank == 0 and time.time() - saved > args.save_every:
                self.checkpoint()
                saved = time.time()
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0
        self.log(
            event="done",
            steps=step,
            videos=videos,
            seconds=round(time.time() - start, 1),
            gib=round(peak, 1),
        )

    def talk_loss(self, batch: Batch, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over answer tokens, those of an emphasised category counting as so many."""
        each = F.cross_entropy(logits, target, reduction="none")
        if self.emphasis is None:
            return each.mean()
        weight = self.emphasis[batch.category[batch.turn].to(self.device, non_blocking=True)]
        return (each * weight).sum() / weight.sum()

    @staticmethod
    def phase_at(progress: float) -> int:
        return next(
            (i for i, (until, _) in enumerate(ANSWER_PHASES) if progress < until),
            len(ANSWER_PHASES) - 1,
        )

    def score(self, batch: Batch, logits: Tensor, target: Tensor) -> Tensor:
        """[categories, 2]: answers wholly right, answers."""
        right = (logits.argmax(-1) == target).float()
        category = batch.category.to(self.device, non_blocking=True)
        turn = batch.turn.to(self.device, non_blocking=True)
        whole = torch.ones(len(category), device=self.device)
        whole.scatter_reduce_(0, turn, right, "amin")
        out = torch.zeros(len(CATEGORIES), 2, device=self.device)
        return out.index_add_(0, category, torch.stack([whole, torch.ones_like(whole)], 1))

    @staticmethod
    def named(sums: Tensor) -> dict[str, dict[str, float]]:
        rows = sums.tolist()
        named = {c: round(r / n, 3) for c, (r, n) in zip(CATEGORIES, rows, strict=True) if n}
        return {"acc": named} if named else {}

    @torch.no_grad()
    def evaluate(self) -> None:
        self.block, self.layer = block, layer
        layers = effective(self.base, self.lora)
        for shape, count in EVALUATED[self.ranks.rank :: self.ranks.size]:
            count = int(count * self.args.eval_share)
            sums = torch.zeros(2, len(CATEGORIES), 2, device=self.device)
            letters = torch.zeros(2, device=self.device)  # multiple choice: right, asked
            size = max(1, self.args.budget // shape.geometry.visual)
            for batch, chats in held_out(shape, count, size, HELD_OUT_SEED, self.tokenizer):
                seen, _ = self.see(batch, train=False)
                logits = self.answer(batch, seen, layers)
                numbers = torch.tensor(
                    [k for turns in chats for k in range(len(turns))], device=self.device
                )
                target = batch.target.to(self.device)
                right = (logits.argmax(-1) == target).float()
                whole = torch.ones(len(numbers), device=self.device)
                whole.scatter_reduce_(0, batch.turn.to(self.device), right, "amin")
                asked = [bool(turn.choices) for turns in chats for turn in turns]
                picked = whole[torch.tensor(asked, device=self.device)]
                letters += torch.stack([picked.sum(), picked.new_tensor(len(picked))])
                for k in range(2):
                    chosen = numbers == k
                    pair = torch.stack([whole[chosen], torch.ones_like(whole[chosen])], 1)
                    sums[k].index_add_(0, batch.category.to(self.device)[chosen], pair)
            for k in range(2):
                total = sums[k].sum(0).tolist()
                self.log(
                    event="held-out",
                    shape=name(shape),
                    turn=k + 1,
                    n=int(total[1]),
                    accuracy=round(total[0] / max(1, total[1]), 4),
                    multiple_choice=letters.int().tolist(),
                    **self.named(sums[k]),
                )

    # Files

    def checkpoint(self) -> None:
        state = {
            name: {k: v.detach().cpu() for k, v in group.items()}
            for name, group in self.groups.items()
        }
        save_state(self.args.save, self.groups, self.optimizer, self.args.stage)

        def narrow(name: str, prefix: str = "") -> dict[str, Tensor]:
            return {prefix + k: v.to(torch.bfloat16) for k, v in state[name].items()}

        whole = narrow("tower")
        early = {k: v for k, v in whole.items() if k.startswith("blocks.")}
        save_file(early, self.args.out / "tower-1.safetensors")
        save_file(
            {k: v for k, v in whole.items() if k not in early},
            self.args.out / "tower-2.safetensors",
        )
        if self.args.stage == "answers":
            lora = narrow("lora")
            half = {k: v for k, v in lora.items() if k.startswith("self_attn")}
            rest = {k: v for k, v in lora.items() if k not in half}
            save_file(half, self.args.out / "lora-1.safetensors")
            save_file(rest, self.args.out / "lora-2.safetensors")

    def log(self, **record: object) -> None:
        if self.ranks.rank > 0 and record.get("event") != "held-out":
            return
        line = json.dumps(record)
        print(line if "event" in record else line[:260], flush=True)
        self.log_file.write(line + "\n")
        self.log_file.flush()


def name(shape: Shape) -> str:
    g = shape.geometry
    return f"{g.media} {g.count}x{g.patches}x{g.grid}x{g.grid} {shape.level}"


def clip(name: str) -> np.ndarray:
    """Through PyAV, or through OpenCV where PyAV is absent."""
    try:
        return load_clip(name)
    except ImportError:
        import cv2

        video, frames = cv2.VideoCapture(str(ASSETS / name)), []
        while (read := video.read())[0]:
            frames.append(read[1][:, :, ::-1])
        return np.stack(frames)


if __name__ == "__main__":
    main()
