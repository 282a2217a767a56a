"""Names and the files they stand for: `grpo` -> `alignlab/algorithms/grpo.py`; `package.module:thing` -> that thing."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from alignlab.errors import UserError

Kind = Literal["algorithms", "rewards", "tasks"]


def names(kind: Kind) -> list[str]:
    """The names of a kind, sorted: one a file of its package. Nothing is imported."""
    folder = Path(__file__).parent / kind
    return sorted(found.name for found in pkgutil.iter_modules([str(folder)]) if not found.name.startswith("_"))


def resolve(kind: Kind, name: str) -> Any:
    """The module of a name, or what a dotted path (`package.module:attribute`, `package.module`) leads to.

    Raises:
        UserError: no such name (with the nearest and all there are), or the path cannot be imported.
    """
    if "." in name or ":" in name:
        return _import(name)
    known = names(kind)
    if name not in known:
        parts = (f"no {kind[:-1]} is named {name!r}", did_you_mean(name, known), f"there are: {', '.join(known)}")
        raise UserError("; ".join(filter(None, parts)) + "; one of your own is named package.module:attribute")
    return importlib.import_module(f"alignlab.{kind}.{name}")


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`did you mean 'learning_rate'?` for the nearest option, or nothing if none is near."""
    by_lower = {option.lower(): option for option in options}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"did you mean {by_lower[near[0]]!r}?" if near else ""


def _import(path: str) -> Any:
    module, colon, attribute = path.partition(":")
    try:
        if not colon and not _is_module(path):
            module, _, attribute = path.rpartition(".")
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's own module does while it is imported
        raise UserError(f"cannot import {module!r} for {path!r} ({type(error).__name__}: {error})") from error
    for part in filter(None, attribute.split(".")):
        if not hasattr(found, part):
            hint = did_you_mean(part, [option for option in dir(found) if not option.startswith("_")])
            raise UserError(f"{module!r} has no {attribute!r}" + (f"; {hint}" if hint else ""))
        found = getattr(found, part)
    return found


def _is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:  # the part before the last dot is no package
        return False
