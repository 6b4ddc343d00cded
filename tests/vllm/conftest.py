"""A tiny random Qwen2, and engines that serve it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run

BLOCK_SIZE = 32
PROCESS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment of each process: one thread, on whichever core is free."""

SETTINGS: dict[str, Any] = {"budget": 0.2, "min_tokens": 64, "window": 16}


def write_tiny(folder: Path) -> Path:
    """A tiny random Qwen2, with weights so large that answers differ from prompt to prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{one}": one for one in range(512)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny-qwen2"))


class Engines:
    def __init__(self, checkpoint: Path, folder: Path, timeout: float = 280) -> None:
        self.checkpoint, self._folder, self._timeout = checkpoint, folder, timeout
        self._runs = 0

    def run(
        self,
        prompts: list[list[int]],
        new_tokens: list[int],
        settings: dict[str, Any] | None = None,
        requests: dict[str, Any] | None = None,
        **engine: Any,
    ) -> dict[str, Any]:
        """What one engine answered; stock vLLM without settings."""
        result = self.start(prompts, new_tokens, settings, requests, **engine)
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads((self._folder / f"result-{self._runs}.json").read_text())

    def start(
        self,
        prompts: list[list[int]],
        new_tokens: list[int],
        settings: dict[str, Any] | None = None,
        requests: dict[str, Any] | None = None,
        **engine: Any,
    ) -> "subprocess.CompletedProcess[str]":
        self._runs += 1
        arguments: dict[str, Any] = {
            "model": str(self.checkpoint),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "block_size": BLOCK_SIZE,
            "num_gpu_blocks_override": 200,
            "kv_cache_memory_bytes": 2**26,
            "max_model_len": 2048,
        }
        if settings is not None:
            arguments["worker_cls"] = "purekv.serving.worker.CompactingCPUWorker"
            arguments["additional_config"] = {"purekv": settings}
        asked = {
            "engine": arguments | engine,
            "prompts": prompts,
            "new_tokens": new_tokens,
            "asynchronous": False,
            **(requests or {}),
        }
        source = self._folder / f"asked-{self._runs}.json"
        source.write_text(json.dumps(asked))
        target = self._folder / f"result-{self._runs}.json"
        command = [sys.executable, Path(__file__).with_name("engine.py"), source, target]
        return run(command, timeout=self._timeout, env=PROCESS)


@pytest.fixture(scope="session")
def engines(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(checkpoint, tmp_path_factory.mktemp("engines"))
