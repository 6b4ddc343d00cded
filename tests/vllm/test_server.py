"""`purekv serve` over HTTP, on two tensor-parallel workers."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import BLOCK_SIZE
from tests.vllm.prompts import random_prompts
from tests.vllm.test_identity import reference

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
    "--host": "127.0.0.1",
}


class Server:
    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.process, self.port = process, port

    def ask(self, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(
                {"temperature": 0, "ignore_eos": True, "return_token_ids": True} | body
            ).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def answer(self, prompt: list[int], tokens: int) -> list[int]:
        return self.ask(prompt=prompt, max_tokens=tokens)["choices"][0]["token_ids"]

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return next(float(one.split()[-1]) for one in lines if one.startswith(name))

    def hang_up(self, prompt: list[int]) -> None:
        """Ask for a long answer and go."""
        body = json.dumps({"prompt": prompt, "max_tokens": 600, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            connection.recv(64)


@contextmanager
def serving(checkpoint: Path, log: Path) -> Iterator[Server]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    options = [word for pair in ENGINE.items() for word in pair]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["purekv", "serve", checkpoint, *PURE, *options, "--port", str(port)],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 200
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    alive = process.poll() is None and time.monotonic() < deadline
                    assert alive, log.read_text()[-4000:]
                    time.sleep(0.5)
            yield Server(process, port)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def test_the_server_answers_survives_bad_requests_and_comes_back(checkpoint: Path, tmp_path: Path):
    prompts = random_prompts([300, 40, 515])
    model = reference(checkpoint, "clie")
    expected = [model.answer(prompt, 16) for prompt in prompts]
    with serving(checkpoint, tmp_path / "first.log") as server:
        assert [server.answer(prompt, 16) for prompt in prompts] == expected
        for bad in ({"prompt": [1] * 5000}, {"prompt": [1], "max_tokens": -1}, {"prompt": {}}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                server.ask(**bad)
            assert refused.value.code == 400
        server.hang_up(prompts[2])
        assert server.answer(prompts[0], 16) == expected[0]
        deadline = time.monotonic() + 30
        while server.metric("vllm:kv_cache_usage_perc") > 0 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert server.metric("vllm:kv_cache_usage_perc") == 0
        os.killpg(server.process.pid, signal.SIGKILL)
    with serving(checkpoint, tmp_path / "second.log") as server:
        assert server.answer(prompts[2], 16) == expected[2]
