"""Small random checkpoints as upstream writes them: its tensor names, an old-style config.json,
shards with an index, and the vision tower's folder inside. Written from the published names, not
by our model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

HIDDEN, HEADS, KV_HEADS, LAYERS, MLP, VOCABULARY = 64, 4, 2, 3, 96, 320
VISION, VISION_HEADS, VISION_LAYERS, VISION_MLP, PATCH = 32, 2, 3, 48, 4
BEATS, BEATS_HEADS, BEATS_LAYERS, BEATS_MLP, BEATS_EMBED = 32, 4, 2, 40, 24
BEATS_KERNEL, BEATS_GROUPS, BEATS_BUCKETS = 8, 4, 32


@dataclass(frozen=True)
class Kind:
    model_type: str
    tower: str
    connector: str
    image_size: int
    audio: bool = False
    num_frames: int = 4

    @property
    def side(self) -> int:
        return self.image_size // PATCH


KINDS = {
    "mistral": Kind("videollama2_mistral", "clip-tiny", "stc_connector", 24),
    "mixtral": Kind("videollama2_mixtral", "clip-tiny", "stc_connector", 24),
    "qwen2": Kind("videollama2_qwen2", "siglip-tiny", "stc_connector_v35", 28),
    "av": Kind("videollama2_qwen2", "siglip-tiny", "stc_connector_v35", 28, audio=True),
}

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vision_shapes(kind: Kind) -> Shapes:
    clip = kind.tower.startswith("clip")
    shapes: Shapes = {"embeddings.patch_embedding.weight": (VISION, 3, PATCH, PATCH)}
    if clip:
        shapes |= {"embeddings.class_embedding": (VISION,), **norm("pre_layrnorm", VISION)}
    else:
        shapes |= {"embeddings.patch_embedding.bias": (VISION,)}
    shapes["embeddings.position_embedding.weight"] = (kind.side**2 + clip, VISION)
    for number in range(VISION_LAYERS):
        layer = f"encoder.layers.{number}"
        for proj in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{proj}", VISION, VISION)
        shapes |= norm(f"{layer}.layer_norm1", VISION) | norm(f"{layer}.layer_norm2", VISION)
        shapes |= linear(f"{layer}.mlp.fc1", VISION_MLP, VISION)
        shapes |= linear(f"{layer}.mlp.fc2", VISION, VISION_MLP)
    shapes |= norm("post_layernorm", VISION)
    if not clip:
        shapes |= {"head.probe": (1, 1, VISION), **norm("head.layernorm", VISION)}
    return shapes


def connector_shapes(prefix: str = "model.mm_projector") -> Shapes:
    shapes: Shapes = {}
    for stage, first in (("s1", VISION), ("s2", HIDDEN)):
        for number in range(1, 5):
            block, into = f"{prefix}.{stage}.b{number}", first if number == 1 else HIDDEN
            convs = {"conv1": (into, 1), "conv2": (1, 3), "conv3": (HIDDEN, 1)}
            if into != HIDDEN:
                convs["downsample"] = (into, 1)
            for conv, (channels, kernel) in convs.items():
                shapes[f"{block}.{conv}.conv.weight"] = (HIDDEN, channels, kernel, kernel)
                shapes |= norm(f"{block}.{conv}.bn", HIDDEN)
            squeezed = into // 4
            shapes |= {f"{block}.se.fc1.weight": (squeezed, HIDDEN, 1, 1)}
            shapes |= {f"{block}.se.fc1.bias": (squeezed,)}
            shapes |= {f"{block}.se.fc2.weight": (HIDDEN, squeezed, 1, 1)}
            shapes |= {f"{block}.se.fc2.bias": (HIDDEN,)}
    shapes[f"{prefix}.sampler.0.weight"] = (HIDDEN, HIDDEN, 2, 2, 2)
    shapes[f"{prefix}.sampler.0.bias"] = (HIDDEN,)
    shapes |= linear(f"{prefix}.readout.0", HIDDEN, HIDDEN)
    return shapes | linear(f"{prefix}.readout.2", HIDDEN, HIDDEN)


def language_shapes(kind: Kind) -> Shapes:
    head_dim, bias = HIDDEN // HEADS, "qwen2" in kind.model_type
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        for proj, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            shapes |= linear(f"{layer}.self_attn.{proj}", heads * head_dim, HIDDEN, bias)
        shapes |= linear(f"{layer}.self_attn.o_proj", HIDDEN, HEADS * head_dim, bias=False)
        if "mixtral" in kind.model_type:
            shapes |= linear(f"{layer}.block_sparse_moe.gate", 4, HIDDEN, bias=False)
            for expert in range(4):
                moe = f"{layer}.block_sparse_moe.experts.{expert}"
                shapes |= {f"{moe}.w1.weight": (MLP, HIDDEN), f"{moe}.w3.weight": (MLP, HIDDEN)}
                shapes |= {f"{moe}.w2.weight": (HIDDEN, MLP)}
        else:
            shapes |= linear(f"{layer}.mlp.gate_proj", MLP, HIDDEN, bias=False)
            shapes |= linear(f"{layer}.mlp.up_proj", MLP, HIDDEN, bias=False)
            shapes |= linear(f"{layer}.mlp.down_proj", HIDDEN, MLP, bias=False)
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def audio_shapes() -> Shapes:
    shapes: Shapes = {"patch_embedding.weight": (BEATS_EMBED, 1, 16, 16)}
    shapes |= norm("layer_norm", BEATS_EMBED) | linear("post_extract_proj", BEATS, BEATS_EMBED)
    shapes["encoder.pos_conv.0.weight_g"] = (1, 1, BEATS_KERNEL)
    shapes["encoder.pos_conv.0.weight_v"] = (BEATS, BEATS // BEATS_GROUPS, BEATS_KERNEL)
    shapes["encoder.pos_conv.0.bias"] = (BEATS,)
    shapes |= norm("encoder.layer_norm", BEATS)
    for number in range(BEATS_LAYERS):
        layer = f"encoder.layers.{number}"
        for proj in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{proj}", BEATS, BEATS)
        shapes |= linear(f"{layer}.self_attn.grep_linear", 8, BEATS // BEATS_HEADS)
        shapes[f"{layer}.self_attn.grep_a"] = (1, BEATS_HEADS, 1, 1)
        table = f"{layer}.self_attn.relative_attention_bias.weight"
        shapes[table] = (BEATS_BUCKETS, BEATS_HEADS)
        shapes |= norm(f"{layer}.self_attn_layer_norm", BEATS)
        shapes |= linear(f"{layer}.fc1", BEATS_MLP, BEATS)
        shapes |= linear(f"{layer}.fc2", BEATS, BEATS_MLP) | norm(
            f"{layer}.final_layer_norm", BEATS
        )
    shapes = {f"model.audio_tower.{name}": shape for name, shape in shapes.items()}
    shapes |= linear("model.audio_tower.predictor", 5, BEATS)
    shapes |= linear("model.mm_projector_a.0", HIDDEN, BEATS)
    return shapes | linear("model.mm_projector_a.2", HIDDEN, HIDDEN)


def tensors(kind: Kind, seed: int = 0) -> dict[str, Tensor]:
    """Random weights by upstream's names, float32."""
    prefix = "model.vision_tower.vision_tower.vision_model."
    shapes = {prefix + name: shape for name, shape in vision_shapes(kind).items()}
    shapes |= connector_shapes() | language_shapes(kind) | (audio_shapes() if kind.audio else {})
    weights = random_tensors(shapes, seed)
    for name in [name for name in weights if "relative_attention_bias" in name]:
        first = name.replace(name.split("layers.")[1][0], "0", 1)
        weights[name] = weights[first].clone()
    return weights


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1 and name.endswith("weight"):  # a norm's
            values = 1 + 0.2 * values
        elif len(shape) > 1 and "embed_tokens" not in name and "bias" not in name:
            values = values * (1.4 / values[0].numel() ** 0.5)
            if "q_proj" in name:  # far from uniform attention, so that a wrong key shows
                values = 2 * values
        elif "relative_attention_bias" not in name:
            values = 0.3 * values if "bias" in name else values
        weights[name] = values
    return weights


