"""The README's first command: the sample clip, the embedded model, a fifth of the cache."""

from purekv.reference.sample import sample_turns


def test_the_demo_answers_right_on_a_fifth_of_the_cache(cli_json) -> None:
    data = cli_json("run", "--video", "sample", "--budget", "0.2", "--compare")
    assert data["compression"] >= 4.2
    assert data["kept_visual_tokens"] == data["visual_tokens"] // 5
    assert data["answers"] == [turn["answer"] for turn in sample_turns()]
    assert data["agreement"] == 1.0
