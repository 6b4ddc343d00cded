"""What a user may ask for: one frozen, validated, JSON-serialisable dataclass."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from purekv.allocation import ALLOCATIONS
from purekv.errors import PureKVError
from purekv.planning.plan import Plan
from purekv.scoring import BEFORE_LAYERS, DROPPING, SCORERS, WHOLE_FRAMES

DEFAULT_BUDGET = 0.2

# The contract names more values than are built; asking for one of those is refused here, before
# any work, rather than silently served by something else.
AVAILABLE: dict[str, tuple[str, ...]] = {
    "allocation": tuple(ALLOCATIONS),
    "prefill": ("dense", "spatiotemporal"),
    "evict": ("post", "active", "drop"),
    "scope": ("visual", "prompt"),
    "first_token": ("exact", "compressed"),
}


@dataclass(frozen=True)
class SpatioTemporalConfig:
    """Settings of `prefill="spatiotemporal"`; `purekv.attention.pattern` says who sees whom.

    Raises:
        PureKVError: a value is out of range; the message names what is not.
    """

    tile: int | tuple[int, ...] = 2
    """Side of a tile in visual tokens: a visual token sees its own tile in earlier frames. Or one
    for each layer of the model, 0 where it stays dense."""

    anchor_frames: int = 1
    """First frames of each video that all later tokens see."""

    dense_layers: int | tuple[int, ...] = 0
    """Layers that stay dense: the first N, or these."""

    min_tokens: int = 16384
    """Prompts with fewer visual tokens stay dense. From the default on, sparse attention is faster:
    on an H100, at Qwen2.5-VL-7B shapes, a layer takes 3.0 ms dense and 1.6 ms sparse at 16k tokens,
    and 11.7 and 2.4 ms at 32k."""

    def __post_init__(self) -> None:
        for name in ("dense_layers", "tile"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        tiles = self.tile if isinstance(self.tile, tuple) else ()
        if not all(_is_int(tile) and tile >= 0 for tile in tiles):
            raise PureKVError(f"tile={self.tile!r}; write 0 or more for each layer")
        for name, least in (("tile", 1), ("anchor_frames", 0), ("min_tokens", 0)):
            if name == "tile" and isinstance(self.tile, tuple):
                continue
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                raise PureKVError(f"{name}={value!r}; write a whole number of {least} or more")
        layers = self.dense_layers
        numbers = layers if isinstance(layers, tuple) else (layers,)
        if not all(_is_int(number) and number >= 0 for number in numbers):
            raise PureKVError(
                f"dense_layers={layers!r} is not understood; write a number of first layers, or "
                "layer numbers such as (0, 1, 14)"
            )

    def tile_of(self, layer_idx: int) -> int:
        """0: dense."""
        if isinstance(self.dense_layers, tuple):
            is_dense = layer_idx in self.dense_layers
        else:
            is_dense = layer_idx < self.dense_layers
        if is_dense:
            return 0
        return self.tile[layer_idx] if isinstance(self.tile, tuple) else self.tile


@dataclass(frozen=True)
class PureKVConfig:
    """Settings of one PureKV run.

    Raises:
        PureKVError: a value is out of range or not available; the message names what is.
    """

    budget: float | int = None  # type: ignore[assignment]  # a number once it is made
    """Visual tokens kept per (layer, KV head): a share in (0, 1], or a count of 2 or more. Left
    out: the plan's, or 0.2."""

    allocation: str = "uniform"
    """How the budget is spread, its total unchanged: "uniform"; "pyramid", falling from layer to
    layer; "ada", by the scores of all heads of a layer."""

    layer_shares: tuple[float, ...] | None = None
    """Each layer's part of the budget, up to a common factor; None: as `allocation` has it."""

    scorer: str = "clie"
    """How importance is estimated: a name in `purekv.scoring.SCORERS`."""

    source_layers: tuple[int, ...] | str = "auto"
    """Layers whose attention is measured (CLIE); each serves the layers up to the next one."""

    window: int | str = "question"
    """Observing queries: "question" (all text after the last visual token) or the last N text
    tokens."""

    prefill: str = "dense"
    """Attention pattern of the prefill: "dense", or "spatiotemporal" for visual tokens of long
    prompts, which is faster and lossy."""

    spatiotemporal: SpatioTemporalConfig = field(default_factory=SpatioTemporalConfig)
    """Settings of that pattern."""

    evict: str = "post"
    """When entries leave: "post", after the layer's own attention, so that prefill is exact.
    "active": before it, in layers above the first source that are no sources themselves, which see
    only what they keep (all layers, where a scorer has no sources), densely: lossy.
    "drop": tokens that are not kept behind a source layer are not computed by the layers above it
    (fewer behind each source, the budget's behind the last), which is faster and lossy. A plain
    forward then answers logits of the kept positions only."""

    prune: float | None = None
    """Share of the visual tokens that go in at all, in (0, 1): what repeats the frame before is
    left out before the first layer (`purekv.scoring.frame_difference`), and the budget, still one
    of all of them, is spent on what went in. None: all. Faster, and lossy where videos do not
    repeat."""

    plan: str | None = None
    """Path of a calibrated plan, or the name of one that ships with purekv. It sets what is left at
    its default."""

    scope: str = "visual"
    """Which entries may be evicted: "visual" tokens only; or all of the "prompt", text included,
    but its first four tokens and the observation window (the last 32 tokens where nothing is
    visual). The budget then is of those that may."""

    first_token: str = "exact"
    """"exact": the first answer token comes out of the prefill. "compressed": the text behind the
    last visual token is recomputed on the compressed cache first, so that every answer token
    feels the eviction."""

    certificate: bool = False
    """Measure how large each layer's error can be, for the report. Costs, in every layer, a little
    more than a source layer's scoring."""

    tolerance: float | None = None
    """Limit of the certificate's bound, as a share of a layer's output. Layers above it are chosen
    by their own attention, where that lowers the bound."""

    def __post_init__(self) -> None:
        if self.plan is not None:
            self._take(Plan.read(self.plan).settings_at(self.budget))
        if self.budget is None:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
        for name in ("source_layers", "layer_shares"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_budget(self.budget)
        _check_source_layers(self.source_layers)
        if not isinstance(self.spatiotemporal, SpatioTemporalConfig):
            raise PureKVError(
                f"spatiotemporal={self.spatiotemporal!r} is not understood; write "
                "SpatioTemporalConfig(tile=2)"
            )
        _check_window(self.window)
        _check_scorer(self.scorer)
        for name, allowed in AVAILABLE.items():
            value = getattr(self, name)
            if value not in allowed:
                raise PureKVError(f"{name}={value!r} is not available; use {_one_of(allowed)}")
        _check_layer_shares(self)
        _check_drop(self)
        _check_prune(self)
        if self.evict == "active" and ALLOCATIONS[self.allocation].ragged:
            raise PureKVError(
                f"evict='active' needs equal counts in all heads of a layer, unlike allocation="
                f"{self.allocation!r}; use allocation='uniform' or 'pyramid', or evict='post'"
            )
        _check_tolerance(self.tolerance)

    def _take(self, settings: Mapping[str, Any]) -> None:
        """A plan's settings, where nothing else was said."""
        _check_known(type(self), settings)
        for one in fields(self):
            value = settings.get(one.name)
            if one.name == "spatiotemporal" and value is not None:
                _check_known(SpatioTemporalConfig, value)
                mine, plain = asdict(self.spatiotemporal), asdict(SpatioTemporalConfig())
                said = {k: v for k, v in mine.items() if v != plain[k]}
                object.__setattr__(self, one.name, SpatioTemporalConfig(**{**value, **said}))
            elif value is not None and getattr(self, one.name) == one.default:
                object.__setattr__(self, one.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(one) for key, one in value.items()}
            return list(value) if isinstance(value, tuple) else value

        return plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PureKVConfig":
        """Inverse of `to_dict`; unknown keys are refused."""
        _check_known(cls, data)
        nested = data.get("spatiotemporal")
        if isinstance(nested, Mapping):
            _check_known(SpatioTemporalConfig, nested)
            data = {**data, "spatiotemporal": SpatioTemporalConfig(**nested)}
        return cls(**data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "PureKVConfig":
        return cls.from_dict(json.loads(text))


def _check_known(kind: type[Any], data: Mapping[str, Any]) -> None:
    known = [one.name for one in fields(kind)]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise PureKVError(f"unknown setting {unknown[0]!r}; settings are {', '.join(known)}")


def _one_of(names: tuple[str, ...]) -> str:
    return " or ".join(repr(name) for name in names)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_budget(budget: object) -> None:
    hint = "write a share in (0, 1] such as 0.2, or a count of visual tokens such as 200"
    if _is_int(budget):
        if budget == 1:
            raise PureKVError("budget=1 is ambiguous; write 1.0 for everything, or a count above 1")
        if budget < 1:  # type: ignore[operator]
            raise PureKVError(f"budget={budget} is out of range; {hint}")
    elif isinstance(budget, float):
        if not 0.0 < budget <= 1.0:
            raise PureKVError(f"budget={budget} is out of range; {hint}")
    else:
        raise PureKVError(f"budget={budget!r} is not a number; {hint}")


def _check_source_layers(source_layers: object) -> None:
    if source_layers == "auto":
        return
    hint = "write 'auto' or ascending layer numbers such as (2, 8, 14)"
    if not isinstance(source_layers, tuple) or not source_layers:
        raise PureKVError(f"source_layers={source_layers!r} is not understood; {hint}")
    if not all(_is_int(layer) and layer >= 0 for layer in source_layers):
        raise PureKVError(f"source_layers={source_layers!r} is not understood; {hint}")
    if list(source_layers) != sorted(set(source_layers)):
        raise PureKVError(f"source_layers={source_layers!r} is not ascending; {hint}")


def _check_window(window: object) -> None:
    if window != "question" and not (_is_int(window) and window >= 1):  # type: ignore[operator]
        raise PureKVError(
            f"window={window!r} is not understood; write 'question' or a number of text tokens"
        )


def _check_layer_shares(config: PureKVConfig) -> None:
    shares = config.layer_shares
    if shares is None:
        return
    numbers = isinstance(shares, tuple) and all(isinstance(one, float | int) for one in shares)
    if not numbers or not sum(shares) > 0 or min(shares) < 0:
        raise PureKVError(
            f"layer_shares={shares!r} is not understood; write a number of 0 or more for each layer"
        )
    if config.allocation == "pyramid" or config.evict == "drop":
        raise PureKVError(
            "layer_shares says how many each layer keeps, and so does allocation='pyramid' and "
            "evict='drop'; use one of them"
        )


def _check_tolerance(tolerance: object) -> None:
    if tolerance is None or (isinstance(tolerance, float | int) and tolerance > 0):
        return
    raise PureKVError(
        f"tolerance={tolerance!r} is not understood; write the largest error of a layer that you "
        "accept, as a share of its output, such as 0.1"
    )


def _check_drop(config: PureKVConfig) -> None:
    if config.evict != "drop":
        if config.scorer in BEFORE_LAYERS:
            raise PureKVError(
                f"scorer={config.scorer!r} looks at tokens before any layer does; use evict='drop'"
            )
        return
    if config.scorer not in DROPPING:
        raise PureKVError(
            f"scorer={config.scorer!r} cannot drop tokens; with evict='drop' use one of "
            f"{', '.join(DROPPING)}"
        )
    if config.scope == "prompt" and config.scorer in BEFORE_LAYERS:
        raise PureKVError(
            f"scorer={config.scorer!r} compares frames and knows nothing of text; use "
            'scope="visual", or another scorer'
        )
    if config.allocation != "uniform":
        raise PureKVError(
            f"evict='drop' keeps the same tokens in all layers; allocation={config.allocation!r} "
            "needs evict='post'"
        )


def _check_prune(config: PureKVConfig) -> None:
    share = config.prune
    if share is None:
        return
    if not isinstance(share, float) or not 0.0 < share < 1.0:
        raise PureKVError(
            f"prune={share!r} is out of range; write the share of the visual tokens that go in, "
            "such as 0.4"
        )
    if isinstance(config.budget, float) and config.budget > share:
        raise PureKVError(
            f"budget={config.budget} is more than goes in with prune={share}; lower the budget, or "
            "raise prune"
        )
    whole = {"prefill": "dense", "evict": "post", "scope": "visual"}
    for name, value in whole.items():
        if getattr(config, name) != value:
            raise PureKVError(
                f"{name}={getattr(config, name)!r} is not available with prune, which leaves holes "
                f"in the frames; use {name}={value!r}, or leave prune out"
            )
    if config.scorer in WHOLE_FRAMES:
        raise PureKVError(
            f"scorer={config.scorer!r} compares whole frames, and prune leaves holes in them; use "
            "another scorer, or leave prune out"
        )


def _check_scorer(scorer: object) -> None:
    if scorer not in SCORERS:
        raise PureKVError(f"scorer={scorer!r} is unknown; scorers are {', '.join(SCORERS)}")