def config(kind: Kind) -> dict[str, Any]:
    """config.json as transformers 4.40 wrote it."""
    settings = {
        "architectures": ["Videollama2ForCausalLM"],
        "model_type": kind.model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "bos_token_id": None,
        "eos_token_id": 1,
        "mm_vision_tower": kind.tower,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": kind.connector,
        "mm_hidden_size": VISION,
        "num_frames": kind.num_frames,
        "image_aspect_ratio": "pad",
        "use_cache": True,
        "use_mm_proj": True,
        "transformers_version": "4.40.0",
    }
    if "mixtral" in kind.model_type:
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if "qwen2" in kind.model_type:
        settings |= {"use_sliding_window": False, "max_window_layers": 28}
    if kind.audio:
        settings |= {
            "mm_audio_tower": "audio_tower.bin",
            "mm_projector_a_type": "mlp2x_gelu",
            "mm_hidden_size_a": BEATS,
            "hidden_size_a": HIDDEN,
        }
    return settings


def tower_config(kind: Kind) -> dict[str, Any]:
    """A vision tower's config.json, inside that of the whole two-tower model."""
    name = kind.tower.partition("-")[0]
    own = {
        "model_type": f"{name}_vision_model",
        "hidden_size": VISION,
        "intermediate_size": VISION_MLP,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": VISION_HEADS,
        "image_size": kind.image_size,
        "patch_size": PATCH,
    }
    return {"model_type": name, "vision_config": own, "text_config": {"hidden_size": 8}}


TEMPLATE = """\
{%- for message in messages -%}
[{{ message['role'] }}]{{ message['content'] }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}[assistant]{%- endif -%}"""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with a template over plain strings, as upstream's tokenizers have."""
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def write(directory: Path, name: str = "mistral", seed: int = 0, shards: int = 3) -> Path:
    """An official-format checkpoint directory."""
    kind, tower = KINDS[name], directory / KINDS[name].tower
    tower.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(kind)))
    (tower / "config.json").write_text(json.dumps(tower_config(kind)))
    clip = kind.tower.startswith("clip")
    image_processor = {
        "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "do_resize": True,
    }
    if clip:
        image_processor |= {
            "size": {"shortest_edge": kind.image_size},
            "do_center_crop": True,
            "crop_size": {"height": kind.image_size, "width": kind.image_size},
        }
    else:
        image_processor |= {"size": {"height": kind.image_size, "width": kind.image_size}}
    (tower / "preprocessor_config.json").write_text(json.dumps(image_processor))
    tokenizer().save_pretrained(directory)
    save(directory, tensors(kind, seed), shards)
    return directory


def save(directory: Path, weights: dict[str, Tensor], shards: int) -> None:
    """`model.safetensors`, or shards and their index."""
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return
    names, weight_map = list(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
