"""Tiny models of every family, and prompts as each family's processor would lay them out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
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


def joined(rows: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Items one after the other."""
    items = [item for row in rows for item in row]
    names = dict.fromkeys(name for item in items for name in item)
    return {name: torch.cat([item[name] for item in items if name in item]) for name in names}


@dataclass(frozen=True)
class Zoo:
    """One family under test."""

    model_type: str
    config: Callable[[], dict[str, Any]]
    """Arguments of its config class."""
    items: dict[str, Callable[[torch.Generator, int], Item]]
    """An item of each modality, from a source of randomness and its size, 0 or 1."""
    collate: Callable[[list[list[dict[str, Tensor]]]], dict[str, Tensor]] = joined
    """Of the tensors of each row's items."""
    model_class: str | None = None
    """In transformers; None: as the auto class has it."""
    without: tuple[str, ...] = ()
    """Of `SHOWS`, what transformers itself cannot run."""
    video_newline: bool = False
    """Whether a token ends a video."""
    frames: tuple[int, int] = (3, 4)
    """Of videos of size 0 and 1."""
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
        if self.model_class is None:
            model = auto.from_config(config).eval()
        else:
            model = getattr(transformers, self.model_class)._from_config(config).eval()
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
        made: list[list[int]] = []
        tensors: list[list[dict[str, Tensor]]] = []
        for row in rows:
            random = torch.Generator().manual_seed(row)
            ids = words(random, 4 + row + text)
            tensors.append([])
            for kind in SHOWS.get(shows, []):
                item_ids, item_tensors = self.items[kind](random, row % 2)
                ids += item_ids + words(random, 3 + row)
                tensors[-1].append(item_tensors)
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


# Families with square tiles.


def tower(**others: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4, **others,
    }  # fmt: skip


def tiles(random: torch.Generator, count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=random)


def internvl() -> dict[str, Any]:
    vision = tower(image_size=[16, 16], patch_size=[4, 4])
    return {
        "text_config": {"model_type": "qwen2", **text_config()},
        "vision_config": vision,
        "image_token_id": IMAGE,
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
    }


def internvl_image(random: torch.Generator, size: int) -> Item:
    count = 2 + size
    return [START, *[IMAGE] * (4 * count), END], {"pixel_values": tiles(random, count)}


def internvl_video(random: torch.Generator, size: int) -> Item:
    ids = [id for n in range(3 + size) for id in [7, 10 + n, START, *[IMAGE] * 4, END, 9]]
    return ids, {"pixel_values": tiles(random, 3 + size)}


def smolvlm() -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **text_config()},
        "vision_config": tower(),
        "image_token_id": IMAGE,
        "scale_factor": 2,
    }


def smolvlm_image(random: torch.Generator, size: int) -> Item:
    places = [MARK, CLOSE, CLOSE + 1][: 2 + size]
    ids = [id for place in places for id in [START, place, *[IMAGE] * 4]]
    return [*ids, 9, 9, START, END, *[IMAGE] * 4, START], {"pixel_values": tiles(random, 3 + size)}


def smolvlm_video(random: torch.Generator, size: int) -> Item:
    ids = [
        id for n in range(3 + size) for id in [9, 8, 10 + n, START, END, *[IMAGE] * 4, START]
    ]  # fmt: skip
    return ids, {"pixel_values": tiles(random, 3 + size)}


def by_rows(rows: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """[B, most images, 3, H, W], rows with fewer filled with zeros."""
    if not any(rows):
        return {}
    return {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(
            [torch.cat([item["pixel_values"] for item in row]) for row in rows], batch_first=True
        )
    }


def gemma3() -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"] * 2
    text = text_config(
        num_hidden_layers=4, layer_types=kinds, sliding_window=7, query_pre_attn_scalar=8
    )
    return {
        "text_config": text,
        "vision_config": tower(vision_use_head=False),
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
        "mm_tokens_per_image": 4,
    }


def gemma3_image(random: torch.Generator, size: int) -> Item:
    """Pan and scan: larger images are several."""
    ids = [id for _ in range(1 + size) for id in [START, *[IMAGE] * 4, END]]
    return ids, {"pixel_values": tiles(random, 1 + size)}


def gemma3_types(inputs: dict[str, Tensor]) -> None:
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).int()


# LLaVA: an overview, tiles and line ends.


def llava(vision: dict[str, Any], language: str, **others: Any) -> dict[str, Any]:
    return {
        "text_config": {"model_type": language, **text_config()},
        "vision_config": vision,
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": [[16, 32], [32, 16]],
        **others,
    }


def llava_image(random: torch.Generator, size: int) -> Item:
    height, width = ((16, 32), (32, 16))[size]
    tokens = 16 + height // 4 * (width // 4 + 1)
    return [IMAGE] * tokens, {
        "pixel_values": tiles(random, 3)[None],
        "image_sizes": torch.tensor([[height, width]]),
    }


def llava_video(newline: int) -> Callable[[torch.Generator, int], Item]:
    return lambda random, size: (
        [VIDEO] * (3 * 4 + newline),
        {"pixel_values_videos": tiles(random, 3)[None]},
    )


def llava_onevision() -> dict[str, Any]:
    vision = tower(model_type="siglip_vision_model", vision_use_head=False)
    return llava(vision, "qwen2")


