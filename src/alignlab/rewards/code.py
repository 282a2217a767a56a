"""Is the completion the wanted Python expression?

completion text -> syntax tree -> 1.0 if equal to the tree of the prompt's answer, else 0.0. Nothing is ever run.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from typing import Literal

from alignlab.types import Completion, Prompt

NEEDS = "a column `answer`, and a column `grading` that is expression"
LONGEST_EXPRESSION = 400
"""Characters; longer text is no expression. Bounds the depth of what the parser meets."""
LONGEST_STATEMENTS = 20_000
"""Characters of a program; a longer one counts as none."""
DEEPEST_NESTING = 50
"""Levels of the syntax tree; deeper ones are no expression."""


def code(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
    """1.0 where the text parses to the same expression as `prompt.answer` (spacing, quotes, spare brackets aside).

    None where there is no answer or `meta["grading"]` is not "expression".
    """
    return [
        None
        if prompt.answer is None or prompt.meta.get("grading") != "expression"
        else float(same_expression(completion.text, prompt.answer))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def same_expression(text: str, answer: str) -> bool:
    """Whether both are single Python expressions with equal syntax trees; of an answer in statements, both programs."""
    wanted = parse_expression(answer)
    if wanted is None:
        wanted = parse_program(answer)
        return wanted is not None and parse_program(text) == wanted
    return parse_expression(text) == wanted


def parse_expression(text: str) -> str | None:
    """The syntax tree of one expression, written out (`ast.dump`); None for anything else, however hostile."""
    return _parse(text, "eval") if len(text.strip()) <= LONGEST_EXPRESSION else None


def parse_program(text: str) -> str | None:
    """The syntax tree of statements, written out; None for what is empty, no Python, or longer than is asked for."""
    return _parse(text, "exec") if text.strip() and len(text) <= LONGEST_STATEMENTS else None


def _parse(text: str, mode: Literal["eval", "exec"]) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes and literals warn while they are parsed
        try:
            tree = ast.parse(text.strip(), mode=mode)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
    return ast.dump(tree) if _depth(tree) <= DEEPEST_NESTING else None


def _depth(tree: ast.AST) -> int:
    """Levels of the tree, level by level instead of by recursion."""
    depth, level = 0, [tree]
    while level:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth
