"""One question about videos and images, looked at from the inside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.inspect.agreement import best, held_by_source, serving_layers, spearman
from purekv.inspect.collect import Recorder, Recording
from purekv.media import Clip
from purekv.report import Report
from purekv.session import Chat


@dataclass(frozen=True)
class Inspection:
    """What a question did to one prompt. L layers, G KV heads, V visual tokens."""

    question: str
    config: PureKVConfig
    full: str
    """The answer of the full cache."""
    compressed: str
    """The answer of the compressed one."""
    report: Report
    recording: Recording

    @property
    def score(self) -> Tensor:
        """[L, G, V]"""
        assert self.recording.score is not None
        return self.recording.score

    @property
    def kept(self) -> Tensor:
        """bool [L, G, V]"""
        assert self.recording.kept is not None
        return self.recording.kept

    @property
    def serving(self) -> list[int | None]:
        """The measured layer that each layer is scored with."""
        return serving_layers(self.report.source_layers, len(self.kept))

    @property
    def recall_top(self) -> int:
        """How many tokens of a head `recall` asks for: the budget."""
        return max(1, self.report.kept_visual_tokens[0])

    @cached_property
    def spearman(self) -> Tensor:
        """[L, L]; rank correlation of the layers' visual attention, mean over heads."""
        return spearman(self.recording.visual_attention)

    @cached_property
    def recall(self) -> Tensor:
        """[L, L], source by target; share of each head's own best tokens that CLIE from that source
        keeps. Meant where the source is not above the target."""
        norm = self.recording.visual_norm
        own = best(self.recording.own * norm, self.recall_top)
        return held_by_source(own, self.recording.visual_attention, norm, self.recall_top)


@torch.inference_mode()
def inspect_prompt(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    question: str,
    config: PureKVConfig,
    *,
    videos: Sequence[Clip] = (),
    images: Sequence[Image] = (),
    max_pixels: int | None = None,
    max_new_tokens: int = 64,
    say: Callable[[str], None] = lambda message: None,
) -> Inspection:
    """Ask with the compressed cache, recording every layer, and with the full one.

    Raises:
        PureKVError: the budget keeps everything, or the request is refused.
    """

    def answer() -> str:
        chat = Chat(model, processor, videos=videos, images=images, max_pixels=max_pixels)
        return chat.ask(question, max_new_tokens=max_new_tokens).text

    say("asking with the compressed cache")
    with Recorder(config, model) as run:
        compressed = answer()
        report, recording = run.report, run.recording
    assert recording is not None
    if recording.kept is None:
        raise PureKVError(
            f"budget={config.budget} keeps all {report.visual_tokens[0]} visual tokens, so there "
            "is nothing to look at; lower it"
        )
    say("asking with the full cache")
    return Inspection(question, config, answer(), compressed, report, recording)
