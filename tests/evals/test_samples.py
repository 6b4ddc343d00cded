"""The data format: media, choices, and what counts as right."""

import json

import pytest

from purekv import PureKVError
from purekv.evals import read_samples

CHOICES = ["red", "blue", "none of these"]


def read(tmp_path, **line):
    path = tmp_path / "data.jsonl"
    turns = [{"question": "what?", "answer": "a cat"}]
    path.write_text(json.dumps({"id": 1, "video": "a.mp4", "turns": turns} | line))
    return read_samples(path)[0]


def turn(tmp_path, **fields):
    return read(tmp_path, turns=[{"question": "Which?", "answer": "B"} | fields]).turns[0]


def test_choices_are_shown_and_asked_for_by_letter(tmp_path):
    asked = turn(tmp_path, choices=CHOICES)
    assert asked.prompt == "Which?\nA. red\nB. blue\nC. none of these"
    assert asked.answer == "B"


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "blue", "Blue."])
def test_the_gold_answer_becomes_a_letter(tmp_path, answer):
    assert turn(tmp_path, answer=answer, choices=CHOICES).answer == "B"


def test_a_letter_is_a_letter_even_where_choices_are_letters(tmp_path):
    assert turn(tmp_path, answer="A", choices=["B", "A"]).answer == "A"


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("B", True), ("b.", True), ("(b)", True), ("B. blue", True), ("B) blue", True), ("A", False),
     ("Blue", False), ("", False), ("A. blue", False)],
)  # fmt: skip
def test_what_counts_as_the_letter(tmp_path, prediction, right):
    assert turn(tmp_path, choices=CHOICES).accepts(prediction) is right


def test_without_choices_the_words_count(tmp_path):
    asked = turn(tmp_path, answer="top left")
    assert asked.prompt == "Which?"
    assert asked.accepts(" Top left.")
    assert not asked.accepts("top")


@pytest.mark.parametrize(
    ("media", "kind", "videos", "images"),
    [
        ({}, "video", 1, 0),
        ({"video": "a.mp4", "image": "b.png"}, "mixed", 1, 1),
        ({"videos": ["a.mp4", "b.mp4"]}, "videos", 2, 0),
        ({"images": ["a.png", "b.png"]}, "images", 0, 2),
        ({"image": "a.png"}, "image", 0, 1),
    ],
)
def test_kinds_of_media(tmp_path, media, kind, videos, images):
    line = {"id": 1, "turns": [{"question": "a", "answer": "b"}], **(media or {"video": "a.mp4"})}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(line))
    sample = read_samples(path)[0]
    assert (sample.media, len(sample.videos), len(sample.images)) == (kind, videos, images)
    assert all(file.parent == tmp_path for file in sample.videos + sample.images)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"videos": ["b.mp4"]}, "both video and videos"),
        ({"images": "b.png"}, "images must be text"),
        ({"turns": [{"question": "a", "answer": 3}]}, "question and answer must be text"),
        ({"turns": [{"question": "a", "answer": "b", "choices": ["b"]}]}, "1 choices; use 2 to 26"),
        ({"turns": [{"question": "a", "answer": "x", "choices": ["b", "c"]}]}, "none of the"),
        ({"turns": [{"question": "a"}]}, "answer"),
        ({"turns": []}, "no turns"),
        ({"turns": {"question": "a", "answer": "b"}}, "turns must be a list"),
        ({"turns": ["a"]}, "a turn must be an object"),
        ({"category": ["u"]}, "category must be text"),
        ({"category": None}, "category must be text"),
        ({"turns": [{"question": "a", "answer": "b", "category": 3}]}, "category must be text"),
        ({"id": None}, "id must be text or a whole number"),
        ({"id": [1]}, "id must be text or a whole number"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises(PureKVError, match=rf"data.jsonl:1 is not a sample .*{message}"):
        read(tmp_path, **line)


LINE = b'{"id": "x", "image": "a.png", "turns": [{"question": "q", "answer": "5"}]}'


@pytest.mark.parametrize(
    "wrong", [b"[1]", b"7", b"null", b'"a"', b"{", b'\xff\xfe{"id"', LINE.replace(b"5", b"\xe9")]
)
@pytest.mark.parametrize("before", [0, 2])
def test_what_is_no_sample_at_all_is_named(tmp_path, wrong, before):
    path = tmp_path / "data.jsonl"
    good = [LINE.replace(b'"x"', b"%d" % k) for k in range(before)]
    path.write_bytes(b"\n".join([*good, wrong]))
    with pytest.raises(PureKVError, match=rf"^\S+data.jsonl:{before + 1} is not a sample [^\n]*$"):
        read_samples(path)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINE + b"\r\n" + LINE.replace(b"x", "\u00e9".encode()))
    assert [sample.id for sample in read_samples(path)] == ["x", "\u00e9"]


def test_two_samples_of_one_id_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(LINE.replace(b'"x"', b"7") + b"\n\n" + LINE.replace(b"x", b"7"))
    with pytest.raises(PureKVError, match=r"data.jsonl:3: .* same id '7', in lines 1 and 3"):
        read_samples(path)
    assert len(read_samples(path, limit=1)) == 1


def test_one_file_has_one_name(tmp_path):
    names = ["a.png", "./a.png", "x/../a.png", "x//..//a.png", str(tmp_path / "x" / ".." / "a.png")]
    files = {read(tmp_path, images=[name], video="a.mp4").images[0] for name in names}
    assert files == {tmp_path / "a.png"}
