"""Functions that the YAML files beside this name. A doc is a line of `choice.jsonl` or
`words.jsonl`: `{"videoID", "question", "options", "answer"}`, paths relative to their directory."""

import os
from typing import Any

from purekv.evals.metrics import chosen_letter, exact_match

Doc = dict[str, Any]


def doc_to_visual(doc: Doc) -> list[str]:
    return [os.path.abspath(doc["videoID"])] if doc["videoID"] else []


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: Any = None) -> str:
    return "\n".join([doc["question"], *doc["options"]])


def process_results(doc: Doc, results: list[str]) -> dict[str, Any]:
    if doc["options"]:
        right = chosen_letter(results[0]) == doc["answer"]
    else:
        right = exact_match(results[0], doc["answer"])
    return {"accuracy": float(right), "videoID": doc["videoID"]}