def llava_next_video() -> dict[str, Any]:
    vision = tower(model_type="clip_vision_model", num_hidden_layers=3, projection_dim=16)
    return llava(vision, "llama")


# Grids with something more.


def qwen2_5_omni() -> dict[str, Any]:
    config = qwen2_5_vl()
    audio = {
        "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24, "d_model": 16, "max_source_positions": 50, "n_window": 20,
        "output_dim": 32,
    }  # fmt: skip
    del config["vision_config"]["tokens_per_second"]
    return {
        "text_config": config["text_config"],
        "vision_config": config["vision_config"],
        "audio_config": audio,
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "audio_token_index": AUDIO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "audio_start_token_id": MARK,
        "audio_end_token_id": CLOSE,
        "position_id_per_seconds": 1,
    }


def omni_audio(random: torch.Generator, size: int) -> Item:
    length = 40 - 8 * size
    return [MARK, *[AUDIO] * (length // 4), CLOSE], {
        "input_features": torch.randn(1, 8, 40, generator=random),
        "feature_attention_mask": (torch.arange(40) < length).long()[None],
    }


def omni_items() -> dict[str, Any]:
    items = grid_items(in_one_run)
    video = items["video"]

    def video_item(random: torch.Generator, size: int) -> Item:
        ids, tensors = video(random, size)
        return ids, {**tensors, "video_second_per_grid": torch.tensor([1.0])}

    return {**items, "video": video_item, "audio": omni_audio}


def video_llama_3() -> dict[str, Any]:
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "patch_size": 4,
    }  # fmt: skip
    return {
        "text_config": {"model_type": "qwen2", **text_config()},
        "vision_config": vision,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    }


def video_llama_3_items() -> dict[str, Any]:
    def timed(frames: int, size: int) -> list[int]:
        return [id for n in range(frames) for id in [10 + n, 20, *[VIDEO] * size, 21]]

    def merged(modality: str) -> Callable[[torch.Generator, int], Item]:
        def item(random: torch.Generator, size: int) -> Item:
            ids, tensors = items[modality](random, size)
            return ids, {**tensors, f"{modality}_merge_sizes": torch.tensor([2])}

        return item

    items = grid_items(timed, temporal=1)
    return {modality: merged(modality) for modality in items}


# Language models, and models that no family names.


def language_model() -> dict[str, Any]:
    return text_config()


def gemma3_text() -> dict[str, Any]:
    return gemma3()["text_config"]


def llava_1_5() -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **text_config()},
        "vision_config": tower(model_type="clip_vision_model", projection_dim=16),
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    }


def paligemma() -> dict[str, Any]:
    return {
        "text_config": {"model_type": "gemma", **text_config()},
        "vision_config": tower(model_type="siglip_vision_model", vision_use_head=False),
        "image_token_index": IMAGE,
        "projection_dim": 32,
        "hidden_size": 32,
    }


def whole_image(random: torch.Generator, size: int) -> Item:
    return [IMAGE] * 16, {"pixel_values": tiles(random, 1)}


def no_types(inputs: dict[str, Tensor]) -> None:
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])


TEXT = {
    zoo.model_type: zoo
    for zoo in [
        Zoo("llama", language_model, {}),
        Zoo("mistral", lambda: text_config(sliding_window=None), {}),
        Zoo("qwen2", language_model, {}),
        Zoo("qwen3", language_model, {}),
        Zoo("gemma3_text", gemma3_text, {}),
    ]
}
UNKNOWN = {
    zoo.model_type: zoo
    for zoo in [
        Zoo("llava", llava_1_5, {"image": whole_image}),
        Zoo("paligemma", paligemma, {"image": whole_image}, finish=no_types),
        Zoo("granite", language_model, {}),
    ]
}
ZOO = {
    zoo.model_type: zoo
    for zoo in [
        Zoo("qwen2_vl", qwen2_vl, grid_items(in_one_run), finish=token_types),
        Zoo("qwen2_5_vl", qwen2_5_vl, grid_items(in_one_run), finish=token_types),
        Zoo("qwen3_vl", qwen3_vl, grid_items(stamped), finish=token_types),
        Zoo("glm4v", glm4v, grid_items(marked), without=("mixed",), finish=token_types),
        Zoo("internvl", internvl, {"image": internvl_image, "video": internvl_video}),
        Zoo("smolvlm", smolvlm, {"image": smolvlm_image, "video": smolvlm_video}, by_rows),
        Zoo("gemma3", gemma3, {"image": gemma3_image}, finish=gemma3_types),
        Zoo(
            "llava_onevision",
            llava_onevision,
            {"image": llava_image, "video": llava_video(1)},
            video_newline=True,
            frames=(3, 3),
        ),
        Zoo(
            "llava_next_video",
            llava_next_video,
            {"image": llava_image, "video": llava_video(0)},
            frames=(3, 3),
        ),
        Zoo(
            "qwen2_5_omni_thinker",
            qwen2_5_omni,
            omni_items(),
            model_class="Qwen2_5OmniThinkerForConditionalGeneration",
        ),
        Zoo("video_llama_3", video_llama_3, video_llama_3_items()),
    ]
}
