"""AVSD's dialogs as samples, and free-text answers scored by CIDEr and ROUGE-L."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from purekv import PureKVConfig, PureKVError
from purekv.evals import Media, Outcome, Record, Sample, Turn, prepare_samples, summarise
from purekv.evals.answering import FREE_TOKENS, SPARE_TOKENS
from purekv.evals.avsd import UNDISCLOSED, read_avsd
from purekv.evals.metrics import mean_interval
from purekv.evals.samples import read_samples, write_samples
from purekv.evals.text_metrics import text_scores, words
from tests.tiny import tiny_model, tiny_processor


def dialog(name: str, *turns: tuple[str, object]) -> dict:
    asked = [{"question": question, "answer": answer} for question, answer in turns]
    return {"image_id": name, "caption": "a man eats", "summary": "he eats", "dialog": asked}


FIRST, SECOND = ("is there sound ?", "yes , a radio ."), ("how many people ?", "only one .")
LAST = "what does he eat ?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    for name in ("A1", "B2"):
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(b"video")
    return tmp_path


def write(folder: Path, *dialogs: object) -> Path:
    path = folder / "avsd.json"
    path.write_text(json.dumps({"type": "test", "version": "1", "dialogs": dialogs}))
    return path


def told(turns: tuple[Turn, ...]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(turn.question, turn.answer, turn.references) for turn in turns]


def test_every_question_in_turn(folder: Path) -> None:
    path = write(folder, dialog("A1", FIRST, SECOND), dialog("C3", FIRST), dialog("B2", FIRST))
    found = read_avsd(path, folder / "videos")
    assert [sample.id for sample in found.samples] == ["A1", "B2"]
    assert found.samples[0].videos == (folder / "videos" / "A1.mp4",)
    assert told(found.samples[0].turns) == [(q, a, (a,)) for q, a in (FIRST, SECOND)]
    assert found.samples[0].history == ()
    assert (found.missing, found.undisclosed) == (["C3"], 0)


@pytest.mark.parametrize("how", ["a list", "again"])
def test_several_people_answered_the_last_question(folder: Path, how: str) -> None:
    answers = ["an apple", "a red apple", "he eats fruit"]
    dialogs = [dialog("A1", FIRST, (LAST, answers))]
    if how == "again":
        dialogs = [dialog("A1", FIRST, (LAST, answer)) for answer in (*answers, "an apple")]
        dialogs.append(dialog("A1", SECOND, (LAST, "a pear")))  # another dialog about that video
    found = read_avsd(write(folder, *dialogs), folder / "videos", last=True)
    sample = found.samples[0]
    assert told(sample.turns) == [(LAST, "an apple", tuple(answers))]
    assert [(turn.question, turn.answer) for turn in sample.history] == [FIRST]
    assert [sample.id for sample in found.samples] == ["A1", "A1-2"][: 1 + (how == "again")]


def test_what_is_undisclosed_is_not_asked(folder: Path) -> None:
    path = write(
        folder, dialog("A1", FIRST, (LAST, UNDISCLOSED)), dialog("B2", (LAST, UNDISCLOSED))
    )
    found = read_avsd(path, folder / "videos")
    assert told(found.samples[0].turns) == [(*FIRST, (FIRST[1],))]
    assert found.undisclosed == 1
    with pytest.raises(PureKVError, match=r"2 their answers.*the file with the references"):
        read_avsd(path, folder / "videos", last=True)


@pytest.mark.parametrize(
    ("content", "fix"),
    [
        ("[1]", "not an AVSD file"),
        ("{", "not an AVSD file"),
        ('{"dialogs": {}}', "not an AVSD file"),
        ('{"dialogs": [{"image_id": "A1"}]}', "dialog 0 is not one of AVSD"),
        ('{"dialogs": [{"image_id": "A1", "dialog": []}]}', "dialog 0 is not one of AVSD"),
        ('{"dialogs": [{"image_id": 1, "dialog": [{"question": 1, "answer": ""}]}]}', "be text"),
        (json.dumps({"dialogs": [dialog("Z9", FIRST)]}), "1 lack their video in .*such as Z9.mp4"),
    ],
)  # fmt: skip
def test_other_files_are_named(folder: Path, content: str, fix: str) -> None:
    (folder / "avsd.json").write_text(content)
    with pytest.raises(PureKVError, match=fix):
        read_avsd(folder / "avsd.json", folder / "videos")


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    samples = [
        Sample("1", (tmp_path / "a.mp4",), (), (Turn("q", "B", "c", ("x", "y")),)),
        Sample("2", (), (tmp_path / "b.png", tmp_path / "c.png"), (Turn("q", "a", "all"),)),
        Sample("3", (tmp_path / "a.mp4",), (), (Turn("q", "a", "d", references=("a", "b")),),
               (Turn("before", "yes", "all"),)),
    ]  # fmt: skip
    write_samples(tmp_path / "below" / "data.jsonl", samples)
    assert read_samples(tmp_path / "below" / "data.jsonl") == samples


def test_the_first_prompt_tells_the_history() -> None:
    media = [Media(images=(Image.fromarray(np.zeros((32, 32, 3), np.uint8)),))] * 2
    turns = (
        Turn("what?", "an apple", "d", references=("an apple", "a pear")),
        Turn("why?", "ok", "d"),
    )
    samples = [
        Sample("1", (), (Path("a.png"),), turns, (Turn("who?", "a man", "d"),)),
        Sample("2", (), (Path("a.png"),), turns),
    ]
    batch = prepare_samples(tiny_model(), tiny_processor(), samples, media)
    told, bare = batch.prompts[0]
    assert told.index("<|image_pad|>") < told.index("who?") < told.index("a man")
    assert told.index("a man") < told.index("what?")
    assert told.count("<|image_pad|>") == bare.count("<|image_pad|>") == 1
    assert "who?" not in bare
    assert "an apple" not in told
    assert "an apple" in batch.prompts[1][0]
    # Free text is given room of its own; other answers what the gold one takes.
    assert batch.max_new_tokens == [[FREE_TOKENS] * 2, [len("ok") + SPARE_TOKENS] * 2]


def test_words_are_those_of_the_challenges_tokenizer() -> None:
    assert words("No, he isn\N{RIGHT SINGLE QUOTATION MARK}t .") == "no he is n't"
    assert words("It's a T-shirt; they're red!") == "it 's a t-shirt they 're red"
    assert words("...") == ""


def test_scores() -> None:
    gold = [["a man eats an apple", "he eats a red apple"], ["two dogs run"], ["the radio is on"]]
    scores = text_scores(["a man eats an apple.", "Two cats sleep", ""], gold)
    assert scores["rouge_l"][0] == pytest.approx(1.0)
    # One word of three: precision, recall and so their mean.
    assert scores["rouge_l"][1:] == pytest.approx([1 / 3, 0.0])
    assert scores["cider"][0] > scores["cider"][1] > scores["cider"][2] == 0.0
    # CIDEr of the only reference itself, four words or more, is its most.
    same = text_scores(["two black dogs run", "the radio is on"],
                       [["two black dogs run"], ["the radio is on"]])  # fmt: skip
    assert same["cider"] == pytest.approx([10.0, 10.0])


def test_a_table_has_them_beside_exact_match() -> None:
    turns = (Turn("q", "an apple is red", "d", references=("an apple is red", "it is red")),)
    samples = [Sample(f"{k}", (Path(f"{k // 2}.mp4"),), (), turns) for k in range(12)]
    others = Sample("x", (Path("x.mp4"),), (), (Turn("q", "a", "all"),))

    def outcome(text: str, right: bool) -> Outcome:
        return Outcome([text], [right], [0.0], [1.0], 10)

    records = {
        sample.id: Record(sample.id, 6, 1, (
            outcome("an apple is red", True),
            outcome("an apple is red" if k < 8 else "a green pear", k < 8),
        ))
        for k, sample in enumerate(samples)
    }  # fmt: skip
    records["x"] = Record("x", 6, 1, (outcome("b", False), outcome("b", False)))
    full, ours = summarise([*samples, others], records, [PureKVConfig(budget=0.2)])
    assert full["n"] == 13
    for row in (full, ours):
        assert row["cider"]["n"] == row["rouge_l"]["n"] == 12  # of those with references
    assert full["rouge_l"]["score"] == pytest.approx(1.0)
    assert full["rouge_l"]["retention"] == 1.0
    assert ours["accuracy"] == pytest.approx(8 / 13)
    assert ours["rouge_l"]["score"] == ours["rouge_l"]["retention"] == pytest.approx(8 / 12)
    low, high = ours["rouge_l"]["retention_ci95"]
    assert low < 8 / 12 < high
    # Two samples a video: four of six videos are kept, whole.
    assert high - low > 0.5
    (plain,) = summarise([others], {"x": records["x"]}, [])
    assert "cider" not in plain


def test_an_interval_is_over_videos() -> None:
    values = [0.0, 0.0, 1.0, 1.0] * 10
    apart = mean_interval(values, [str(k) for k in range(40)])
    together = mean_interval(values, [str(k // 2) for k in range(40)])
    assert apart[0] < 0.5 < apart[1]
    assert together[1] - together[0] > 1.2 * (apart[1] - apart[0])
    assert mean_interval(values[:4], list("abcd")) is None
