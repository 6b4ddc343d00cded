"""Loaded checkpoints agree with the plain reference: features, tokens, embeddings, logits, ids."""

import functools

import pytest
import torch
from torch import Tensor

from purekv import PureKVError
from purekv.families.videollama2 import load
from purekv.families.videollama2.beats import PositionalConv, relative_buckets
from tests.videollama2 import checkpoints, reference
from tests.videollama2.checkpoints import KINDS

MAX_DISTANCE = 20
GREEDY = {"do_sample": False, "eos_token_id": None}


@functools.cache
def loaded(directory, name):
    return load(
        checkpoints.write(directory / name, name),
        beats={"max_distance": MAX_DISTANCE} if KINDS[name].audio else None,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("videollama2")
    return lambda name: loaded(root, name)


def video(name: str, batch: int = 1, frames: int = 4) -> Tensor:
    size = KINDS[name].image_size
    return torch.randn(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(3))


def fbank(batch: int = 1, rows: int = 70) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return 15 + 6 * torch.randn(batch, rows, 128, generator=generator)


def features_of(name: str, pixels: Tensor) -> Tensor:
    """[B, T, 3, H, W] to [B, T, patches, hidden]: all layers but the last."""
    kind = KINDS[name]
    w = reference.under(checkpoints.tensors(kind), "model.vision_tower.vision_tower.vision_model.")
    made = reference.vision(
        w, pixels.flatten(0, 1), checkpoints.VISION_LAYERS - 1, checkpoints.VISION_HEADS,
        kind.tower.startswith("clip"),
    )  # fmt: skip
    return made.unflatten(0, pixels.shape[:2])


def tokens_of(name: str, pixels: Tensor) -> Tensor:
    kind = KINDS[name]
    w = reference.under(checkpoints.tensors(kind), "model.mm_projector.")
    padding = 0 if kind.connector.endswith("v35") else 1
    return reference.connector(w, features_of(name, pixels), padding)


def audio_tokens_of(name: str, fbank: Tensor) -> Tensor:
    w = checkpoints.tensors(KINDS[name])
    x = reference.beats(reference.under(w, "model.audio_tower."), fbank, MAX_DISTANCE)
    projector = reference.under(w, "model.mm_projector_a.")
    hidden = reference.gelu(reference.linear(projector, "0", x))
    return reference.linear(projector, "2", hidden)


def embeddings_of(name: str, row: list[int], features: dict[int, Tensor]) -> Tensor:
    """One row: [1, S, hidden], each placeholder replaced by features [tokens, hidden]."""
    table = checkpoints.tensors(KINDS[name])["model.embed_tokens.weight"].double()
    return torch.cat([features[id] if id < 0 else table[id][None] for id in row])[None]


def logits_of(name: str, embeds: Tensor) -> Tensor:
    c = checkpoints
    return reference.language(
        c.tensors(KINDS[name]), embeds, c.LAYERS, c.HEADS, c.KV_HEADS, theta=5000.0
    )


def greedy(name: str, row: list[int], features: dict[int, Tensor], count: int) -> list[int]:
    ids: list[int] = []
    for _ in range(count):
        logits = logits_of(name, embeddings_of(name, row + ids, features))
        ids.append(int(logits[0, -1].argmax()))
    return ids


def media(name: str, batch: int = 1) -> dict[str, Tensor]:
    made = {"pixel_values_videos": video(name, batch)}
    return {**made, "audio_values": fbank(batch)} if KINDS[name].audio else made


def features(name: str, batch: int = 1) -> list[dict[int, Tensor]]:
    """Of each row: what stands at <video>."""
    tokens = tokens_of(name, video(name, batch))
    if KINDS[name].audio:
        tokens = torch.cat([tokens, audio_tokens_of(name, fbank(batch))], dim=1)
    return [{-201: row} for row in tokens]


def close(ours: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
@torch.no_grad()
def test_vision_features(model, name):
    pixels = video(name)
    ours = model(name).model.vision_tower(pixels[0])
    close(ours, features_of(name, pixels)[0], 1e-4)


@pytest.mark.parametrize("frames", [1, 4, 5])
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
@torch.no_grad()
def test_connector_tokens(model, name, frames):
    if name == "qwen2" and frames == 1:
        frames = 2  # without padding a single frame makes no token
    pixels = video(name, 2, frames)
    ours = model(name).encode_video(pixels)
    close(ours, tokens_of(name, pixels), 1e-4)


@torch.no_grad()
def test_audio_tokens(model):
    for rows in (70, 200):  # 32 and 96 tokens: further than `max_distance`
        close(model("av").encode_audio(fbank(2, rows)), audio_tokens_of("av", fbank(2, rows)), 1e-4)


def test_buckets_at_full_size():
    """Half a minute's tokens: near ones, far ones, and those that share the last bucket."""
    made = relative_buckets(1496, num_buckets=320, max_distance=800)
    for offset in range(-1495, 1496):
        row, column = max(0, -offset), max(0, offset)
        assert int(made[row, column]) == reference.bucket(offset, 320, 800)


def test_the_positional_convolution_is_not_blown_up_by_small_weights():
    conv = PositionalConv(4, kernel_size=2, groups=2)
    with torch.no_grad():
        conv.weight_v.normal_(0, 3e-4)  # their norm is as small as the constant under its root
        made = conv(torch.ones(1, 3, 4))
        norm = (conv.weight_v.double().square().sum((0, 1)) + 1e-6).sqrt()
        steps = (conv.weight_v.double() / norm).sum(1)  # [channels, 2]
    expected = torch.stack([steps[:, 1], steps.sum(1), steps.sum(1)])[None]
    close(made, expected, 1e-5)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_embeddings_logits_and_greedy_ids(model, name):
    row = [5, 9, -201, 17, 40, 80]
    there = features(name)[0]
    ours = model(name)
    embeds = embeddings_of(name, row, there)
    inputs = {"input_ids": torch.tensor([row]), **media(name)}
    logits = ours(**inputs, attention_mask=torch.ones(1, 6, dtype=torch.long)).logits
    close(logits, logits_of(name, embeds), 1e-3)
    made = ours.generate(**inputs, max_new_tokens=6, **GREEDY)
    assert made[0, :6].tolist() == row
    assert made[0, 6:].tolist() == greedy(name, row, there, 6)


@torch.no_grad()
def test_a_picture_is_a_video_that_stands_still(model):
    pixels = video("qwen2", 1, 1)[0]  # [1, 3, H, W]
    frames = pixels.expand(4, -1, -1, -1)[None]
    image = model("qwen2")(pixel_values=pixels, input_ids=torch.tensor([[5, -200, 7]]))
    still = model("qwen2")(pixel_values_videos=frames, input_ids=torch.tensor([[5, -201, 7]]))
    torch.testing.assert_close(image.logits, still.logits)


@torch.no_grad()
def test_audio_alone_and_a_video_without_audio(model):
    alone = [5, -202, 7, 9]
    logits = model("av")(audio_values=fbank(), input_ids=torch.tensor([alone])).logits
    embeds = embeddings_of("av", alone, {-202: audio_tokens_of("av", fbank())[0]})
    close(logits, logits_of("av", embeds), 1e-3)
    silent = [5, -201, 7, 9]
    logits = model("av")(pixel_values_videos=video("av"), input_ids=torch.tensor([silent])).logits
    embeds = embeddings_of("av", silent, {-201: tokens_of("av", video("av"))[0]})
    close(logits, logits_of("av", embeds), 1e-3)


@pytest.mark.parametrize("name", ["mistral", "av"])
@torch.no_grad()
def test_rows_of_a_padded_batch(model, name):
    """Left padding stays left, and positions do not count it."""
    rows = [[5, -201, 17, 40], [5, 9, 11, -201, 17, 40, 41]]
    ids = torch.tensor([[0] * 3 + rows[0], rows[1]])
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    made = model(name).generate(
        input_ids=ids, attention_mask=mask, **media(name, 2),
        max_new_tokens=4, **GREEDY,
    )  # fmt: skip
    for new, row, there in zip(made[:, 7:], rows, features(name, 2), strict=True):
        assert new.tolist() == greedy(name, row, there, 4)


@torch.no_grad()
def test_rows_with_and_without_a_video(model):
    ids = torch.tensor([[5, -201, 17, 40], [5, 9, 11, 40]])
    ours = model("mistral")
    logits = ours(input_ids=ids, pixel_values_videos=video("mistral")).logits
    text = ours(input_ids=ids[1:]).logits
    torch.testing.assert_close(logits[1:, :4], text, rtol=0, atol=1e-5)  # the rest is padding
    made = ours.generate(
        input_ids=ids, pixel_values_videos=video("mistral"), max_new_tokens=3, do_sample=False
    )
    alone = ours.generate(input_ids=ids[1:], max_new_tokens=3, do_sample=False)
    assert torch.equal(made[1:], alone)


@torch.no_grad()
def test_expanded_ids_are_taken_as_well(model):
    ours, pixels = model("mistral"), video("mistral")
    count = ours.encode_video(pixels).shape[1]
    single = ours(input_ids=torch.tensor([[5, -201, 7]]), pixel_values_videos=pixels).logits
    whole = torch.tensor([[5, *[-201] * count, 7]])
    torch.testing.assert_close(ours(input_ids=whole, pixel_values_videos=pixels).logits, single)


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        ({"input_ids": [[5, -201, 7]]}, "nothing to put there"),
        ({"input_ids": [[5, -201, -201]], "pixel_values_videos": 1}, "one placeholder for each"),
        ({"input_ids": [[5, 6, 7]], "pixel_values_videos": 1}, "one placeholder for each"),
        ({"input_ids": [[5, 6, 7]], "audio_values": 1}, "one for each video"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(model, inputs, names):
    given = {"input_ids": torch.tensor(inputs["input_ids"])}
    if "pixel_values_videos" in inputs:
        given["pixel_values_videos"] = video("av")
    if "audio_values" in inputs:
        given["audio_values"] = fbank()
    for call in (model("av"), model("av").generate):
        with pytest.raises(PureKVError, match=names):
            call(**given)


def test_full_size_token_counts():
    from types import SimpleNamespace

    from purekv.families.videollama2.config import audio_grid, video_grid

    def config(connector, image, patch):
        return SimpleNamespace(
            mm_projector_type=connector, audio_patch_size=16,
            vision_config=SimpleNamespace(image_size=image, patch_size=patch),
        )  # fmt: skip

    clip, siglip = config("stc_connector", 336, 14), config("stc_connector_v35", 384, 14)
    assert video_grid(clip, 8) == (5, 13, 13)
    assert video_grid(clip, 16) == (9, 13, 13)
    assert video_grid(siglip, 8) == (4, 13, 13)
    assert video_grid(siglip, 16) == (8, 13, 13)
    assert audio_grid(siglip, 2998) == (1, 187, 8)
