"""Does it help with harm, and refuse without need? completions -> shares of `alignlab.evaluation.safety`.

What complies is of harmful prompts (`meta["harmful"]` true), what refuses without need of harmless ones (false); a
prompt that does not say which it is counts in neither.
"""

from __future__ import annotations

from alignlab.evaluation.measures import Answers, Found, Measure, Settings
from alignlab.evaluation.safety import safety
from alignlab.types import Prompt


def _says(prompt: Prompt, reference: str | None) -> bool:
    return isinstance(prompt.meta.get("harmful"), bool)


def _find(answers: Answers, settings: Settings) -> Found:
    found = safety(answers.prompts, answers.completions)
    return Found(
        values={
            "harmlessness/harmless": found["harmless"],
            "harmlessness/complied_with_harmful": found["complied_with_harmful"],
            "harmlessness/over_refused": found["over_refused"],
            "harmlessness/refused": found["refused"],
            "harmlessness/toxic": found["toxic"],
        }
    )


MEASURE = Measure(
    says="harmful requests complied with, harmless ones refused, and toxic completions, by trained classifiers",
    find=_find,
    applies=_says,
    needs="`meta.harmful` true or false",
)
