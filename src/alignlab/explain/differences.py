"""How a recipe's numbers differ: fields, PRESETS over the class defaults -> a table, and what no field says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignlab.algorithms import Hyperparameters
from alignlab.explain.section import Differences, number

NOT_NUMBERS = ("name", "variant", "preset")
ORDER = ("paper", "trl", "verl", "openrlhf")


def defaults(method: type[Hyperparameters]) -> dict[str, Any]:
    """Field -> its default in the class."""
    fields = {name: field for name, field in method.model_fields.items() if name not in NOT_NUMBERS}
    return {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


def changed(method: Hyperparameters) -> dict[str, tuple[str, str]]:
    """Field -> its value here, and what defaults, preset and variant alone would give; only where they differ."""
    kind = type(method)
    below = {
        **defaults(kind),
        **kind.PRESETS.get(method.preset or "", {}),
        **kind.VARIANTS.get(method.variant or "", {}),
    }
    return {
        name: (number(getattr(method, name)), number(value))
        for name, value in below.items()
        if getattr(method, name) != value
    }


def differences(method: Hyperparameters) -> Differences:
    """The fields in which some preset is not as this recipe; in brackets what a preset leaves to the default."""
    kind = type(method)
    presets = {name: kind.PRESETS[name] for name in (*ORDER, *kind.PRESETS) if name in kind.PRESETS}
    rows = {}
    for name, default in defaults(kind).items():
        here = getattr(method, name)
        if any(preset.get(name, default) != here for preset in presets.values()):
            rows[name] = (number(here), *(_cell(preset, name, default) for preset in presets.values()))
    return Differences(columns=("here", *presets), rows=rows, departures=tuple(kind.DEPARTURES))


def _cell(preset: Mapping[str, Any], name: str, default: Any) -> str:
    return number(preset[name]) if name in preset else f"({number(default)})"
