"""What kvpress keeps of a tiny random Llama's cache, as files. Runs where kvpress is installed.

    python benchmarks/kvpress_kept.py DIR

Writes `tensors.safetensors` (query, key and value of each layer, and the rotary angles) and
`kept.json` (the positions that each press leaves in each layer and KV head). What stays is read
off the cache: the keys that are in it afterwards are looked up among all keys.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

TOKENS = 640
_EXACT = "donot_use_mm_for_euclid_dist"
BUDGETS = (0.5, 0.2)  # kept; kvpress counts what it drops
WINDOW = 64
PRESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv": ("SnapKVPress", {"window_size": WINDOW}),
    "snapkv_unpooled": ("SnapKVPress", {"window_size": WINDOW, "kernel_size": 1}),
    "ada_snapkv": ("SnapKVPress", {"window_size": WINDOW}),
    "ada_snapkv_unpooled": ("SnapKVPress", {"window_size": WINDOW, "kernel_size": 1}),
    "observed_attention": ("ObservedAttentionPress", {}),
    "expected_attention": ("ExpectedAttentionPress", {}),
    "key_diff": ("KeyDiffPress", {}),
    "knorm": ("KnormPress", {}),
    "streaming": ("StreamingLLMPress", {}),
}


def tiny_llama(attention: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # far from uniform attention
                scale = 2.0 if "q_proj" in name else 1.0
                weight.normal_(0, scale * weight.shape[-1] ** -0.5)
    return model


def prefill(model: LlamaForCausalLM, ids: Tensor) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


def tensors(model: LlamaForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden = kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]
        query = module.q_proj(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        found[f"{module.layer_idx}.query"] = query
        found["cos"], found["sin"] = cos, sin

    hooks = [
        layer.self_attn.register_forward_hook(look, with_kwargs=True)
        for layer in model.model.layers
    ]
    cache = prefill(model, ids)
    for hook in hooks:
        hook.remove()
    for number, layer in enumerate(cache.layers):
        found[f"{number}.key"], found[f"{number}.value"] = layer.keys, layer.values
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def kept(name: str, budget: float, ids: Tensor, all_keys: list[Tensor]) -> list[list[list[int]]]:
    """Ascending positions of each layer and KV head."""
    kind, arguments = PRESSES[name]
    press = getattr(kvpress, kind)(compression_ratio=1 - budget, **arguments)
    if name.startswith("ada_"):
        press = kvpress.AdaKVPress(press)
    model = tiny_llama("eager" if name == "observed_attention" else "sdpa")
    with press(model):
        cache = prefill(model, ids)
    layers = []
    for layer, keys, before in zip(model.model.layers, cache.layers, all_keys, strict=True):
        heads = []
        for head in range(before.shape[1]):
            if name.startswith("ada_"):  # nothing leaves the cache; it is masked when decoding
                _, masked_heads, masked = layer.self_attn.masked_key_indices
                stays = torch.ones(TOKENS, dtype=torch.bool)
                stays[masked[masked_heads == head]] = False
                heads.append(stays.nonzero().flatten().tolist())
            else:
                distance = torch.cdist(keys.keys[0, head], before[0, head], compute_mode=_EXACT)
                assert distance.amin(-1).max() < 1e-4  # eager's keys differ in the last bits
                heads.append(sorted(distance.argmin(-1).tolist()))
                assert len(set(heads[-1])) == len(heads[-1])
        layers.append(heads)
    return layers


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    model = tiny_llama("sdpa")
    found = tensors(model, ids)
    keys = [found[f"{number}.key"] for number in range(model.config.num_hidden_layers)]
    cases = [
        {
            "name": name,
            "press": kind,
            "arguments": arguments,
            "budget": budget,
            "kept": kept(name, budget, ids, keys),
        }
        for name, (kind, arguments) in PRESSES.items()
        for budget in BUDGETS
    ]
    save_file(found, folder / "tensors.safetensors")
    facts = {
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "config": model.config.to_dict(),
        "tokens": TOKENS,
        "window": WINDOW,
        "cases": cases,
    }
    (folder / "kept.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
