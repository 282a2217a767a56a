"""Rewards, one file each: plain functions that judge completions and know no task.

(prompts, completions) -> for each completion one finite float, or one for each of its tokens (stop token included), or
None where the reward does not apply to that prompt.

The function is named as its file, so `rewards/exact.py` holds `exact`; it may take keyword options, and a recipe's are
checked by their names and annotations. Called with nothing to judge it checks them and loads nothing. Beside it may
stand `NEEDS`, what a prompt must have, in words; `applies(prompt, **options)`, whether it judges completions of that
prompt, where the function itself would need a model, an endpoint or a child process to say so; `FILES`, the options
that name files or folders; and `ONLY_HOW`, the options that change no value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from alignlab.types import Completion, Prompt

RewardFunction = Callable[[Sequence[Prompt], Sequence[Completion]], Sequence[float | Sequence[float] | None]]
"""What a reward is once its options are bound."""


class Detailed(float):
    """A value that says what it was made of: `Detailed(0.7, {"clarity": 0.9, "facts": 0.5})`.

    The parts are logged beside the value (`reward/rubric/clarity`) and count for nothing else.
    """

    parts: Mapping[str, float]

    def __new__(cls, value: float, parts: Mapping[str, float]) -> Detailed:
        detailed = super().__new__(cls, value)
        detailed.parts = dict(parts)
        return detailed
