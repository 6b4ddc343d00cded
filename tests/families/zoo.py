"""Tiny models of every family, and prompts as each family's processor would lay them out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE, VIDEO, START, END, AUDIO, MARK, CLOSE = range(100, 107)
"""Ids above all text; the meaning of the last ones differs from family to family."""
VOCABULARY = 112

Item = tuple[list[int], dict[str, Tensor]]
"""Ids and tensors of one image, video or sound."""

SHOWS: dict[str, list[str]] = {
    "image": ["image"],
    "images": ["image", "image"],
    "video": ["video"],
    "mixed": ["image", "video"],
    "audio": ["video", "audio"],
}


@dataclass(frozen=True)
class Zoo:
    """One family under test."""

    model_type: str
    config: Callable[[], dict[str, Any]]
    """Arguments of its config class."""
    items: dict[str, Callable[[torch.Generator, int], Item]]
    """An item of each modality, from a source of randomness and its size, 0 or 1."""
    collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]] = field(
        default=lambda rows: {
            name: torch.cat([row[name] for row in rows if name in row])
            for name in dict.fromkeys(name for row in rows for name in row)
        }
    )
    """Of the items' tensors, in prompt order."""
    without: tuple[str, ...] = ()
    """Of `SHOWS`, what transformers itself cannot run."""
    video_newline: bool = False
    """Whether a token ends a video."""
    finish: Callable[[dict[str, Tensor]], None] = lambda inputs: None
    """Adds what the processor makes of ids."""

    @property
    def is_present(self) -> bool:
        """In the installed transformers."""
        return self.model_type in CONFIG_MAPPING

    def model(self, attention: str = "sdpa", seed: int = 0) -> Any:
        config = AutoConfig.for_model(self.model_type, **self.config())
        auto = AutoModelForImageTextToText if self.items else AutoModelForCausalLM
        torch.manual_seed(seed)
        model = auto.from_config(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:  # far from uniform attention, so that a wrong key shows
                    scale = weight.shape[1:].numel() ** -0.5
                    weight.normal_(0, scale * (2.0 if "q_proj" in name else 1.0))
        model.set_attn_implementation(attention)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.generation_config.suppress_tokens = list(range(IMAGE, VOCABULARY))
        return model

    def prompt(self, shows: str, rows: list[int], text: int = 0) -> dict[str, Tensor]:
        """Left-padded inputs. A row's number is its seed and its size; `text` adds tokens."""
        made, tensors = [], []
        for row in rows:
            random = torch.Generator().manual_seed(row)
            ids = words(random, 4 + row + text)
            for kind in SHOWS.get(shows, []):
                item_ids, item_tensors = self.items[kind](random, row % 2)
                ids += item_ids + words(random, 3 + row)
                tensors.append(item_tensors)
            made.append(ids + words(random, 5 - row))
        width = max(map(len, made))
        padded = [[0] * (width - len(ids)) + ids for ids in made]
        lengths = torch.tensor([len(ids) for ids in made])
        inputs = {
            "input_ids": torch.tensor(padded),
            "attention_mask": (torch.arange(width) >= width - lengths[:, None]).long(),
            **self.collate(tensors),
        }
        self.finish(inputs)
        return inputs


def words(random: torch.Generator, count: int) -> list[int]:
    return torch.randint(1, IMAGE, (count,), generator=random).tolist()


def text_config(**others: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        **others,
    }


# Families that count patches: image_grid_thw, video_grid_thw.


def patches(random: torch.Generator, grid: tuple[int, int, int], temporal: int) -> Tensor:
    t, h, w = grid
    return torch.randn(t * h * w, 3 * temporal * 4 * 4, generator=random)


def grid_items(video: Callable[[int, int], list[int]], temporal: int = 2) -> dict[str, Any]:
    """Patches of 4 x 4 pixels, merged 2 x 2. `video`: ids from its frames and tokens a frame."""

    def image_item(random: torch.Generator, size: int) -> Item:
        grid = (1, 4, 4 + 2 * size)
        tensors = {
            "pixel_values": patches(random, grid, temporal),
            "image_grid_thw": torch.tensor([grid]),
        }
        return [START, *[IMAGE] * (grid[1] * grid[2] // 4), END], tensors

    def video_item(random: torch.Generator, size: int) -> Item:
        grid = (3 + size, 4, 4)
        tensors = {
            "pixel_values_videos": patches(random, grid, temporal),
            "video_grid_thw": torch.tensor([grid]),
        }
        return video(grid[0], 4), tensors

    return {"image": image_item, "video": video_item}


def in_one_run(frames: int, size: int) -> list[int]:
    return [START, *[VIDEO] * (frames * size), END]


def stamped(frames: int, size: int) -> list[int]:
    """A time stamp before each frame."""
    return [id for n in range(frames) for id in [10 + n, 20, START, *[VIDEO] * size, END]]


def marked(frames: int, size: int) -> list[int]:
    """Frames as images, between two marks of a video."""
    inner = [id for n in range(frames) for id in [START, *[IMAGE] * size, END, 10 + n]]
    return [MARK, *inner, CLOSE]


def token_types(inputs: dict[str, Tensor]) -> None:
    ids = inputs["input_ids"]
    is_video = (ids == MARK).cumsum(-1) > (ids == CLOSE).cumsum(-1)
    is_video |= ids == VIDEO
    is_visual = (ids == IMAGE) | (ids == VIDEO)
    inputs["mm_token_type_ids"] = is_visual.int() + (is_visual & is_video).int()


def mrope(*sections: int, **others: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **others
        }
    }  # fmt: skip


def qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


def qwen2_vl() -> dict[str, Any]:
    vision = {
        "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    return {"text_config": text_config(**mrope(2, 1, 1)), "vision_config": vision, **qwen_ids()}


def qwen2_5_vl() -> dict[str, Any]:
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
        "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 1,
    }  # fmt: skip
    return {"text_config": text_config(**mrope(2, 1, 1)), "vision_config": vision, **qwen_ids()}


def qwen3_vl() -> dict[str, Any]:
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
        "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = text_config(**mrope(2, 1, 1, mrope_interleaved=True))
    return {"text_config": text, "vision_config": vision, **qwen_ids()}


def glm4v() -> dict[str, Any]:
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
        "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "image_size": 16,
    }  # fmt: skip
    return {
        "text_config": text_config(**mrope(2, 1, 1)),
        "vision_config": vision,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_start_token_id": MARK,
        "video_end_token_id": CLOSE,
    }


ZOO = {
    zoo.model_type: zoo
    for zoo in [
        Zoo("qwen2_vl", qwen2_vl, grid_items(in_one_run), finish=token_types),
        Zoo("qwen2_5_vl", qwen2_5_vl, grid_items(in_one_run), finish=token_types),
        Zoo("qwen3_vl", qwen3_vl, grid_items(stamped), finish=token_types),
        Zoo("glm4v", glm4v, grid_items(marked), without=("mixed",), finish=token_types),
    ]
}
