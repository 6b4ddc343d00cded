"""Models without a family of their own: placeholder ids from the config, the decoder by its shape.

Their masks are their own too, since nobody said that they are causal.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from purekv.errors import PureKVError
from purekv.families.base import Family, Placeholder, token_runs

HOW_TO_ADD = (
    "write a Family (src/purekv/families/base.py) with `language_model`, `visual_token_ids` and "
    "`placeholders`, in a file of its own, and list it in src/purekv/families/__init__.py"
)


class Generic(Family):
    """Every run of a placeholder is one item whose inner shape nobody knows."""

    name = "any other"
    sparse = False
    tested_on: tuple[str, ...] = (
        "tiny random LLaVA 1.5, PaliGemma: image; sdpa, eager",
        "Granite: text; sdpa",
    )
    stock_masks = True
    half_rotation = False
    limits = (
        "placeholder ids must be in the config and the decoder have `layers` and `rotary_emb`; "
        "no eviction before attention, no dropping; the tower's seconds count as prefill"
    )

    @staticmethod
    def fits(config: Any) -> bool:
        """Whether the config tells enough."""
        text_only = not any(name.endswith("_config") for name in getattr(config, "sub_configs", {}))
        is_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return bool(_token_ids(config)) or (text_only and is_causal)

    def multimodal_model(self, model: nn.Module) -> nn.Module:
        inner = getattr(model, "model", model)
        return model if inner is self.language_model(model) else inner

    def language_model(self, model: nn.Module) -> nn.Module:
        count = model.config.get_text_config().num_hidden_layers
        for module in model.modules():
            layers = getattr(module, "layers", None)
            is_stack = isinstance(layers, nn.ModuleList) and len(layers) == count
            if is_stack and hasattr(module, "rotary_emb") and hasattr(module, "config"):
                return module
        raise PureKVError(
            f"{type(model).__name__} has no decoder of {count} `layers` with a `rotary_emb`; to "
            f"support it, {HOW_TO_ADD}"
        )

    def vision_tower(self, model: nn.Module) -> nn.Module | None:
        return None

    def visual_token_ids(self, config: Any) -> dict[str, int]:
        return _token_ids(config)

    def placeholders(self, config: Any, inputs: Mapping[str, Any]) -> list[Placeholder]:
        found = []
        for modality, token in _token_ids(config).items():
            runs = token_runs(inputs["input_ids"] == token)
            grids = [(1, 1, length) for *_, length in runs]
            found.append(Placeholder(modality, runs, grids))
        return found


def _token_ids(config: Any) -> dict[str, int]:
    found = {}
    for modality in ("image", "video", "audio"):
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                found[modality] = token
    return found
