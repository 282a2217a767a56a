"""Is the completion the wanted Python expression?

completion text -> syntax tree -> 1.0 if equal to the tree of the prompt's answer, else 0.0. Nothing is ever run.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence

from alignlab.types import Completion, Prompt

NEEDS = "a column `answer`, and a column `grading` that is expression"
LONGEST_EXPRESSION = 400
"""Characters; longer text is no expression. Bounds the depth of what the parser meets."""
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
    """Whether both are single Python expressions with equal syntax trees."""
    tree = parse_expression(text)
    return tree is not None and tree == parse_expression(answer)


def parse_expression(text: str) -> str | None:
    """The syntax tree of one expression, written out (`ast.dump`); None for anything else, however hostile."""
    text = text.strip()
    if len(text) > LONGEST_EXPRESSION:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes and literals warn while they are parsed
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
    return ast.dump(tree) if _depth(tree) <= DEEPEST_NESTING else None


def _depth(tree: ast.AST) -> int:
    """Levels of the tree, level by level instead of by recursion."""
    depth, level = 0, [tree]
    while level:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth
