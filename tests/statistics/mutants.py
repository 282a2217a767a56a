"""Mutants of a module, made to show that a test notices them; (module, text, replacement) → module."""

import inspect
import sys
from types import ModuleType


def mutated(module: ModuleType, text: str, replacement: str) -> ModuleType:
    """A fresh copy of `module` with the only occurrence of `text` in its source replaced."""
    source = inspect.getsource(module)
    if source.count(text) != 1:  # no AssertionError: a stale mutant must not look like a caught one
        raise ValueError(f"{text!r} occurs {source.count(text)} times in {module.__name__}: update the mutant")
    mutant = ModuleType(f"{module.__name__}_mutant")
    sys.modules[mutant.__name__] = mutant  # where dataclasses look their annotations up
    exec(compile(source.replace(text, replacement), f"{module.__file__}:{replacement}", "exec"), mutant.__dict__)
    return mutant
