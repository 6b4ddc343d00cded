"""The vision tower: stock CLIP or SigLIP up to the layer that VideoLLaMA2 looks at."""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel

TOWERS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}


class VisionTower(nn.Module):
    """Patches of `hidden_states[select_layer]`, before any final norm.

    Layers above, the final norm and SigLIP's pooling head are in checkpoints, but nothing uses
    them, so they are not built. The names are upstream's.

    Args:
        config: of the whole tower.
        select_layer: number of the hidden state; 0 is the embeddings', -1 the last layer's.
    """

    def __init__(self, config: Any, select_layer: int) -> None:
        super().__init__()
        config = copy.deepcopy(config)
        if select_layer < 0:
            select_layer += config.num_hidden_layers + 1
        config.num_hidden_layers = select_layer
        config.vision_use_head = False
        tower = TOWERS[config.model_type](config)
        tower = getattr(tower, "vision_model", tower)  # releases differ in how deep it lies
        tower.post_layernorm = nn.Identity()
        self.vision_tower = nn.ModuleDict({"vision_model": tower})
        self.class_tokens = 1 if config.model_type == "clip_vision_model" else 0

    @property
    def config(self) -> Any:
        return self.vision_tower["vision_model"].config

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, patches, hidden], row by row."""
        output = self.vision_tower["vision_model"](pixel_values)
        return output.last_hidden_state[:, self.class_tokens :]
