"""Files and questions to what a VideoLLaMA2 model takes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature

from purekv.errors import PureKVError
from purekv.families.videollama2.config import has_audio, read_config, vision_tower_path
from purekv.families.videollama2.fbank import fbank, thirty_seconds, video_clips
from purekv.families.videollama2.placeholders import TAGS, expand
from purekv.media import read_audio, read_frames, read_image

MAX_FRAMES = 32

SYSTEM_MESSAGE = (
    "<<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as "
    "possible, while being safe.  Your answers should not include any harmful, unethical, racist, "
    "sexist, toxic, dangerous, or illegal content. Please ensure that your responses are socially "
    "unbiased and positive in nature.\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information.\n<</SYS>>"
)
"""What the Mistral variants were trained to read first; Qwen2's template has its own."""


@dataclass(frozen=True)
class Sampling:
    """How a video becomes frames, in the words of transformers' video processors."""

    num_frames: int
    image_size: int
    fps: None = None
    temporal_patch_size: int = 1

    @property
    def min_frames(self) -> int:
        return self.num_frames

    @property
    def max_frames(self) -> int:
        return self.num_frames

    @property
    def size(self) -> dict[str, int]:
        """Pixels of a frame: there is one size."""
        return dict.fromkeys(("shortest_edge", "longest_edge"), self.image_size**2)


