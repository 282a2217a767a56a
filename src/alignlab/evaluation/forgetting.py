"""What training cost elsewhere: a run and its start -> how much more plain text and the start's words surprise it.

Two texts, both fixed: a page of plain English (`open_prompts.reference_paragraphs`), read without a chat template, and
what the start itself answers, greedily, to open questions. A run that drifted finds its start's answers unlikely; one
that forgot finds plain English unlikely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignlab.conversation import Template
from alignlab.evaluation.measures import Estimate
from alignlab.evaluation.perplexity import perplexity_estimate, surprise, token_nats
from alignlab.generate import Sampling
from alignlab.models import Model
from alignlab.rollout import sample_prompts
from alignlab.statistics.clustered import ratio_interval
from alignlab.types import Prompt, Row


def text_rows(template: Template, paragraphs: Sequence[str], context: int) -> list[Row]:
    """Paragraphs as plain text after BOS, without a stop token; cut at what the model can read."""
    prompt_ids = template.encode_prompt(Prompt(messages=(), id="text"))
    rows = [template.encode_completion(text, stop=False, chat=False) for text in paragraphs]
    if not prompt_ids:  # the first token is then what the others follow
        return [Row(prompt_ids=ids[:1], completion_ids=ids[1:context]) for ids in rows]
    return [Row(prompt_ids=prompt_ids, completion_ids=ids[: context - len(prompt_ids)]) for ids in rows]


def own_rows(start: Model, template: Template, prompts: Sequence[Prompt], max_tokens: int) -> list[Row]:
    """What the start answers, greedily."""
    ids = [template.encode_prompt(prompt) for prompt in prompts]
    sampling = Sampling(greedy=True, max_completion_tokens=max_tokens)
    said = sample_prompts(start, prompts, ids, template, sampling, num_samples=1, seed=0, phase=0)
    return [Row(prompt_ids=i, completion_ids=c[0].token_ids) for i, c in zip(ids, said, strict=True)]


def forgetting(
    model: Model,
    start: Model | None,
    template: Template,
    paragraphs: Sequence[str],
    prompts: Sequence[Prompt],
    *,
    context: int,
    max_tokens: int,
    max_rows: int = 16,
) -> dict[str, Estimate]:
    """Perplexities and what they rose by; only those of the plain text where there is no start.

    `forgetting/text_nats` and `forgetting/own_nats` are nats a token more than the start: 0 where nothing changed, and
    log 2 where the model is twice as surprised. Clusters are paragraphs and prompts.

    Args:
        start: the policy that training started from, with the same template.
        context: tokens the model can read at once.
        max_tokens: the most that the start answers.
    """
    rows = text_rows(template, paragraphs, context)
    names = [f"paragraph/{i}" for i in range(len(rows))]
    nats = token_nats(model, rows, pad_id=template.pad_id, max_rows=max_rows)
    texts = [template.decode(row.completion_ids) for row in rows]
    of_text = surprise(nats, texts, names)
    found = {
        "forgetting/text_perplexity": of_text["policy/perplexity"],
        "forgetting/text_bits_per_byte": of_text["policy/bits_per_byte"],
    }
    if start is None:
        return found
    before = token_nats(start, rows, pad_id=template.pad_id, max_rows=max_rows)
    found["forgetting/text_perplexity_start"] = perplexity_estimate(before, names)["policy/perplexity"]
    found["forgetting/text_nats"] = _rise(nats, before, names)
    rows = own_rows(start, template, prompts, max_tokens)
    names = [prompt.id for prompt in prompts]
    nats, before = (token_nats(m, rows, pad_id=template.pad_id, max_rows=max_rows) for m in (model, start))
    found["forgetting/own_perplexity"] = perplexity_estimate(nats, names)["policy/perplexity"]
    found["forgetting/own_perplexity_start"] = perplexity_estimate(before, names)["policy/perplexity"]
    found["forgetting/own_nats"] = _rise(nats, before, names)
    return found


def _rise(after: Sequence[Sequence[float]], before: Sequence[Sequence[float]], clusters: Sequence[str]) -> Estimate:
    """Nats a token that `after` is more surprised by the same tokens."""
    drifts = [math.fsum(a) - math.fsum(b) for a, b in zip(after, before, strict=True)]
    interval = ratio_interval(drifts, [float(len(row)) for row in after], clusters)
    return Estimate(
        value=interval.mean,
        low=interval.low,
        high=interval.high,
        completions=len(drifts),
        prompts=len(set(clusters)),
    )
