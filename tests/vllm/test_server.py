"""`purekv serve` over HTTP, on two tensor-parallel workers."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import BLOCK_SIZE, PROCESS, SETTINGS
from tests.vllm.idefics3 import IMAGE, answers, draw, write_idefics3
from tests.vllm.prompts import random_prompts
from tests.vllm.test_identity import freed_by, reference

pytestmark = pytest.mark.vllm

PURE = ["--budget", "0.2", "--min-tokens", "64", "--window", "16"]
ENGINE = {
    "--dtype": "float32",
    "--block-size": str(BLOCK_SIZE),
    "--num-gpu-blocks-override": "100",
    "--kv-cache-memory-bytes": str(2**26),
    "--max-model-len": "1024",
    "--max-num-batched-tokens": "256",
    "--tensor-parallel-size": "2",
    "--served-model-name": "tiny",
    "--host": "127.0.0.1",
}

GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}

MALFORMED: list[tuple[bytes, int]] = [
    (b"", 400),
    (b'{"prompt": [1, 2', 400),
    (b"[]", 400),
    (b"\xff\xfe", 400),
    (b"{}", 400),
    (b'{"prompt": {}}', 400),
    (b'{"prompt": []}', 400),
    (b'{"prompt": [1], "max_tokens": -1}', 400),
    (b'{"prompt": [1], "max_tokens": "many"}', 400),
    (b'{"prompt": [1], "temperature": -2}', 400),
    (b'{"prompt": [1], "n": 0}', 400),
    (b'{"prompt": [-5]}', 400),
    (b'{"prompt": [99999]}', 400),
    (b'{"prompt": [1], "model": "another"}', 404),
    (json.dumps({"prompt": [1] * 5000}).encode(), 400),
    (json.dumps({"prompt": [1] * 1024}).encode(), 400),  # no place for an answer
    (json.dumps({"prompt": "t1 " * 200_000}).encode(), 400),
]


class Server:
    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.process, self.port = process, port

    def kill(self) -> None:
        """Server, engine and workers at once, without a chance to tidy up."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def post(self, body: bytes, path: str = "completions") -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/{path}", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def answer(self, prompt: list[int], tokens: int) -> list[int]:
        body = {"prompt": prompt, "max_tokens": tokens, **GREEDY}
        return self.post(json.dumps(body).encode())["choices"][0]["token_ids"]

    def chat(self, image: Path, question: str, tokens: int) -> tuple[list[int], list[int]]:
        """Tokens of the prompt and of the answer."""
        url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question},
        ]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": tokens, **GREEDY}
        reply = self.post(json.dumps(body).encode(), "chat/completions")
        return reply["prompt_token_ids"], reply["choices"][0]["token_ids"]

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return next(float(one.split()[-1]) for one in lines if one.startswith(name))

    def hang_up(self, prompt: list[int], pieces: int) -> None:
        """Ask for a long answer and go once so many pieces of it have come."""
        body = json.dumps({"prompt": prompt, "max_tokens": 600, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            received = b""
            while received.count(b"data:") < pieces:
                received += connection.recv(4096)

    def settle(self) -> None:
        """Wait until no request holds a block."""
        deadline = time.monotonic() + 30
        while self.metric("vllm:kv_cache_usage_perc") > 0 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert self.metric("vllm:kv_cache_usage_perc") == 0
        assert self.metric("vllm:num_requests_running") == 0


@contextmanager
def serving(checkpoint: Path, log: Path) -> Iterator[Server]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    options = [word for pair in ENGINE.items() for word in pair]
    purekv = Path(sys.executable).with_name("purekv")
    command = [purekv, "serve", checkpoint, *PURE, *options, "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **PROCESS},
            start_new_session=True,
        )
    server = Server(process, port)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                alive = process.poll() is None and time.monotonic() < deadline
                assert alive, log.read_text()[-4000:]
                time.sleep(0.5)
        yield server
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    finally:
        server.kill()
        process.wait()


def test_the_server_answers_survives_bad_requests_and_comes_back(checkpoint: Path, tmp_path: Path):
    lengths = [300, 40, 515]
    prompts = random_prompts(lengths)
    model = reference(checkpoint, "clie")
    expected = [model.answer(prompt, 16) for prompt in prompts]
    with serving(checkpoint, tmp_path / "first.log") as server:
        assert [server.answer(prompt, 16) for prompt in prompts] == expected
        assert server.metric("purekv:prompts_compacted_total") == 2
        assert server.metric("purekv:blocks_freed_total") == freed_by(SETTINGS, lengths)
        for body, code in MALFORMED:
            with pytest.raises(urllib.error.HTTPError) as refused:
                server.post(body)
            assert refused.value.code == code, body[:60]
        assert server.answer(prompts[0], 16) == expected[0]
        for pieces in (0, 1, 5, 20):
            server.hang_up(prompts[2], pieces)
        assert [server.answer(prompt, 16) for prompt in prompts] == expected
        server.settle()
        server.kill()
    with serving(checkpoint, tmp_path / "second.log") as server:
        assert [server.answer(prompt, 16) for prompt in prompts] == expected
        assert server.metric("purekv:prompts_compacted_total") == 2


def test_images_in_chats(tmp_path: Path):
    checkpoint = write_idefics3(tmp_path / "tiny-idefics3")
    images = [draw(tmp_path / f"{one}.png", 256, seed=one) for one in range(3)]
    questions = [" ".join(f"t{7 * one + place}" for place in range(20)) for one in range(3)]
    with serving(checkpoint, tmp_path / "log") as server:
        replies = [server.chat(*pair, 16) for pair in zip(images, questions, strict=True)]
        assert server.metric("purekv:prompts_compacted_total") == 3
    prompts = [prompt for prompt, _ in replies]
    assert [prompt.count(IMAGE) for prompt in prompts] == [320] * 3
    expected = answers(checkpoint, prompts, [[one] for one in images], 16)
    assert [answer for _, answer in replies] == expected
