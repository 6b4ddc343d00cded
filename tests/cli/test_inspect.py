"""`purekv inspect`: one page with all in it, whose counts are the report's."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from purekv import PureKVConfig
from purekv.inspect.agreement import best, held, serving_layers, spearman
from purekv.inspect.collect import Recorder
from tests.tiny import tiny_model

LAYERS, HEADS, TOKENS = 3, 2, 8 * 2 * 3


class _Resources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def page_data(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture
def words(checkpoint, video, tmp_path) -> list[object]:
    return [
        "inspect", "--video", video, "--ask", "What? </script><b>", "--model", checkpoint,
        "--budget", "0.25", "--max-new-tokens", "3", "--out", tmp_path / "new" / "page.html",
    ]  # fmt: skip


def test_the_page_is_whole_and_its_counts_are_the_reports(cli, words, tmp_path) -> None:
    code, out, err = cli(*words, "--json")
    assert code == 0, err
    result = json.loads(out)
    page = (tmp_path / "new" / "page.html").read_text()
    assert result["page"] == str(tmp_path / "new" / "page.html")
    assert result["page_bytes"] == len(page.encode())
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "page.html"]

    resources = _Resources()
    resources.feed(page)
    assert resources.found == []  # scripts and styles are inline, pictures in the data
    assert not re.search(r"https?://|url\(|@import", page)
    data = page_data(page)
    assert data["question"] == "What? </script><b>"
    assert all(m["image"].startswith("data:image/jpeg;base64,") for m in data["moments"])
    assert set(data["answers"]) == {"full", "compressed"}

    assert result["visual_tokens"] == TOKENS
    assert result["kept_visual_tokens"] == TOKENS // 4
    assert result["kept"] == [[TOKENS // 4] * HEADS] * LAYERS
    cells = base64.b64decode(data["cells"])
    assert len(cells) == LAYERS * HEADS * TOKENS
    heads = [cells[k : k + TOKENS] for k in range(0, len(cells), TOKENS)]
    assert [sum(cell >> 7 for cell in head) for head in heads] == [TOKENS // 4] * len(heads)
    for head in heads:  # what stayed is what ranks highest
        lowest_kept = min(cell & 127 for cell in head if cell >> 7)
        assert lowest_kept >= max(cell & 127 for cell in head if not cell >> 7)
    assert data["source_layers"] == result["source_layers"] == [0, 1, 2]
    for name in ("spearman", "recall"):
        assert len(result[name]) == LAYERS
        assert all(len(line) == LAYERS for line in result[name])
    assert [result["spearman"][k][k] for k in range(LAYERS)] == [1.0] * LAYERS
    assert result["recall"][2][0] is None


def test_long_videos_and_many_media_are_cut_and_say_so(
    cli, words, video, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("purekv.inspect.page.MAX_MOMENTS", 4)
    picture = tmp_path / "a.png"
    Image.effect_noise((48, 48), 60).save(picture)
    code, _, err = cli(*words, "--image", picture, "--source-layers", "1")
    assert code == 0, err
    data = page_data((tmp_path / "new" / "page.html").read_text())
    assert len(data["moments"]) == 4
    assert data["moments"][0]["name"] == f"{video.name}, 0.0 s"
    assert data["shown"].startswith("4 of 9 moments are shown")
    assert data["serving"] == [0, 1, 1]


@pytest.mark.parametrize("allocation", ["pyramid", "ada"])
def test_uneven_layers_and_heads(cli_json, words, allocation) -> None:
    result = cli_json(*words, "--allocation", allocation)
    layers = result["kept"] if allocation == "pyramid" else [sum(n) for n in result["kept"]]
    assert sum(map(sum, result["kept"])) == LAYERS * HEADS * TOKENS // 4
    if allocation == "pyramid":
        assert layers[0] > layers[-1]
    else:
        assert layers == [HEADS * TOKENS // 4] * LAYERS
        assert any(first != second for first, second in result["kept"])


@pytest.mark.parametrize(
    ("more", "fix"),
    [
        (["--budget", "1.0"], "lower it"),
        (["--plan", "reference_fast"], "another plan"),
        (["--budget", "nothing"], "not a number"),
        (["--video", "none.mp4"], "not found"),
        (["--ask", " "], "give --ask"),
        (["--out", "."], "name a file"),
        (["--scorer", "magic"], "scorers are clie"),
        (["--source-layers", "7"], "does not exist"),
        (["--max-new-tokens", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line_before_the_model_loads(cli, words, more, fix, monkeypatch) -> None:
    monkeypatch.setattr("purekv.loading.Checkpoint.model", lambda *a, **k: pytest.fail("loaded"))
    code, out, err = cli(*words, *more)
    errors = [line for line in err.splitlines() if not line.endswith(" ...")]
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0].startswith("error: ")
    assert fix in errors[0]


def test_a_count_of_all_tokens_leaves_nothing_to_look_at(cli, words, tmp_path) -> None:
    code, _, err = cli(*words, "--budget", str(TOKENS))
    assert code == 2
    assert "nothing to look at" in err
    assert not (tmp_path / "new").exists()


def test_a_recorder_changes_nothing(checkpoint, video) -> None:
    from purekv import PureKV
    from purekv.loading import Checkpoint
    from purekv.session import Chat, read_clip

    processor = Checkpoint.find(checkpoint).processor()
    model = tiny_model()
    config = PureKVConfig(budget=0.25, first_token="compressed")

    def ask(run):
        with run:
            chat = Chat(model, processor, videos=[read_clip(processor, video)])
            return chat.ask("What?", max_new_tokens=4).token_ids, run.report.kept_per_layer

    recorder = Recorder(config, model)
    assert ask(recorder) == ask(PureKV(config)(model))
    assert recorder.recording is not None
    assert recorder.recording.window.shape[:2] == (LAYERS, 4)
    torch.testing.assert_close(recorder.recording.window.sum(-1), torch.ones(LAYERS, 4))


def test_agreement_of_layers_by_hand() -> None:
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.1, 0.5, 0.9], [0.4, 0.3, 0.2, 0.1]])
    rho = spearman(attention)
    assert rho[0].tolist() == pytest.approx([1, 1, -1])
    own = attention[:, None]
    assert held(best(own, 2), own, 2).tolist() == [1, 1, 1]
    assert held(best(own, 2), own.flip(0), 2).tolist() == [0, 1, 0]
    assert serving_layers([1, 3], 5) == [None, 1, 1, 3, 3]
