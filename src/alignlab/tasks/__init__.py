"""Tasks, one file each: what is asked, how an answer is graded, and which reward fits by default.

seed -> prompts, demonstrations, preference pairs; (prompt, completion) -> grade.

`tasks/reasoning.py` holds `TASK` and is asked for by its file name. The four starter tasks also bring a `Generator`:
everything they need is made from a seed, and what may be shown in training is kept apart from what is tested on by
hashing the content of each prompt (never its wording or the seed) to a split. Others say by their `sources` which
public sets they are made of; `alignlab data prepare` reads those.
"""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from random import Random

from alignlab.data.prepare import Sizes
from alignlab.data.prepared import Split
from alignlab.data.sets import Source
from alignlab.registry import did_you_mean
from alignlab.types import Completion, Example, Pair, Prompt

PATIENCE = 20_000
"""Draws in a row without a new prompt after which there are taken to be no more."""

Grade = Mapping[str, float]
"""`score` in [0, 1], and the task's details, each named in `Task.metrics`; what does not apply is left out, `score` too
where nothing is known that could decide it."""


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Four ways of making a task's data from a random number generator.

    Only `choice`, `choices`, `random` and `randrange` of `Random` are used: their results are the same in every Python.
    """

    ask: Callable[[Random], Prompt]
    """A prompt of any split, without id; `meta["key"]` is its content, which decides the split."""
    demonstrate: Callable[[Random, Prompt], str]
    """A completion in the aligned style."""
    contrast: Callable[[Random, Prompt], tuple[str, str, str]]
    """`(contrast, chosen, rejected)`: what the two completions differ in, and the two."""
    babble: Callable[[Random, Prompt], Example]
    """What an unaligned model reads in pretraining: every style, right and wrong."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. Example: `get_task("reasoning").grade(prompt, completion)["score"]`."""

    name: str
    description: str
    """One sentence."""
    grade: Callable[[Prompt, Completion], Grade]
    """Reward-independent judgement of one completion."""
    default_reward: Mapping[str, float]
    """Reward name -> weight."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Key of a grade -> what it says."""
    generate: Generator | None = None
    """None where the data come from files."""
    sources: tuple[Source, ...] = ()
    """Public sets that it can be prepared from; none: whatever file is named."""
    sizes: Sizes = field(default_factory=Sizes)
    """The most prompts of each split, unless `prepare` is told otherwise."""
    system_prompt: str = ""
    """Goes before prepared conversations that have no system message."""
    measures: tuple[str, ...] = ()
    """What `alignlab evaluate` measures by default."""
    starts_rl: bool = True
    """Whether RL may start from a policy trained on it; not where its completions judge answers and give none."""


def get_task(name: str) -> Task:
    """The task of that name. Raises ValueError naming the ones there are."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    if name not in names:
        parts = (f"no task is named {name!r}", did_you_mean(name, names), f"there are: {', '.join(names)}")
        raise ValueError("; ".join(filter(None, parts)))
    task: Task = import_module(f"{__name__}.{name}").TASK
    return task


def demonstrations(task: Task, split: Split, count: int, seed: int) -> list[Example]:
    """`count` demonstrations with distinct prompts, all of one split. Fewer are the beginning of more."""
    generator, rng = _start(task, "demonstrations", split, seed)
    prompts = _prompts(task, generator, rng, split, count, f"{task.name}/{split}")
    return [Example(prompt=prompt, completion=generator.demonstrate(rng, prompt)) for prompt in prompts]


def pairs(task: Task, split: Split, count: int, seed: int) -> list[Pair]:
    """`count` preference pairs with distinct prompts; `prompt.meta["contrast"]` names what the two differ in."""
    generator, rng = _start(task, "pairs", split, seed)
    made = []
    for prompt in _prompts(task, generator, rng, split, count, f"{task.name}/{split}-pairs"):
        contrast, chosen, rejected = generator.contrast(rng, prompt)
        prompt = replace(prompt, meta={**prompt.meta, "contrast": contrast})
        made.append(Pair(prompt=prompt, chosen=chosen, rejected=rejected))
    return made


def pretraining(task: Task, count: int, seed: int) -> list[Example]:
    """`count` rows of unaligned behaviour; prompts may come again, and all belong to the train split."""
    generator, rng = _start(task, "pretraining", "train", seed)
    asked = (prompt for prompt in _ask_forever(generator, rng) if split_of(prompt.meta["key"]) == "train")
    return [generator.babble(rng, replace(next(asked), id=f"{task.name}/pretraining/{i:06d}")) for i in range(count)]


def split_of(key: str) -> Split:
    """The split that content belongs to: 70 % train, 10 % validation, 20 % test, whatever the seed."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return "train" if bucket < 7 else "validation" if bucket < 8 else "test"


def _start(task: Task, kind: str, split: Split, seed: int) -> tuple[Generator, Random]:
    if task.generate is None:
        raise ValueError(f"task {task.name!r} has no generator; its data come from files, so name one in data.path")
    return task.generate, Random(f"{task.name}/{kind}/{split}/{seed}")


def _ask_forever(generator: Generator, rng: Random) -> Iterator[Prompt]:
    while True:
        yield generator.ask(rng)


def _prompts(task: Task, generator: Generator, rng: Random, split: Split, count: int, prefix: str) -> Iterator[Prompt]:
    """`count` prompts of the split with pairwise different texts, numbered; ValueError if there are not that many."""
    seen: set[str] = set()
    misses = 0
    for prompt in _ask_forever(generator, rng):
        if len(seen) == count:
            return
        text = prompt.messages[-1].content
        if text in seen or split_of(prompt.meta["key"]) != split:
            misses += 1
            if misses == PATIENCE:
                raise ValueError(f"task {task.name!r} has fewer than {count} distinct {split} prompts; ask for fewer")
            continue
        yield replace(prompt, id=f"{prefix}/{len(seen):05d}")
        seen.add(text)
        misses = 0
