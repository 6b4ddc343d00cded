"""VideoLLaMA2 on transformers' own language models.

A stock causal language model whose decoder carries the towers and connectors, under upstream's
parameter names (`model.vision_tower`, `model.mm_projector`, `model.audio_tower`,
`model.mm_projector_a`), so that official checkpoints fit as they are.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralForCausalLM, MixtralForCausalLM, Qwen2ForCausalLM

from purekv.errors import PureKVError
from purekv.families.videollama2.beats import BEATs, BEATsConfig
from purekv.families.videollama2.config import (
    SAMPLER_PADDING,
    VideoLLaMA2Config,
    VideoLLaMA2MistralConfig,
    VideoLLaMA2MixtralConfig,
    VideoLLaMA2Qwen2Config,
)
from purekv.families.videollama2.connector import STCConnector
from purekv.families.videollama2.placeholders import MEDIA, expand
from purekv.families.videollama2.vision import VisionTower
from purekv.upstream import cache_in


class Multimodal:
    """What VideoLLaMA2 adds to a causal language model. First among the bases.

    Forwards and `generate` take, besides a language model's arguments:

    - `input_ids` [B, S] with placeholders -200 (image), -201 (video), -202 (audio), one for each
      item or one for each of its tokens;
    - `pixel_values` [n, 3, H, W], `pixel_values_videos` [n, frames, 3, H, W] and `audio_values`
      [n, rows, 128], each in the order of its placeholders. Audio without a placeholder of its own
      follows its video.
    """

    def __init__(self: Any, config: Any, beats: BEATsConfig | None = None) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        decoder = self.model
        decoder.vision_tower = VisionTower(
            config.vision_config, getattr(config, "mm_vision_select_layer", -2)
        )
        decoder.mm_projector = STCConnector(
            config.vision_config.hidden_size,
            config.hidden_size,
            SAMPLER_PADDING[config.mm_projector_type],
        )
        if beats is not None:
            decoder.audio_tower = BEATs(beats)
            decoder.mm_projector_a = _audio_projector(config, beats.hidden_size)

    def encode_video(self: Any, pixel_values_videos: Tensor) -> Tensor:
        """[B, frames, 3, H, W] to the connector's tokens [B, tokens, hidden]."""
        pixels = pixel_values_videos.to(self.device, self.dtype)
        features = self.model.vision_tower(pixels.flatten(0, 1))
        return self.model.mm_projector(features.unflatten(0, pixels.shape[:2]))

    def encode_image(self: Any, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W], each taken for a video that stands still, to [B, tokens, hidden]."""
        pixels = pixel_values.to(self.device, self.dtype)
        features = self.model.vision_tower(pixels)[:, None]
        return self.model.mm_projector(features.expand(-1, self.config.num_frames, -1, -1))

    def encode_audio(self: Any, audio_values: Tensor) -> Tensor:
        """Filter banks [B, rows, 128] to [B, tokens, hidden]."""
        if not hasattr(self.model, "audio_tower"):
            raise PureKVError("this checkpoint has no audio tower; leave audio_values out")
        fbank = audio_values.to(self.device, self.dtype)
        return self.model.mm_projector_a(self.model.audio_tower(fbank))

    def embed_prompt(self: Any, prompt_ids: Tensor, media: dict[str, Tensor]) -> Tensor:
        """Expanded ids [B, S] to embeddings [B, S, hidden], features at their placeholders."""
        encode = {
            "pixel_values": self.encode_image,
            "pixel_values_videos": self.encode_video,
            "audio_values": self.encode_audio,
        }
        embeds = self.get_input_embeddings()(prompt_ids.clamp(min=0))
        for name, values in media.items():
            here = (prompt_ids == MEDIA[name])[..., None]
            embeds = embeds.masked_scatter(here, encode[name](values).to(embeds.dtype))
        return embeds

    def _check_length(self: Any, length: int, cache: Any) -> None:
        longest = self.config.longest_prompt
        length += 0 if cache is None else cache.get_seq_length()
        if longest is not None and length > longest:
            raise PureKVError(
                f"{length} tokens, and this checkpoint attends within a sliding window of "
                f"{longest}, which is supported up to that length; use fewer frames"
            )

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        audio_values: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """A language model's output, for every position of the expanded prompt.

        `prompt_ids` [B, S] say which positions of `inputs_embeds` are of media: for whoever asks
        where they are; the model itself does not.
        """
        if inputs_embeds is None:
            media = _given(pixel_values, pixel_values_videos, audio_values)
            _check_placeholders(input_ids, media)
            if media:
                input_ids, attention_mask = expand(self.config, input_ids, attention_mask, media)
            inputs_embeds = self.embed_prompt(input_ids, media)
        self._check_length(inputs_embeds.shape[1], cache_in(kwargs))
        return super().forward(  # type: ignore[misc]
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        audio_values: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The given ids, as they were given, with the new ones behind.

        To go on from a returned cache, the ids must be as long as what it has seen: give them
        expanded from the start, as the processor does. Penalties of repetition count only new
        tokens, as upstream.
        """
        ids: Any = input_ids if inputs is None else inputs
        media = _given(pixel_values, pixel_values_videos, audio_values)
        if not media:
            cache = cache_in(kwargs)
            if cache is None or not cache.get_seq_length():
                _check_placeholders(ids, media)
            elif ids.shape[1] <= cache.get_seq_length():
                raise PureKVError(
                    f"the cache has seen {cache.get_seq_length()} tokens and input_ids are "
                    f"{ids.shape[1]}; to go on from a cache, begin with the processor's ids, which "
                    "have a placeholder for each token of a video"
                )
            length, output = (
                ids.shape[1],
                super().generate(  # type: ignore[misc]
                    ids.clamp(min=0), attention_mask=attention_mask, **kwargs
                ),
            )
            return _behind(ids, output, length)
        prompt_ids, mask = expand(self.config, ids, attention_mask, media, padding_side="left")
        output = super().generate(  # type: ignore[misc]
            inputs_embeds=self.embed_prompt(prompt_ids, media),
            attention_mask=torch.ones_like(prompt_ids) if mask is None else mask,
            prompt_ids=prompt_ids,
            **kwargs,
        )
        return _behind(ids, output, 0)


