"""What a server may be asked for: one frozen, validated dataclass, given to vLLM as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from purekv.errors import PureKVError
from purekv.serving.hole import Room

KEY = "purekv"
"""Of vLLM's `--additional-config`."""

SCORERS = ("clie", "attention", "snapkv", "value_norm", "key_diff")
"""Those that look at no queries but the window's."""


@dataclass(frozen=True)
class ServingConfig:
    """Settings of a compressing server.

    Raises:
        PureKVError: a value is out of range; the message names what is not.
    """

    budget: float | int = 0.2
    """Entries kept per (layer, KV head): a share of the prompt's tokens in (0, 1), or a count of 2
    or more. Text of prompts with images or videos goes first."""

    scorer: str = "clie"
    """How importance is estimated: a name in `SCORERS`."""

    source_layers: tuple[int, ...] | str = "auto"
    """Layers whose attention is measured (CLIE); each serves the layers up to the next one."""

    window: int = 32
    """The prompt's last tokens, which observe and always stay. Behind images and videos all text
    observes."""

    sinks: int = 4
    """The prompt's first tokens, which always stay."""

    min_tokens: int = 256
    """Prompts with fewer tokens are left as they are."""

    def __post_init__(self) -> None:
        if isinstance(self.source_layers, list):
            object.__setattr__(self, "source_layers", tuple(self.source_layers))
        for name, least in (("window", 1), ("sinks", 0), ("min_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PureKVError(f"{name}={value!r}; write a whole number of {least} or more")
        share = isinstance(self.budget, float) and 0 < self.budget < 1
        count = type(self.budget) is int and self.budget > 1
        if not share and not count:
            raise PureKVError(
                f"budget={self.budget!r}; write a share of the prompt below 1 such as 0.2, or a "
                "count of tokens such as 2000"
            )
        if self.scorer not in SCORERS:
            raise PureKVError(
                f"scorer={self.scorer!r} cannot serve; scorers here are {', '.join(SCORERS)}"
            )
        layers = self.source_layers
        if layers != "auto" and not (
            isinstance(layers, tuple)
            and layers
            and all(type(layer) is int and layer >= 0 for layer in layers)
            and list(layers) == sorted(set(layers))
        ):
            raise PureKVError(f"source_layers={layers!r}; write 'auto' or ascending layer numbers")

    @property
    def room(self) -> Room:
        return Room(self.budget, self.sinks + self.window, self.min_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field."""
        data = asdict(self)
        if isinstance(self.source_layers, tuple):
            data["source_layers"] = list(self.source_layers)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ServingConfig":
        """Inverse of `to_dict`; unknown keys are refused."""
        known = [one.name for one in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise PureKVError(f"unknown setting {unknown[0]!r}; settings are {', '.join(known)}")
        return cls(**data)

    @classmethod
    def among(cls, additional_config: object) -> "ServingConfig | None":
        """Those in vLLM's additional config; None where it does not ask for compression."""
        if not isinstance(additional_config, Mapping) or KEY not in additional_config:
            return None
        return cls.from_dict(additional_config[KEY])
