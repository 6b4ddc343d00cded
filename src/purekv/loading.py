"""Checkpoints to models and processors: refused early, in one line, and never code from a hub."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from purekv import families
from purekv.errors import PureKVError
from purekv.families import videollama2

OWN_FAMILIES = dict.fromkeys(videollama2.CONFIGS, videollama2)
"""Model types that transformers does not have: modules with `read_config`, `load`, `Processor`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config was read and whose family is supported; no weights yet."""

    name: str
    """Directory or hub id."""
    config: Any

    @classmethod
    def find(cls, name: str | Path) -> "Checkpoint":
        """Raises PureKVError for one that is not there, or not of a supported family."""
        config = _config(str(name))
        if part := families.READERS.get(config.model_type):
            config = getattr(config, part)
        family = families.for_config(config)
        if not family.visual_token_ids(config):
            raise PureKVError(
                f"model type {config.model_type!r} is not supported here, as it sees no images or "
                'videos; from Python, PureKV(PureKVConfig(scope="prompt")) compresses its text'
            )
        return cls(str(name), config)

    def fingerprint(self) -> str:
        """Twelve hex digits that tell its config, how it generates and its weights from others',
        without loading them: of large files, size and samples; of a hub's, name and commit."""
        digest = hashlib.sha256(_canonical(self.config.to_dict()))
        folder = Path(self.name).expanduser()
        if not folder.is_dir():
            commit = getattr(self.config, "_commit_hash", None)
            digest.update(f"{self.name} {commit}".encode())
            return digest.hexdigest()[:12]
        for path in sorted(folder.iterdir()):
            if path.name == "generation_config.json" or path.suffix == ".safetensors":
                size = path.stat().st_size
                digest.update(f"{path.name} {size}".encode())
                with path.open("rb") as file:
                    for offset in range(0, size, max(size // 256, 4096)):
                        file.seek(offset)
                        digest.update(file.read(4096))
        return digest.hexdigest()[:12]

    def processor(self) -> ProcessorMixin:
        with self._explained():
            if own := OWN_FAMILIES.get(self.config.model_type):
                return own.Processor.from_pretrained(self.name)
            return AutoProcessor.from_pretrained(self.name, trust_remote_code=False)

    def model(self, *, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
        """Load the weights, safetensors only.

        `device`: "auto" (CUDA if there is one), or a torch device. `dtype`: "auto" (float32 on the
        CPU, the checkpoint's own elsewhere) or a name in `DTYPES`.

        Raises PureKVError for an unknown dtype, a device this machine lacks, or broken weights.
        """
        target = find_device(device)
        with self._explained():
            if own := OWN_FAMILIES.get(self.config.model_type):
                kind = find_dtype(dtype, target)
                kind = kind if isinstance(kind, torch.dtype) else None
                return own.load(self.name, device=target, dtype=kind)
            model = AutoModelForImageTextToText.from_pretrained(
                self.name, config=self.config, dtype=find_dtype(dtype, target), use_safetensors=True
            )
        return model.to(target).eval()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, PureKVError):
            raise
        except RuntimeError as error:
            raise PureKVError(
                f"cannot load {self.name}: its weights do not fit its config.json; "
                "download or convert it again"
            ) from error
        except (OSError, ValueError, SafetensorError) as error:
            raise PureKVError(f"cannot load {self.name}: {_first_sentence(error)}") from error


def _config(name: str) -> Any:
    if not name.strip():
        raise PureKVError("the model's name is empty; give a checkpoint directory or a hub id")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PureKVError(
                f"{name} has no config.json; give a transformers checkpoint directory"
            )
        if own := OWN_FAMILIES.get(_model_type(path / "config.json")):
            return own.read_config(path)
    elif path.exists():
        raise PureKVError(f"{name} is a file; give the checkpoint's directory")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise PureKVError(f"model directory not found: {name}; check the path, or give a hub id")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PureKVError(
            f"cannot load the config of {name}: {_first_sentence(error)}; "
            "give a checkpoint directory or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct"
        ) from error


def _model_type(config: Path) -> Any:
    try:
        return json.loads(config.read_text()).get("model_type")
    except (ValueError, AttributeError):  # transformers says what is wrong
        return None


def fingerprint(model: PreTrainedModel) -> str:
    """Twelve hex digits that tell a model from others of its shape: its config, how it generates,
    and names, shapes and a sample of the weights, as float32; not where it lies."""
    digest = hashlib.sha256()
    digest.update(_canonical(model.config.to_dict()))
    if model.generation_config is not None:
        digest.update(_canonical(model.generation_config.to_dict()))
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        stride = max(1, weight.numel() // 64)
        some = weight.detach().flatten()[::stride][:64].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:12]


def processor_fingerprint(processor: ProcessorMixin) -> str:
    """The same of what makes the prompt: how pixels are cut and the chat is written."""
    templates = [processor.chat_template, processor.tokenizer.chat_template]
    digest = hashlib.sha256(_canonical([processor.to_dict(), templates]))
    return digest.hexdigest()[:12]


def _canonical(data: Any) -> bytes:
    """JSON of a config, without where it was read and which version wrote it."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            pairs = ((str(key), bare(one)) for key, one in value.items())
            return {k: v for k, v in pairs if k[:1] != "_" and k != "transformers_version"}
        return [bare(one) for one in value] if isinstance(value, list | tuple) else value

    return json.dumps(bare(data), sort_keys=True, default=str).encode()


def find_device(name: str) -> torch.device:
    """Raises PureKVError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PureKVError(f"device={name!r} is unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise PureKVError(f"device={name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PureKVError(
            f"device={name!r} is not on this machine, which has {torch.cuda.device_count()} CUDA "
            "devices; use --device auto or cpu"
        )
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Raises PureKVError for an unknown one."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise PureKVError(f"dtype={name!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.split(r"(?<=[a-z\d'\"])\. |: https?:", text)[0].rstrip(".")
