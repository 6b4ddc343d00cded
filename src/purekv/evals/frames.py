"""The simplest thing a user can do instead: show the model less, and compress nothing."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL.Image import Image, fromarray
from transformers import ProcessorMixin

from purekv.budget import visual_budget
from purekv.errors import PureKVError
from purekv.evals.answering import Media
from purekv.media import Clip

NAME = "frames"


@dataclass(frozen=True)
class FewerFrames:
    """Evenly spaced frames of each video, smaller where their number alone does not meet the share
    of the visual tokens; smaller images. Rounded down, as budgets are, to whole rows and columns.
    Sound stays whole.

    Below a processor's smallest size the share is exceeded, since it enlarges what is smaller.

    It has the fields of a `PureKVConfig` that a table shows.
    """

    budget: float
    prefill: str = "dense"
    evict: str | None = None
    first_token: str = "exact"
    source_layers: None = None
    plan: None = None
    multiple_of: int = 28
    """Pixels along the side of a visual token: 28 for Qwen2.5-VL and the embedded model. Processors
    round heights and widths to it."""

    def __post_init__(self) -> None:
        if not isinstance(self.budget, float) or not 0.0 < self.budget <= 1.0:
            raise PureKVError(
                f"method {NAME!r} needs a share of the visual tokens, not budget={self.budget}; "
                "write one such as 0.2"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"method": NAME, **asdict(self)}

    def for_processor(self, processor: ProcessorMixin) -> "FewerFrames":
        """The same for media that this processor will read."""
        images = getattr(processor, "image_processor", None)
        patch, merge = getattr(images, "patch_size", None), getattr(images, "merge_size", None)
        if isinstance(patch, int) and isinstance(merge, int):
            return replace(self, multiple_of=patch * merge)
        return self

    def thin(self, media: Media) -> Media:
        return Media(
            tuple(self._clip(video) for video in media.videos),
            tuple(self._image(image) for image in media.images),
        )

    def _clip(self, clip: Clip) -> Clip:
        frames, height, width = clip.frames.shape[:3]
        patches = math.ceil(frames / 2)  # a temporal patch has two
        fewer = math.ceil(self.budget * patches - 1e-6)
        size = self._size(height, width, patches, fewer)
        chosen = clip.frames
        if fewer < patches:
            # In the middle of equal stretches of time.
            places = ((np.arange(2 * fewer) + 0.5) * frames / (2 * fewer)).astype(int)
            chosen = chosen[places]
        if size != (height, width):
            chosen = np.stack([np.asarray(fromarray(one).resize(size[::-1])) for one in chosen])
        return replace(clip, frames=chosen, fps=clip.fps * len(chosen) / frames)

    def _image(self, image: Image) -> Image:
        size = self._size(image.height, image.width)
        return image if size == (image.height, image.width) else image.resize(size[::-1])

    def _size(self, height: int, width: int, patches: int = 1, fewer: int = 1) -> tuple[int, int]:
        """Height and width at which `fewer` patches cost the share of what `patches` cost."""
        rows, columns = (max(1, round(side / self.multiple_of)) for side in (height, width))
        each = max(1, visual_budget(self.budget, patches * rows * columns) // fewer)
        if each >= rows * columns:
            return height, width

        def unlike(grid: tuple[int, int]) -> float:
            """How much of the share is lost, and how far off the proportions are."""
            lost = math.log(each / (grid[0] * grid[1]))
            return lost + abs(math.log(grid[0] * columns / (grid[1] * rows)))

        grids = [(n, min(columns, each // n)) for n in range(1, min(rows, each) + 1)]
        best = min(grids, key=unlike)
        return best[0] * self.multiple_of, best[1] * self.multiple_of
