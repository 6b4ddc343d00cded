"""GLM-4.1V: frames of a video are image tokens between two marks."""

from typing import Any

from torch import Tensor

from purekv.families.grids import GridFamily


class Glm4V(GridFamily):
    name = "GLM-4.1V"
    model_types = ("glm4v",)
    checkpoints = ("zai-org/GLM-4.1V-9B-Thinking",)
    limits = (
        "images or videos, not both in one prompt (transformers confuses them); no scorer "
        "expected_attention"
    )
    half_rotation = False
    tested_on = ("tiny random models: image, images, video; sdpa, eager",)

    def visual_token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id}

    def tokens_of(self, config: Any, ids: Tensor) -> dict[str, Tensor]:
        opened = (ids == config.video_start_token_id).cumsum(-1)
        is_video = opened > (ids == config.video_end_token_id).cumsum(-1)
        is_visual = ids == config.image_token_id
        return {"image": is_visual & ~is_video, "video": is_visual & is_video}
