"""Methods by the names that people know them by, and the configs that stand for them."""

from collections.abc import Sequence
from itertools import product
from typing import Any, TypeAlias

from purekv.allocation import ALLOCATIONS
from purekv.config import AVAILABLE, PureKVConfig
from purekv.errors import PureKVError
from purekv.evals.frames import NAME as FRAMES
from purekv.evals.frames import FewerFrames
from purekv.planning import Plan
from purekv.scoring import SCORERS

Method: TypeAlias = PureKVConfig | FewerFrames

# Published methods that are a scorer and something else.
ALIASES: dict[str, dict[str, Any]] = {
    "pyramidkv": {"scorer": "snapkv", "allocation": "pyramid"},
    "adakv": {"scorer": "snapkv", "allocation": "ada"},
    "fastv": {"scorer": "attention", "source_layers": (2,), "window": 1, "evict": "drop"},
    "evs": {"scorer": "frame_difference", "evict": "drop"},  # vLLM's efficient video sampling
}


def method_names() -> list[str]:
    return [*SCORERS, *ALIASES, FRAMES]


def method_settings(name: str) -> dict[str, Any]:
    """The config fields that make up a method.

    Raises:
        PureKVError: an unknown name; the message lists the known ones.
    """
    if name in ALIASES:
        return dict(ALIASES[name])
    scorer, _, allocation = name.partition("+")
    if scorer not in SCORERS or (allocation and allocation not in ALLOCATIONS):
        raise PureKVError(
            f"method {name!r} is unknown; methods are {', '.join(method_names())}, and any scorer "
            "with an allocation, such as clie+ada"
        )
    return {"scorer": scorer, "allocation": allocation or "uniform"}


def method_name(config: Method) -> str:
    """The inverse: a published method's name if the config is one's, else the scorer's."""
    if isinstance(config, FewerFrames):
        return FRAMES
    for name, settings in ALIASES.items():
        if all(getattr(config, field) == value for field, value in settings.items()):
            return name
    spread = "" if config.allocation == "uniform" else f"+{config.allocation}"
    return config.scorer + spread


def make_configs(
    methods: Sequence[str],
    budgets: Sequence[float | int],
    prefills: Sequence[str] = ("dense",),
    evicts: Sequence[str] = ("post",),
    **settings: Any,
) -> list[PureKVConfig]:
    """Every method with every budget, prefill and way to evict; equal configs once.

    A budget of 1.0 with dense prefill is the full cache, which is measured anyway: left out. So is
    a way to evict that a method does not have, where it has another one of `evicts`.

    Raises:
        PureKVError: a setting is wrong, or a method has none of `evicts`.
    """
    configs: list[PureKVConfig] = []
    for name, prefill in product(methods, prefills):
        refused: PureKVError | None = None
        found: list[PureKVConfig] = []
        for evict in evicts:
            chosen = {"prefill": prefill, "evict": evict, **settings, **method_settings(name)}
            if not _planned(chosen):
                chosen["plan"] = None
            dense = _prefill(chosen) == "dense"  # then 1.0 is the full cache; 1 is a mistake
            asked = [one for one in budgets if not (dense and isinstance(one, float) and one == 1)]
            try:
                found += [PureKVConfig(budget=budget, **chosen) for budget in asked]
            except PureKVError as error:
                if not _lacks(chosen):
                    raise
                refused = refused or error
        if refused and not found:
            raise refused
        configs += found
    return list(dict.fromkeys(configs))


def _planned(settings: dict[str, Any]) -> bool:
    """Whether a plan is for this method: others are shown beside it as they are."""
    plan = settings.get("plan")
    if plan is None or settings["allocation"] != "uniform":
        return False
    return settings["scorer"] in ("clie", Plan.read(plan).settings.get("scorer"))


def _prefill(settings: dict[str, Any]) -> str:
    """That of the settings, or of their plan, which sets what is left at its default."""
    prefill: str = settings["prefill"]
    if prefill == "dense" and settings.get("plan"):
        prefill = Plan.read(settings["plan"]).settings.get("prefill", prefill)
    return prefill


def _lacks(settings: dict[str, Any]) -> bool:
    """Whether a method as such cannot evict like this, whatever else is chosen."""
    needed = {name: settings[name] for name in ("scorer", "allocation", "evict")}
    try:
        PureKVConfig(**needed)
    except PureKVError:
        return needed["evict"] in AVAILABLE["evict"]
    return False


def make_methods(
    methods: Sequence[str],
    budgets: Sequence[float | int],
    **settings: Any,
) -> list[Method]:
    """As `make_configs`, which it calls, and the methods that are no compression of a cache."""
    made: list[Method] = []
    for name in methods:
        if name == FRAMES:
            shares = [budget for budget in budgets if budget != 1.0]
            made += [FewerFrames(budget) for budget in shares]
        else:
            made += make_configs([name], budgets, **settings)
    return list(dict.fromkeys(made))
