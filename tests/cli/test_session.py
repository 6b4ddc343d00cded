"""A chat on a reused cache says what a chat recomputed from scratch would say."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from purekv.errors import PureKVError
from purekv.media import read_video
from purekv.session import Chat, read_clip
from tests.media.clips import write_video
from tests.tiny import tiny_model, tiny_processor

PROCESSOR = tiny_processor()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def clip(video: Path):
    return read_clip(PROCESSOR, video)


def recomputed(model, chat: Chat, num_new: int, prompt) -> list[int]:
    """What the model generates for the chat's last turn without a cache from before."""
    ids = chat._ids[:, :-num_new]
    types = torch.zeros_like(ids)
    types[:, : prompt["input_ids"].shape[1]] = prompt["mm_token_type_ids"]
    grown = dict(prompt) | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
    }
    output = model.generate(**grown, max_new_tokens=num_new, do_sample=False)
    return output[0, ids.shape[1] :].tolist()


def first_prompt(chat: Chat):
    return chat._first_prompt(chat._messages[0])


def test_follow_up_turns_match_a_recomputation(model, clip) -> None:
    chat = Chat(model, PROCESSOR, videos=[clip])
    for question in ("What is it?", "Where?", "When?"):
        answer = chat.ask(question, max_new_tokens=6)
        prompt = first_prompt(chat)
        assert answer.token_ids == recomputed(model, chat, len(answer.token_ids), prompt)


def test_the_prompt_grows_as_the_template_would_write_it(model, clip) -> None:
    chat = Chat(model, PROCESSOR, videos=[clip])
    first = chat.ask("What is it?", max_new_tokens=3)
    fed = chat._ids[0].tolist()
    second = chat.ask("And then?", max_new_tokens=3)
    grown = chat._ids[0].tolist()
    assert grown[: len(fed)] == fed
    added = PROCESSOR.tokenizer.decode(grown[len(fed) : len(grown) - len(second.token_ids)])
    closing = "" if first.token_ids[-1] == model.generation_config.eos_token_id else "<|im_end|>"
    assert added == f"{closing}\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"


def test_a_turn_that_closed_itself_is_not_closed_twice(model, clip) -> None:
    chat = Chat(model, PROCESSOR, videos=[clip])
    chat.ask("What?", max_new_tokens=2)
    end = model.generation_config.eos_token_id
    chat._ids[0, -1] = end
    fed = chat._ids.shape[1]
    chat.ask("And?", max_new_tokens=2)
    assert end not in chat._ids[0, fed : fed + 5].tolist()


def test_two_chats_take_turns_on_one_model(model, clip, tmp_path: Path) -> None:
    other = read_video(write_video(tmp_path / "other.mp4", num_frames=24, size=(96, 64)))

    def talk(*chats: Chat) -> list[list[int]]:
        return [
            chat.ask(question, max_new_tokens=5).token_ids
            for question in ("What?", "And?")
            for chat in chats
        ]

    def chats() -> list[Chat]:
        return [Chat(model, PROCESSOR, videos=[video]) for video in (clip, other)]

    one, two = chats()
    together = talk(one, two)
    apart = [talk(chat) for chat in chats()]
    assert together == [apart[0][0], apart[1][0], apart[0][1], apart[1][1]]


def test_images_and_videos_keep_their_order(model, clip) -> None:
    images = [Image.effect_noise((48, 48), 50).convert("RGB")]
    chat = Chat(model, PROCESSOR, videos=[clip, clip], images=images)
    chat.ask("What?", max_new_tokens=2)
    ids = first_prompt(chat)["input_ids"][0]
    assert (ids == model.config.video_token_id).sum() == 2 * 48
    assert (ids == model.config.image_token_id).sum() == 9
    last_video = (ids == model.config.video_token_id).nonzero().max()
    assert last_video < (ids == model.config.image_token_id).nonzero().min()


def test_max_pixels(model, clip) -> None:
    chat = Chat(model, PROCESSOR, videos=[clip], max_pixels=16 * 16)
    chat.ask("What?", max_new_tokens=1)
    assert first_prompt(chat)["video_grid_thw"].tolist() == [[8, 2, 2]]
    with pytest.raises(PureKVError, match="max_pixels=0"):
        Chat(model, PROCESSOR, videos=[clip], max_pixels=0)


def test_sampling_arguments_pass_through(model, clip) -> None:
    chat = Chat(model, PROCESSOR, videos=[clip])
    torch.manual_seed(0)
    assert len(chat.ask("What?", do_sample=True, max_new_tokens=3, min_new_tokens=3).token_ids) == 3


def test_an_interrupted_turn_never_was(model, clip) -> None:
    def answers(interrupted: bool) -> list[int]:
        chat = Chat(model, PROCESSOR, videos=[clip])
        chat.ask("first?", max_new_tokens=4)
        if interrupted:

            def stop(*_: object, **__: object) -> bool:
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                chat.ask("never mind", max_new_tokens=4, stopping_criteria=[stop])
        return chat.ask("second?", max_new_tokens=6).token_ids

    assert answers(interrupted=True) == answers(interrupted=False)


@pytest.mark.parametrize(
    ("question", "settings", "names"),
    [
        ("what is <|video_pad|>?", {}, "stands for media"),
        ("what?", {"num_beams": 3}, "num_beams=3"),
        ("what?", {"num_return_sequences": 2}, "num_return_sequences=2"),
    ],
)
def test_what_a_chat_cannot_continue_is_refused(model, clip, question, settings, names) -> None:
    with pytest.raises(PureKVError, match=names):
        Chat(model, PROCESSOR, videos=[clip]).ask(question, **settings)