class Processor:
    """Prompts, pixels and filter banks of one checkpoint.

    Prompts have the tags <video>, <image> and <audio>; ids have a placeholder for each token of
    what stands there, so that a chat can go on from its cache.
    """

    image_token, video_token, audio_token = "<image>", "<video>", "<audio>"

    def __init__(self, tokenizer: Any, pictures: Any, config: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        self.config = config
        self.image_processor = self.video_processor = Sampling(
            config.num_frames, config.vision_config.image_size
        )
        self._pictures = pictures

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Processor":
        """Raises PureKVError if the tokenizer or the tower's preprocessor_config.json is not
        there."""
        config = read_config(directory)
        tower = vision_tower_path(config, directory)
        try:
            pictures = AutoImageProcessor.from_pretrained(tower, backend="pil")
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise PureKVError(
                f"{directory} lacks its tokenizer, or {tower} its preprocessor_config.json; "
                "download both"
            ) from error
        return cls(tokenizer, pictures, config)

    def ask(
        self,
        question: str,
        *,
        video: str | Path | None = None,
        image: str | Path | None = None,
        audio: str | Path | None = None,
        sound: bool = True,
    ) -> BatchFeature:
        """A model's inputs for a question about one file, sampled as upstream samples it.

        `sound`: whether an audio-visual model hears a video's sound (silence where it has none).
        """
        kinds = {"video": video, "image": image, "audio": audio}
        given = [kind for kind, path in kinds.items() if path is not None]
        if len(given) > 1:
            raise PureKVError(f"a question about {' and '.join(given)}; give one of them")
        content = [*({"type": kind} for kind in given), {"type": "text", "text": question}]
        text = self.apply_chat_template([{"role": "user", "content": content}])
        media: dict[str, Any] = {}
        if video is not None:
            media["videos"] = [read_frames(video, self._frame_numbers)]
            if sound and self.hears:
                media["audio"] = [read_audio(video)]
        if image is not None:
            media["images"] = [read_image(image)]
        if audio is not None:
            wave = read_audio(audio)
            if wave is None:
                raise PureKVError(f"no sound in {audio}; give a file with sound")
            media["audio"] = [wave]
        return self(text, **media)

    def _frame_numbers(self, total: int) -> list[int]:
        """The middles of `num_frames` equal segments."""
        segment = (total - 1) / self.config.num_frames
        middles = segment * (np.arange(self.config.num_frames) + 0.5)
        return np.round(middles + 1e-6).astype(int).tolist()

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audio: Sequence[np.ndarray | None] | None = None,
        *,
        padding: bool = True,
        return_tensors: str = "pt",
        images_kwargs: dict[str, Any] | None = None,
        videos_kwargs: dict[str, Any] | None = None,
    ) -> BatchFeature:
        """A left-padded batch.

        Args:
            text: prompts with tags, chat template applied.
            images: pictures, or uint8 [height, width, 3].
            videos: frames of each, uint8 [frames, height, width, 3]; as many in all of them.
            audio: waves [samples] in -1 to 1 at 16 kHz; without an <audio> tag those of the
                videos, None for a silent one.
            padding, return_tensors: as transformers' processors have them; there is no choice.
        """
        if not padding or return_tensors != "pt":
            raise PureKVError('padding is always on and return_tensors always "pt"; leave them out')
        for settings in (images_kwargs or {}, videos_kwargs or {}):
            if "size" in settings:
                size = self.config.vision_config.image_size
                raise PureKVError(
                    f"this model sees {size} x {size} pixels, whatever the size of a frame; leave "
                    "max_pixels out"
                )
        media: dict[str, Tensor] = {}
        if images:
            media["pixel_values"] = self._pixels(images)
        if videos:
            media["pixel_values_videos"] = self._videos(videos)
        prompts = [text] if isinstance(text, str) else text
        if audio:
            alone = any(self.audio_token in prompt for prompt in prompts)
            media["audio_values"] = self._filter_banks(audio, alone)
        rows = [self._tokenize(prompt) for prompt in prompts]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        ids, expanded = expand(self.config, ids, mask, media, padding_side="left")
        return BatchFeature({"input_ids": ids, "attention_mask": expanded, **media})

    def _tokenize(self, prompt: str) -> list[int]:
        """Each part between tags on its own, as upstream does: some tokenizers begin with a
        space."""
        ids: list[int] = []
        for part in re.split(f"({'|'.join(TAGS)})", prompt):
            if part in TAGS:
                ids.append(TAGS[part])
            elif part:
                ids += self.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    def _pixels(self, pictures: Sequence[Any]) -> Tensor:
        """[n, 3, H, W]."""
        pictures = [
            one if isinstance(one, Image.Image) else Image.fromarray(one) for one in pictures
        ]
        return self._pictures(pictures, return_tensors="pt")["pixel_values"]

    def _videos(self, videos: Sequence[Any]) -> Tensor:
        """[n, frames, 3, H, W]."""
        counts = {len(frames) for frames in videos}
        if len(counts) > 1 or max(counts) > MAX_FRAMES:
            raise PureKVError(
                f"videos of {', '.join(map(str, sorted(counts)))} frames; sample equally many, at "
                f"most {MAX_FRAMES}, from each"
            )
        made = [self._pixels(frames) for frames in videos]
        # The connector takes frames in pairs.
        return torch.stack([one if len(one) > 1 else one.expand(2, -1, -1, -1) for one in made])

    def _filter_banks(self, waves: Sequence[np.ndarray | None], alone: bool) -> Tensor:
        """[n, rows, 128]; of a video's sound clips are taken, of a file its first half minute."""
        heard = [np.zeros(1, np.float32) if wave is None else wave for wave in waves]
        heard = heard if alone else [video_clips(wave) for wave in heard]
        banks = [torch.from_numpy(fbank(thirty_seconds(wave))) for wave in heard]
        return torch.stack(banks).bfloat16().float()  # upstream's rounding

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        tokenize: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """Messages whose content is text, or parts as transformers has them, to a prompt."""
        if tokenize:
            raise PureKVError("give the prompt to the processor together with its media")
        plain = [{"role": one["role"], "content": _plain(one["content"])} for one in messages]
        if "qwen2" not in self.config.model_type and plain[0]["role"] != "system":
            plain.insert(0, {"role": "system", "content": SYSTEM_MESSAGE})
        return self.tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    @property
    def hears(self) -> bool:
        """Whether the model takes a video's sound."""
        return has_audio(self.config)

    @property
    def chat_template(self) -> Any:
        return self.tokenizer.chat_template

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What tells it from others."""
        return {"pictures": self._pictures.to_dict(), "num_frames": self.config.num_frames}


def _plain(content: str | Sequence[dict[str, str]]) -> str:
    """Upstream's order: tags, each on a line, then the text."""
    if isinstance(content, str):
        return content
    tags = [f"<{part['type']}>\n" for part in content if part["type"] != "text"]
    return "".join(tags) + "".join(part["text"] for part in content if part["type"] == "text")
