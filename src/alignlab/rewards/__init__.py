"""Rewards, one file each: plain functions that judge completions and know no task.

(prompts, completions) -> for each completion one finite float, or one for each of its tokens (stop token included), or
None where the reward does not apply to that prompt.

The function is named as its file, so `rewards/exact.py` holds `exact`; it may take keyword options, and a recipe's are
checked by their names and annotations. `NEEDS` beside it says what a prompt must have, if anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alignlab.types import Completion, Prompt

RewardFunction = Callable[[Sequence[Prompt], Sequence[Completion]], Sequence[float | Sequence[float] | None]]
"""What a reward is once its options are bound."""
