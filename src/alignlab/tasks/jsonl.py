"""Your own rows in any usual format: prompt and completion, messages, chosen and rejected, text, or labels.

file -> whatever its columns say; nothing grades it unless there is a reference answer to compare with.
"""

from __future__ import annotations

from alignlab.tasks import Task
from alignlab.tasks._text import OVERLAP, grade_by_overlap

TASK = Task(
    name="jsonl",
    description="Your own rows, in whatever usual format they are.",
    grade=grade_by_overlap,
    default_reward={},
    metrics={"score": f"{OVERLAP}; missing where there is no `answer`"},
    measures=("verbosity", "distinct", "perplexity"),
)
