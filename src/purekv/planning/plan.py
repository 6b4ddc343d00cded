"""A calibrated plan: a readable file that says how one model is best compressed."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from purekv.errors import PureKVError

SHIPPED = Path(__file__).parent / "plans"
SETTINGS = (
    "budget", "scorer", "source_layers", "layer_shares", "allocation", "prefill", "spatiotemporal",
    "evict", "prune",
)  # fmt: skip
_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What `purekv calibrate` found for one model and target."""

    fingerprint: str
    """Of the model; see `model_fingerprint`."""
    num_layers: int
    target: str
    """As it was asked for, e.g. "kv=0.1"."""
    settings: dict[str, Any]
    """Fields of `PureKVConfig`, of those in `SETTINGS`; `layer_shares` by budget."""
    expected: dict[str, Any] = field(default_factory=dict)
    """What the plan should cost, and what it did on the calibration samples."""
    measured: dict[str, Any] = field(default_factory=dict)
    """What it was found from: samples, and the errors of each choice."""

    @classmethod
    def read(cls, path: str) -> "Plan":
        """A plan's file, or the name of one that ships with purekv.

        Raises:
            PureKVError: there is none, or it is no plan.
        """
        file = Path(path)
        if not file.is_file():
            file = SHIPPED / f"{path}.json"
        if not file.is_file():
            raise PureKVError(
                f"plan not found: {path}; give the file that purekv calibrate wrote, or one of "
                f"{', '.join(shipped_plans())}"
            )
        try:
            data = json.loads(file.read_text())
            if data.pop("purekv_plan") != _FORMAT:
                raise ValueError("another version of the format")
            plan = cls(**data)
            unknown = sorted(set(plan.settings) - set(SETTINGS))
            if unknown:
                raise ValueError(f"unknown setting {unknown[0]!r}")
        except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            raise PureKVError(
                f"{path} is not a plan ({error}); write one with purekv calibrate"
            ) from error
        return plan

    def settings_at(self, budget: float | int | None) -> dict[str, Any]:
        """The settings, layer shares those of the budget nearest to this one (by their ratio), or
        to the plan's own where this is none or a count."""
        settings = dict(self.settings)
        shares = settings.get("layer_shares")
        if isinstance(shares, Mapping):
            wanted = budget if isinstance(budget, float) and budget > 0 else settings["budget"]
            nearest = min(shares, key=lambda one: abs(math.log(float(one) / wanted)))
            settings["layer_shares"] = shares[nearest]
        return settings

    def write(self, path: Path) -> None:
        path.write_text(_readable({"purekv_plan": _FORMAT, **self.to_dict()}) + "\n")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, model: nn.Module, path: str) -> None:
        """Raises PureKVError for a model that the plan was not made for."""
        found = model_fingerprint(model)
        if found != self.fingerprint:
            raise PureKVError(
                f"plan {path} was calibrated for another model ({self.fingerprint}, this one is "
                f"{found}); calibrate this one with purekv calibrate --model"
            )


def shipped_plans() -> list[str]:
    return sorted(file.stem for file in SHIPPED.glob("*.json"))


def model_fingerprint(model: nn.Module) -> str:
    """Twelve hex digits that tell a model from others of its shape: names, shapes and a sample of
    the weights, as bfloat16, so that float32 and bfloat16 copies of a checkpoint are one model."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        some = weight.detach().flatten()[:: max(1, weight.numel() // 64)][:64]
        digest.update(some.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _readable(value: Any, depth: int = 0) -> str:
    """JSON with one line for whatever fits in one."""
    line = json.dumps(value)
    if not isinstance(value, dict | list) or len(line) + depth <= 100 or not value:
        return line
    inner = " " * (depth + 1)
    if isinstance(value, Mapping):
        rows = [f"{json.dumps(k)}: {_readable(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(inner + row for row in rows) + "\n" + " " * depth + "}"
    if not any(isinstance(one, dict | list) for one in value):
        return line  # a row of numbers stays a row
    rows = [_readable(one, depth + 1) for one in value]
    return "[\n" + ",\n".join(inner + row for row in rows) + "\n" + " " * depth + "]"
