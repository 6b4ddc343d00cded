"""Reads the few GGUF features that SmolLM2-135M-Instruct.Q4_1.gguf uses; numpy only."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_F32, _Q4_1, _Q8_0 = 0, 3, 8


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from(code, self.data, self.at)[0]
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        length = self.scalar("<Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, length = self.scalar("<I"), self.scalar("<Q")
            return [self.value(inner) for _ in range(length)]
        return self.scalar(_SCALARS[kind])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The file's metadata, and its tensors dequantised to float32 with rows first."""
    data = memoryview(np.memmap(path, dtype=np.uint8, mode="r").data)
    reader = _Reader(data)
    magic, version = reader.scalar("<I"), reader.scalar("<I")
    if magic != 0x46554747 or version < 2:
        raise ValueError(f"{path} is not a GGUF file of version 2 or later")
    n_tensors, n_fields = reader.scalar("<Q"), reader.scalar("<Q")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        key = reader.text()
        fields[key] = reader.value(reader.scalar("<I"))
    entries = []
    for _ in range(n_tensors):
        name = reader.text()
        shape = tuple(reader.scalar("<Q") for _ in range(reader.scalar("<I")))[::-1]
        entries.append((name, shape, reader.scalar("<I"), reader.scalar("<Q")))
    alignment = fields.get("general.alignment", 32)
    base = -(-reader.at // alignment) * alignment
    tensors = {
        name: _dequantise(data[base + offset :], shape, kind)
        for name, shape, kind, offset in entries
    }
    return fields, tensors


def _dequantise(data: memoryview, shape: tuple[int, ...], kind: int) -> np.ndarray:
    count = int(np.prod(shape))
    if kind == _F32:
        return np.frombuffer(data, "<f4", count).reshape(shape).copy()
    if kind == _Q8_0:  # blocks of 32: a scale, then 32 signed bytes
        block = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
        blocks = np.frombuffer(data, block, count // 32)
        values = blocks["values"] * blocks["scale"].astype(np.float32)[:, None]
        return values.reshape(shape)
    if kind == _Q4_1:  # blocks of 32: scale, minimum, 16 bytes; low nibbles are the first half
        block = np.dtype([("scale", "<f2"), ("low", "<f2"), ("packed", "u1", 16)])
        blocks = np.frombuffer(data, block, count // 32)
        packed = blocks["packed"]
        nibbles = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
        scale, low = (blocks[key].astype(np.float32)[:, None] for key in ("scale", "low"))
        return (nibbles * scale + low).reshape(shape)
    raise ValueError(f"GGUF tensor type {kind} is not supported")


def llama_weights(
    tensors: dict[str, np.ndarray], heads: int, kv_heads: int
) -> dict[str, np.ndarray]:
    """Tensors under a transformers decoder's names; q and k rows are put back in their order."""
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    out = {
        "embed_tokens.weight": tensors["token_embd.weight"],
        "norm.weight": tensors["output_norm.weight"],
    }
    for name, value in tensors.items():
        if not name.startswith("blk."):
            continue
        _, layer, part, _ = name.split(".")
        if part in ("attn_q", "attn_k"):
            value = _unpermute(value, heads if part == "attn_q" else kv_heads)
        out[f"layers.{layer}.{names[part]}.weight"] = value
    return out


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores each head's rows in pairs; transformers stores first halves, then second ones."""
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)
