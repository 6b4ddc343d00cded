"""The simplest thing a user can do instead: show the model less, and compress nothing."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL.Image import Image

from purekv.errors import PureKVError
from purekv.evals.answering import Media
from purekv.media import Clip

NAME = "frames"


@dataclass(frozen=True)
class FewerFrames:
    """Evenly spaced frames of each video, as many as a share of the visual tokens allows, two at
    least; images shrink to that share of their pixels, as far as the processor lets them.

    It has the fields of a `PureKVConfig` that a table shows.
    """

    budget: float
    prefill: str = "dense"
    evict: str | None = None
    first_token: str = "exact"
    source_layers: None = None

    def __post_init__(self) -> None:
        if not isinstance(self.budget, float) or not 0.0 < self.budget <= 1.0:
            raise PureKVError(
                f"method {NAME!r} needs a share of the visual tokens, not budget={self.budget}; "
                "write one such as 0.2"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"method": NAME, **asdict(self)}

    def thin(self, media: Media) -> Media:
        return Media(
            tuple(self._clip(video) for video in media.videos),
            tuple(self._image(image) for image in media.images),
        )

    def _clip(self, clip: Clip) -> Clip:
        frames = len(clip.frames)
        fewer = max(2, 2 * round(self.budget * frames / 2))  # a temporal patch has two
        if fewer >= frames:
            return clip
        # In the middle of equal stretches of time.
        chosen = ((np.arange(fewer) + 0.5) * frames / fewer).astype(int)
        return Clip(clip.frames[chosen], clip.fps * fewer / frames)

    def _image(self, image: Image) -> Image:
        scale = self.budget**0.5
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size)
