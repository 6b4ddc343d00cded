"""lmms-eval's own command line, offline, on the reference model and on tasks of ours."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from purekv.evals.samples import Sample, read_samples
from purekv.reference import default_checkpoint, write_dataset
from purekv.reference.data import video
from tests.processes import run

pytestmark = pytest.mark.lmms

TASKS = Path(__file__).parent / "tasks"
VIDEOS = 3  # of each task
PATCHES, GRID = 9, 8
VISUAL = PATCHES * GRID**2
OWN = "min_pixels=784,fps=2,device_map=cpu"  # lmms-eval's default enlarges small frames


@dataclass(frozen=True)
class Evaluation:
    """What one run of lmms-eval left behind."""

    results: dict[str, Any]
    answers: dict[str, list[str]]
    """Of each task, by document."""
    output: str


class Evaluations:
    """Runs of lmms-eval on one data set, each done once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        geometry = video(PATCHES, GRID)
        for name, choices, seed in (("choice", 1.0, 0), ("words", 0.0, 1)):
            made = write_dataset(
                folder / name, VIDEOS, seed, geometry=geometry, turns=(1,), choices=choices
            )
            docs = [_doc(sample) for sample in read_samples(made)]
            if name == "words":
                asked = "What is the capital of France?"
                docs.append({"videoID": "", "question": asked, "options": [], "answer": "Paris"})
            lines = [json.dumps(doc) + "\n" for doc in docs]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        self.checkpoint = default_checkpoint()
        self._done: dict[tuple[str, str], Evaluation] = {}

    def start(self, model: str, arguments: str, out: Path) -> CompletedProcess[str]:
        words = [
            *(sys.executable, "-m", "lmms_eval", "--model", model),
            *("--model_args", f"pretrained={self.checkpoint},{OWN}{arguments}"),
            *("--tasks", "purekv_choice,purekv_words", "--include_path", str(TASKS)),
            *("--device", "cpu", "--batch_size", "1", "--log_samples", "--output_path", str(out)),
        ]
        environment = {
            **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
            "HF_HOME": str(self.folder / "home"),
            "WANDB_MODE": "disabled",
        }
        return run(words, cwd=self.folder, env=environment, timeout=900)

    def __call__(self, model: str, arguments: str = "") -> Evaluation:
        asked = (model, arguments)
        if asked not in self._done:
            out = self.folder / f"out-{len(self._done)}"
            process = self.start(model, arguments, out)
            output = process.stdout + process.stderr
            found = list(out.rglob("*_results.json"))
            assert process.returncode == 0, output
            assert len(found) == 1, output
            answers = {}
            for task in ("purekv_choice", "purekv_words"):
                (samples,) = out.rglob(f"*_samples_{task}.jsonl")
                rows = [json.loads(line) for line in samples.read_text().splitlines()]
                rows.sort(key=lambda row: row["doc_id"])
                answers[task] = [row["filtered_resps"][0] for row in rows]
            self._done[asked] = Evaluation(json.loads(found[0].read_text()), answers, output)
        return self._done[asked]


def _doc(sample: Sample) -> dict[str, Any]:
    (turn,), (path,) = sample.turns, sample.videos
    options = turn.prompt.splitlines()[1:] if turn.choices else []
    name = f"{path.parent.parent.name}/{path.parent.name}/{path.name}"
    return {"videoID": name, "question": turn.question, "options": options, "answer": turn.answer}


@pytest.fixture(scope="module")
def lmms_eval(tmp_path_factory: pytest.TempPathFactory) -> Evaluations:
    return Evaluations(tmp_path_factory.mktemp("lmms"))


def test_the_full_budget_answers_as_lmms_evals_own_model(lmms_eval: Evaluations) -> None:
    own = lmms_eval("qwen2_5_vl")
    ours = lmms_eval("purekv_qwen2_5_vl", ",budget=1.0")
    assert [len(answers) for answers in own.answers.values()] == [VIDEOS, VIDEOS + 1]
    assert ours.answers == own.answers
    assert ours.results["throughput"]["avg_purekv_visual_tokens_kept"] == 1.0


def test_a_fifth_of_the_cache_is_a_fifth(lmms_eval: Evaluations) -> None:
    report = lmms_eval.folder / "reports" / "fifth.jsonl"
    run = lmms_eval("purekv_qwen2_5_vl", f",budget=0.2,scorer=clie,report={report}")
    first, *requests = (json.loads(line) for line in report.read_text().splitlines())
    assert first["config"]["budget"] == 0.2
    assert first["config"]["first_token"] == "compressed"
    compressed = [request for request in requests if request]
    assert len(compressed) == 2 * VIDEOS
    for request in compressed:
        assert request["visual_tokens"] == [VISUAL]
        assert request["kept_visual_tokens"] == [VISUAL // 5]
        assert request["kv_bytes_kept"] < request["kv_bytes_full"] / 3
    figures = run.results["throughput"]
    assert figures["avg_purekv_requests"] == 2 * VIDEOS + 1
    assert figures["avg_purekv_visual_tokens_kept"] == pytest.approx(0.2, abs=0.01)
    assert figures["avg_purekv_compression"] > 3
    accuracy = run.results["results"]["purekv_choice"]["accuracy,none"]
    assert 0.0 <= accuracy <= 1.0


def test_a_question_without_media_runs_uncompressed(lmms_eval: Evaluations) -> None:
    run = lmms_eval("purekv_qwen2_5_vl", ",budget=1.0")
    assert run.results["throughput"]["avg_purekv_uncompressed_requests"] == 1
    assert "run uncompressed" in run.output


def test_unknown_arguments_name_the_settings(lmms_eval: Evaluations) -> None:
    out = lmms_eval.folder / "none"
    process = lmms_eval.start("purekv_qwen2_5_vl", ",budgett=0.2", out)
    assert "unknown model argument 'budgett'; PureKV's settings are budget, " in process.stderr
    assert not list(out.rglob("*_results.json"))


@pytest.mark.parametrize(
    "task", ["videomme", "mvbench", "mlvu_dev", "longvideobench_val_v", "docvqa_val"]
)
def test_lmms_eval_has_the_benchmark(task: str) -> None:
    """Their data need a network; that lmms-eval knows them under these names does not."""
    from lmms_eval.tasks import TaskManager

    assert task in TaskManager(verbosity="ERROR").all_tasks