def _given(images: Tensor | None, videos: Tensor | None, audio: Tensor | None) -> dict[str, Tensor]:
    media = zip(MEDIA, (images, videos, audio), strict=True)
    return {name: values for name, values in media if values is not None}


def _check_placeholders(ids: Tensor | None, media: dict[str, Tensor]) -> None:
    if ids is None:
        raise PureKVError("give input_ids or inputs_embeds")
    if not media and ids.shape[1] > 1 and bool((ids < 0).any()):
        raise PureKVError(
            "the prompt has placeholders and nothing to put there; give pixel_values_videos, "
            "pixel_values or audio_values"
        )


def _behind(ids: Tensor, output: Any, length: int) -> Any:
    """`generate`'s output with `ids` in the place of the first `length` of its sequences."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    ids = ids.to(sequences.device).repeat_interleave(len(sequences) // len(ids), dim=0)
    sequences = torch.cat([ids, sequences[:, length:]], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def _audio_projector(config: Any, channels: int) -> nn.Module:
    kind = getattr(config, "mm_projector_a_type", "linear")
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind != "linear" and depth is None:
        raise PureKVError(f"mm_projector_a_type={kind!r} is not supported; mlp2x_gelu is")
    first = nn.Linear(channels, config.hidden_size)
    if depth is None:
        return first
    layers: list[nn.Module] = [first]
    for _ in range(1, int(depth[1])):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)


class VideoLLaMA2Mistral(Multimodal, MistralForCausalLM):
    config_class = VideoLLaMA2MistralConfig


class VideoLLaMA2Mixtral(Multimodal, MixtralForCausalLM):
    config_class = VideoLLaMA2MixtralConfig


class VideoLLaMA2Qwen2(Multimodal, Qwen2ForCausalLM):
    config_class = VideoLLaMA2Qwen2Config


MODELS: dict[str, Any] = {
    VideoLLaMA2Config.model_type: VideoLLaMA2Mistral,
    VideoLLaMA2MistralConfig.model_type: VideoLLaMA2Mistral,
    VideoLLaMA2MixtralConfig.model_type: VideoLLaMA2Mixtral,
    VideoLLaMA2Qwen2Config.model_type: VideoLLaMA2Qwen2,
}
