"""Whether a config fits a model, and which of its layers do what then."""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from purekv.allocation import ALLOCATIONS
from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.families import Family
from purekv.parallel import HeadShards
from purekv.planning import Plan
from purekv.roles import LayerRoles
from purekv.scoring import UNROTATING, Scorer, make_scorer
from purekv.scoring.clie import default_drop_layers, default_source_layers


def fit(
    config: PureKVConfig, model: PreTrainedModel, family: Family, shards: HeadShards
) -> tuple[Scorer, LayerRoles]:
    """The scorer and the roles of layers that a config means on this model.

    Raises:
        PureKVError: it cannot run there; says what to change.
    """
    text_config = family.language_model(model).config
    num_layers: int = text_config.num_hidden_layers
    evicting = global_layers(text_config)
    slides = len(evicting) < num_layers
    if slides:
        _refuse_others(config, _WITH_SLIDING_LAYERS, "models with sliding-window layers")
    if slides or family.stock_masks:
        _refuse_others(config, _WITH_STOCK_MASKS, "models whose masks may not be causal")
    if config.scorer in UNROTATING and not family.half_rotation:
        raise PureKVError(
            f"scorer={config.scorer!r} undoes the rotary embedding, and how "
            f"{type(model).__name__} rotates is not known; use another scorer"
        )
    scorer = make_scorer(config.scorer, _source_layers(config, evicting, num_layers), num_layers)
    sources: tuple[int, ...] = getattr(scorer, "source_layers", ())
    roles = LayerRoles(num_layers, evicting)
    if config.prune is not None and family.undroppable_layers(model.config):
        raise PureKVError(
            "prune is not available for models that add visual features of all tokens behind "
            "their first layers; leave prune out"
        )
    if config.evict == "drop":
        roles = LayerRoles(num_layers, evicting, dropping=sources)
        _check_dropping(sources, family.undroppable_layers(model.config))
    elif config.evict == "active":
        above = range(min(sources, default=-1) + 1, num_layers)
        roles = LayerRoles(num_layers, evicting, active=frozenset(above) - frozenset(sources))
    check_for_model(config, model)
    refuse_ragged_flash(config.allocation, text_config._attn_implementation)
    _check_shards(config, shards)
    return scorer, roles


def check_for_model(config: PureKVConfig, model: PreTrainedModel) -> None:
    """Raise a PureKVError for a plan of another model, or settings of layers that it lacks."""
    if config.plan is not None:
        Plan.read(config.plan).check(model, config.plan)
    num_layers: int = model.config.get_text_config().num_hidden_layers
    each = {"tile": config.spatiotemporal.tile, "layer_shares": config.layer_shares}
    for name, value in each.items():
        if isinstance(value, tuple) and len(value) != num_layers:
            raise PureKVError(
                f"{name} has {len(value)} numbers, the model {num_layers} layers; write one for "
                "each of them"
            )
    layers = config.spatiotemporal.dense_layers
    if isinstance(layers, tuple) and max(layers, default=0) >= num_layers:
        raise PureKVError(
            f"dense layer {max(layers)} does not exist; the model's layers are 0 to "
            f"{num_layers - 1}"
        )


def refuse_ragged_flash(allocation: str, attention: str) -> None:
    """Raise a PureKVError for an allocation that this attention implementation cannot mask."""
    if ALLOCATIONS[allocation].ragged and attention.startswith("flash"):
        raise PureKVError(
            f"allocation={allocation!r} keeps different counts in each head, which {attention} "
            'cannot mask; load the model with attn_implementation="sdpa", or use '
            'allocation="uniform" or "pyramid"'
        )


def refuse_whole_sequences(
    signature: inspect.Signature, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    """A forward pre-hook: raise a PureKVError for what needs the positions that are dropped."""
    named = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}
    asked = {"output_hidden_states": getattr(module.config, "output_hidden_states", False)}
    for name in ("labels", "output_hidden_states"):
        value = named.get(name, asked.get(name))
        if value is not None and value is not False:
            raise PureKVError(
                f"{name} needs every position, and evict='drop' and prune do not compute them "
                f"all; leave {name} out, or use evict='post' without prune"
            )


def global_layers(config: Any) -> tuple[int, ...]:
    """Numbers of the layers that see everything, of a decoder's config: only those are compressed.

    Raises:
        PureKVError: there are none, or layers that neither see everything nor a sliding window.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # as transformers' caches read it
        slides = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    others = set(kinds) - {"full_attention", "sliding_attention"}
    found = tuple(idx for idx, kind in enumerate(kinds) if kind == "full_attention")
    if others or not found:
        raise PureKVError(
            f"layers of type {', '.join(sorted(others or set(kinds)))} are not supported; "
            "load a model whose layers use full attention, or some of them a sliding window"
        )
    return found


# What such models do not take otherwise: a sliding cache cannot go back, and what is attended to
# without the model's mask would be so causally.
_WITH_SLIDING_LAYERS = {"evict": "post", "first_token": "exact", "prefill": "dense", "prune": None}
_WITH_STOCK_MASKS = {"evict": "post", "prefill": "dense", "prune": None}


def _refuse_others(config: PureKVConfig, allowed: dict[str, Any], models: str) -> None:
    for name, value in allowed.items():
        if getattr(config, name) != value:
            raise PureKVError(
                f"{name}={getattr(config, name)!r} is not available for {models}; use "
                f"{name}={value!r}"
            )


def _source_layers(
    config: PureKVConfig, evicting: tuple[int, ...], num_layers: int
) -> tuple[int, ...] | str:
    """The config's, among the layers that are compressed."""
    sources = config.source_layers
    if sources == "auto" and config.evict != "post":
        return default_drop_layers(num_layers)
    if len(evicting) == num_layers:
        return sources
    if isinstance(sources, str):
        return tuple(evicting[place] for place in default_source_layers(len(evicting)))
    unfit = [idx for idx in sources if idx < num_layers and idx not in evicting]
    if unfit:
        raise PureKVError(
            f"source layer {unfit[0]} sees a sliding window only; choose among {evicting}"
        )
    return sources


def _check_dropping(sources: tuple[int, ...], undroppable: int) -> None:
    if undroppable and min(sources, default=-1) < undroppable - 1:
        raise PureKVError(
            f"visual features of all tokens are added behind each of the first {undroppable} "
            f"layers, so evict='drop' needs source_layers of {undroppable - 1} or more (scorers "
            "without source layers drop too early)"
        )


def _check_shards(config: PureKVConfig, shards: HeadShards) -> None:
    if shards.size == 1:
        return
    if ALLOCATIONS[config.allocation].ragged:
        raise PureKVError(
            f"allocation={config.allocation!r} lets heads compete, which lie on other ranks "
            'under tensor parallelism; use allocation="uniform" or "pyramid"'
        )
    if config.certificate or config.tolerance is not None:
        raise PureKVError(
            "certificates look at all heads of a layer, which lie on several ranks under "
            "tensor parallelism; leave certificate and tolerance out"
        )
