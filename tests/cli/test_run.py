"""`purekv run` end to end on a tiny checkpoint with random weights and a real file."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.cells import cell_len

from tests.processes import run

COST_KEYS = {
    "answers",
    "visual_tokens",
    "kept_visual_tokens",
    "kv_bytes_full",
    "kv_bytes_kept",
    "compression",
    "seconds",
    "peak_bytes",
}


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for index, path in enumerate(paths):
        Image.effect_noise((48, 48), 60 + index).save(path)
    return paths


def test_json_has_the_contract_keys(cli_json, checkpoint, video) -> None:
    data = cli_json("run", "--video", video, "--ask", "What?", "--model", checkpoint)
    assert data.keys() >= COST_KEYS
    assert set(data["seconds"]) == {"decode_video", "vision", "prefill", "decode"}
    assert all(seconds > 0 for seconds in data["seconds"].values())
    assert data["visual_tokens"] == 8 * 2 * 3
    assert data["kv_bytes_kept"] < data["kv_bytes_full"]
    assert data["compression"] == data["kv_bytes_full"] / data["kv_bytes_kept"]
    assert data["peak_bytes"] > 10 * 2**20
    assert data["config"]["budget"] == data["budget"] == 0.2


def test_a_sparse_prefill_says_where_it_was_sparse(cli_json, checkpoint, video) -> None:
    asked = "run", "--video", video, "--ask", "What?", "--model", checkpoint
    asked = *asked, "--prefill", "spatiotemporal", "--evict", "active", "--source-layers", "0"
    small = cli_json(*asked)
    assert small["prefill_per_layer"] == ["dense", "kept", "kept"]  # below min_tokens
    sparse = cli_json(*asked, "--spatiotemporal", "min_tokens=0,tile=1")
    assert sparse["prefill_per_layer"] == ["spatiotemporal", "kept", "kept"]
    assert sparse["config"]["spatiotemporal"]["tile"] == 1


def test_fewer_tokens_go_in_than_the_prompt_has(cli_json, checkpoint, video) -> None:
    asked = "run", "--video", video, "--ask", "What?", "--model", checkpoint, "--budget", "0.25"
    whole = cli_json(*asked)
    pruned = cli_json(*asked, "--prune", "0.5")
    assert pruned["config"]["prune"] == 0.5
    assert pruned["kv_bytes_kept"] == whole["kv_bytes_kept"]
    assert pruned["kv_bytes_full"] == whole["kv_bytes_full"]


def test_compare_with_the_uncompressed_model(cli_json, checkpoint, video) -> None:
    data = cli_json(
        *("run", "--video", video, "--ask", "What?", "And?", "--model", checkpoint),
        *("--budget", "1.0", "--compare"),
    )
    assert data["dense"].keys() == COST_KEYS
    assert data["dense"]["answers"] == data["answers"]
    assert data["agreement"] == 1.0
    assert data["dense"]["kv_bytes_full"] == data["kv_bytes_full"] == data["kv_bytes_kept"]
    assert data["dense"]["compression"] == 1.0


def test_agreement_falls_when_answers_differ(cli_json, checkpoint, video) -> None:
    data = cli_json(
        *("run", "--video", video, "--ask", "What?", "--model", checkpoint),
        *("--budget", "2", "--first-token", "compressed", "--compare"),
    )
    assert 0 <= data["agreement"] < 1
    assert data["dense"]["kv_bytes_full"] == data["kv_bytes_full"]


def test_each_question_continues_the_chat(cli_json, checkpoint, video) -> None:
    words = ("run", "--video", video, "--model", checkpoint, "--max-new-tokens", 4)
    both = cli_json(*words, "--ask", "What?", "--ask", "And then?")
    alone = cli_json(*words, "--ask", "What?")
    assert len(both["answers"]) == 2
    assert both["answers"][0] == alone["answers"][0]
    assert both["kv_bytes_kept"] == alone["kv_bytes_kept"]


def test_several_images_after_one_flag(cli_json, checkpoint, images) -> None:
    first, second = images
    ask = ("--ask", "What?", "--model", checkpoint)
    together = cli_json("run", "--image", first, second, *ask)
    repeated = cli_json("run", "--image", first, "--image", second, *ask)
    assert together["visual_tokens"] == 2 * 3 * 3
    assert together["answers"] == repeated["answers"]


def test_video_and_image_in_one_prompt(cli_json, checkpoint, video, images) -> None:
    data = cli_json(
        "run", "--image", images[0], "--video", video, "--ask", "What?", "--model", checkpoint
    )
    assert data["visual_tokens"] == 48 + 9


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (("--max-frames", 4), 2 * 6),
        (("--fps", 1), 4 * 6),
        (("--start", 2, "--end", 4), 2 * 6),
        (("--max-pixels", 256), 8 * 1),
    ],
    ids=str,
)
def test_sampling_options(cli_json, checkpoint, video, options, tokens) -> None:
    data = cli_json("run", "--video", video, "--ask", "?", "--model", checkpoint, *options)
    assert data["visual_tokens"] == tokens


def test_options_reach_the_config(cli_json, checkpoint, video) -> None:
    data = cli_json(
        *("run", "--video", video, "--ask", "?", "--model", checkpoint, "--budget", "10"),
        *("--scorer", "snapkv", "--window", "3", "--source-layers", "0,2"),
        *("--first-token", "compressed"),
    )
    assert data["config"]["budget"] == 10
    assert data["config"]["scorer"] == "snapkv"
    assert data["config"]["window"] == 3
    assert data["config"]["source_layers"] == [0, 2]
    assert data["config"]["first_token"] == "compressed"


def test_sample_brings_its_questions(cli_json, checkpoint, video, monkeypatch) -> None:
    import purekv.reference

    monkeypatch.setitem(vars(purekv.reference), "sample_video", lambda: video)
    monkeypatch.setitem(vars(purekv.reference), "sample_questions", lambda: ["What?", "And?"])
    words = ("run", "--video", "sample", "--model", checkpoint, "--max-new-tokens", 2)
    assert cli_json(*words)["questions"] == ["What?", "And?"]
    assert cli_json(*words, "--ask", "Why?")["questions"] == ["Why?"]


def test_half_precision(cli_json, checkpoint, video) -> None:
    words = ("run", "--video", video, "--ask", "?", "--model", checkpoint)
    full, half = cli_json(*words), cli_json(*words, "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16"
    assert half["kv_bytes_full"] * 2 == full["kv_bytes_full"]


def test_tables_fit_a_narrow_terminal(cli, checkpoint, video, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = cli(
        "run", "--video", video, "--ask", "What is this?", "--model", checkpoint, "--compare"
    )
    assert code == 0
    assert "Uncompressed" in out
    assert "Equal answer tokens" in out
    assert max(cell_len(line) for line in out.splitlines()) <= 80


def test_stdout_holds_one_object_and_stderr_the_progress(checkpoint, video) -> None:
    words = ["run", "--video", video, "--ask", "What?", "--model", checkpoint, "--json"]
    done = run([sys.executable, "-c", "from purekv.cli import main; main()", *words])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["answers"]
    assert "decoding clip.mp4" in done.stderr
