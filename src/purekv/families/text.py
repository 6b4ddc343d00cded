"""Language models: nothing is visual, so `scope="prompt"` is what compresses them."""

from typing import Any

from purekv.families.generic import Generic


class Text(Generic):
    name = "language models"
    model_types = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
    checkpoints = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B")
    modalities = ("text",)
    tested_on = ("tiny random models: text; sdpa",)
    stock_masks = False
    half_rotation = True
    limits = 'scope="prompt" only'

    def visual_token_ids(self, config: Any) -> dict[str, int]:
        return {}
