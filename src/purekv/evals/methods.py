"""Methods by the names that people know them by, and the configs that stand for them."""

from collections.abc import Sequence
from itertools import product
from typing import Any, TypeAlias

from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.evals.frames import NAME as FRAMES
from purekv.evals.frames import FewerFrames
from purekv.scoring import SCORERS

Method: TypeAlias = PureKVConfig | FewerFrames

# Published methods that are a scorer and something else.
ALIASES: dict[str, dict[str, Any]] = {}


def method_names() -> list[str]:
    return [*SCORERS, *ALIASES, FRAMES]


def method_settings(name: str) -> dict[str, Any]:
    """The config fields that make up a method.

    Raises:
        PureKVError: an unknown name; the message lists the known ones.
    """
    if name in ALIASES:
        return dict(ALIASES[name])
    if name not in SCORERS:
        raise PureKVError(f"method {name!r} is unknown; methods are {', '.join(method_names())}")
    return {"scorer": name}


def method_name(config: Method) -> str:
    """The inverse: a published method's name if the config is one's, else the scorer's."""
    if isinstance(config, FewerFrames):
        return FRAMES
    for name, settings in ALIASES.items():
        if all(getattr(config, field) == value for field, value in settings.items()):
            return name
    return config.scorer


def make_configs(
    methods: Sequence[str],
    budgets: Sequence[float | int],
    prefills: Sequence[str] = ("dense",),
    evicts: Sequence[str] = ("post",),
    **settings: Any,
) -> list[PureKVConfig]:
    """Every method with every budget, prefill and way to evict.

    A budget of 1.0 with dense prefill is the full cache, which is measured anyway: left out.
    """
    configs = []
    for name, prefill, evict, budget in product(methods, prefills, evicts, budgets):
        config = PureKVConfig(
            budget=budget, prefill=prefill, evict=evict, **{**settings, **method_settings(name)}
        )
        if (budget, prefill) != (1.0, "dense") and config not in configs:
            configs.append(config)
    return configs


def make_methods(
    methods: Sequence[str], budgets: Sequence[float | int], **settings: Any
) -> list[Method]:
    """As `make_configs`, which it calls, and the methods that are no compression of a cache."""
    made: list[Method] = []
    for name in dict.fromkeys(methods):
        if name == FRAMES:
            made += [FewerFrames(budget) for budget in dict.fromkeys(budgets) if budget != 1.0]
        else:
            made += make_configs([name], budgets, **settings)
    return made
