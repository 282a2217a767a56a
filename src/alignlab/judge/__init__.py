"""Verdicts on completions: prompts and completions -> scores in [0, 1], or who of two systems answers better.

`client` asks any OpenAI-compatible endpoint, within a `budget` and through a `cache`; `local` asks a model on this
machine, or a trained reward model. `prompts` writes what is asked and `parsing` reads what is said. `graded` scores one
completion at a time, `pairwise` compares two systems in both orders, `agreement` sets a judge beside people.
"""

from alignlab.judge.client import DEFAULT_MODEL, ChatClient, Client, Endpoint
from alignlab.judge.graded import grade
from alignlab.judge.pairwise import Comparison, Game, compare, compare_scores
from alignlab.judge.parsing import parse_score, parse_verdict

__all__ = [
    "DEFAULT_MODEL",
    "ChatClient",
    "Client",
    "Comparison",
    "Endpoint",
    "Game",
    "compare",
    "compare_scores",
    "grade",
    "parse_score",
    "parse_verdict",
]
