"""VideoLLaMA2 to PureKV: where its parts and its media tokens are."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from purekv.families.base import Family, Placeholder, token_runs
from purekv.families.videollama2.config import CONFIGS, audio_grid, video_grid
from purekv.families.videollama2.placeholders import AUDIO, IMAGE, MEDIA, VIDEO, expand
from purekv.layout import Layout


class VideoLLaMA2(Family):
    """Frames are the connector's slots, each of two frames of the video. Audio tokens are evicted
    as those of pictures are; a sparse prefill leaves them dense, up to a minute."""

    name = "VideoLLaMA2, 2.1 and 2.1-AV"
    model_types = tuple(CONFIGS)
    native = False
    checkpoints = (
        "DAMO-NLP-SG/VideoLLaMA2-7B-16F",
        "DAMO-NLP-SG/VideoLLaMA2.1-7B-16F",
        "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV",
    )
    pixel_arguments = tuple(MEDIA)
    modalities = ("image", "video", "audio")
    attention = ("sdpa", "eager")
    tested_on = (
        "small random checkpoints of the released format: image, video, audio",
        "purekv eval: videos with sound",
    )
    limits = "loaded by `purekv.families.videollama2.load`; a frame of the grid mixes two"

    def multimodal_model(self, model: nn.Module) -> nn.Module:
        return model

    def language_model(self, model: nn.Module) -> nn.Module:
        return model.model

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return model.model.vision_tower

    def encoders(self, model: nn.Module) -> tuple[nn.Module, ...]:
        names = ("vision_tower", "mm_projector", "audio_tower", "mm_projector_a")
        return tuple(getattr(model.model, name) for name in names if hasattr(model.model, name))

    def visual_token_ids(self, config: Any) -> dict[str, int]:
        return {"image": IMAGE, "video": VIDEO, "audio": AUDIO}

    def layout(self, config: Any, inputs: Mapping[str, Any]) -> Layout:
        ids, mask = inputs.get("prompt_ids"), inputs.get("attention_mask")
        if ids is None and inputs.get("input_ids") is not None:
            media = {name: inputs[name] for name in MEDIA if inputs.get(name) is not None}
            ids, mask = expand(config, inputs["input_ids"], mask, media)
        return super().layout(config, {**inputs, "input_ids": ids, "attention_mask": mask})

    def placeholders(self, config: Any, inputs: Mapping[str, Any]) -> list[Placeholder]:
        """Of an expanded prompt, whose runs tell how many frames their items have."""
        found = []
        for modality, token_id in self.visual_token_ids(config).items():
            runs = token_runs(inputs["input_ids"] == token_id)
            lengths = [length for _, _, length in runs]
            if modality == "audio":
                _, _, frequencies = audio_grid(config, 0)
                grids = [(1, length // frequencies, frequencies) for length in lengths]
            else:
                _, height, width = video_grid(config, 0)
                grids = [(length // (height * width), height, width) for length in lengths]
            found.append(Placeholder(modality, runs, grids))
        return found
