"""Asking an LLM judge for scores: (prompts, completions, what to grade by) -> numbers in [0, 1], None where unreadable.

Options in a recipe -> an endpoint -> one client a process, so that its caps hold for a whole run. Replies are cached on
disk: a resumed run, and a second one, asks nothing twice.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from alignlab.errors import UserError
from alignlab.types import Completion, Prompt

if TYPE_CHECKING:  # most runs have no judge
    from alignlab.judge import ChatClient, Endpoint

ONLY_HOW = ("api_key_env", "max_calls", "max_cost", "input_price", "output_price", "cache", "concurrency", "timeout_s")
MOST_UNREADABLE = 0.5
"""Share of replies without a score above which the judge is of no use."""


class JudgeOptions(TypedDict, total=False):
    """What a recipe may write beside the weight of a reward that asks a judge."""

    model: str
    base_url: str | None
    api_key_env: str
    temperature: float
    max_tokens: int
    max_calls: int | None
    max_cost: float | None
    input_price: float | None
    output_price: float | None
    cache: str | None
    concurrency: int
    timeout_s: float
    client: Any


def client_of(options: JudgeOptions) -> Any:
    """What is asked: the given `client` (anything with `complete`), or the endpoint that the options describe.

    Raises:
        UserError: an option is out of range, the package or the key is missing.
    """
    given: dict[str, Any] = dict(options)
    client = given.pop("client", None)
    if client is not None:
        if not callable(getattr(client, "complete", None)) or given:
            raise UserError("judge: `client` needs a method complete(conversations) and no other option beside it")
        return client
    from alignlab.judge import Endpoint

    cache = given.pop("cache", None) or _default_cache()
    seconds = {"timeout": given.pop("timeout_s")} if "timeout_s" in given else {}
    endpoint = Endpoint(**given, **seconds, cache=Path(str(cache)).expanduser())
    if endpoint.max_calls != 0:
        if importlib.util.find_spec("openai") is None:
            raise UserError("judge: needs the package openai: pip install 'alignlab[judge]'")
        if endpoint.base_url is None and not os.environ.get(endpoint.api_key_env):
            raise UserError(
                f"judge: no key for {endpoint.model!r} in the environment variable {endpoint.api_key_env}; set it, or "
                "name another one in `api_key_env`, or an endpoint of your own in `base_url`"
            )
    return _client(endpoint)


@lru_cache(maxsize=16)
def _client(endpoint: Endpoint) -> ChatClient:
    from alignlab.judge import ChatClient

    return ChatClient(endpoint)


def _default_cache() -> Path:
    return Path(os.environ.get("ALIGNLAB_CACHE") or Path.home() / ".cache" / "alignlab") / "judge"


def scores(
    client: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    rubrics: Sequence[str | None],
    references: Sequence[str | None],
) -> list[float | None]:
    """A judge's score of each completion by its rubric, in [0, 1]; None where no score can be read from the reply.

    Raises:
        UserError: the client cannot go on, or most of its replies hold no score.
    """
    from alignlab.judge import grade

    found = grade(client, prompts, completions, rubric=rubrics, reference=references) if prompts else []
    unread = [i for i, score in enumerate(found) if score is None]
    if len(unread) > MOST_UNREADABLE * len(found):
        raise UserError(
            f"judge: {len(unread)} of {len(found)} replies hold no score, the first about prompt "
            f"{prompts[unread[0]].id!r}, completion {completions[unread[0]].text[:60]!r}; choose another model"
        )
    return found
