"""Says in plain words what looks wrong in a run: a row of metrics + what is remembered -> findings + what to remember.

A rule looks at metrics by name and knows no method; it speaks only where its metrics are. A finding appears after its
rule has held several times in a row and clears the same way, so that one odd batch says nothing. What rules need of
earlier rows is a few numbers in `LoopState.diagnosis`: a resumed run finds exactly what an uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import variance
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from alignlab.registry import did_you_mean

Severity = Literal["note", "warning", "stop"]
Ids = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]

MEDIAN_OF = 15
"""Gradient norms that a spike is compared with."""
NEAR_ZERO = 0.02
"""A loss that is called near 0."""
LEAST_FALL = 1.0
"""Nats by which the chosen completions have to fall at least, however likely they were: e times less likely."""


class DiagnosisLimits(BaseModel):
    """When a number counts as unusual. No limit is right for every run: one that is wrong for yours is a key away."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    stop_on: Ids = ()
    """Findings that end the run, e.g. [negative_kl, reward_hack]; it stops cleanly and says why."""
    ignore: Ids = ()
    """Findings that are never looked for."""
    window: int = Field(5, ge=1)
    """Phases that make up "at the start" (the first so many) and "now" (a running mean over about so many)."""
    patience: int = Field(3, ge=1)
    """Phases (or steps) in a row that a rule has to hold before its finding appears, or not hold before it clears.
    Rules about evaluations need two in a row."""
    negative_kl_errors: float = Field(3.0, gt=0)
    """Standard errors below 0 from which a mean KL is negative beyond noise: one phase in 700 by chance (a normal
    distribution), and then `patience` of them in a row."""
    negative_kl_per_token: float = Field(1e-3, ge=0)
    """Nats a token below 0 that count as rounding: above what float32 sampling and scoring differ by (1e-4)."""
    kl_per_token: float = Field(0.5, gt=0)
    """Nats a token from the reference, or from the start in an evaluation. Targets in use are .01 to .1 (document 001
    goes from .05 to .01; 6 nats a summary in arXiv:1909.08593); our starter runs end below .15."""
    entropy_share: float = Field(0.2, gt=0, lt=1)
    """Share of the entropy at the start that counts as collapse. Entropy is spent early and reward with it
    (arXiv:2505.22617); healthy starter runs keep half."""
    constant_groups: float = Field(0.8, gt=0, le=1)
    """Share of groups whose completions all earned the same, which teach nothing (DAPO, arXiv:2503.14476, redraws
    them); ours go up to .6 while learning."""
    clip_fraction: float = Field(0.3, gt=0, lt=1)
    """Share of tokens whose surrogate is clipped, at steps after a phase's first. Learning runs show .01 to .2; ours
    stay below .01."""
    ratio_deviation: float = Field(0.1, gt=0)
    """How far the mean ratio may be from 1 where (nearly) nothing is clipped: under the sampling policy its expectation
    is exactly 1."""
    critic_warmup_phases: int = Field(10, ge=0)
    """Phases before a critic is expected to explain anything."""
    gradient_spike: float = Field(10.0, gt=1)
    """Gradient norm over the median of the last 15. ZClip (arXiv:2504.02507) and its kin act on less; clipping to
    `max_grad_norm` makes a smaller spike harmless."""
    stop_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of completions that stop by themselves, below which most are cut off."""
    length_growth: float = Field(1.5, gt=1)
    """Factor on the length at the start. Document 001 calls 2 without a better win rate a danger sign; length pays in
    most reward models (arXiv:2310.03716)."""
    reward_rise: float = Field(0.5, gt=0)
    """How far the reward has to rise before a held-out score is expected to follow, in standard deviations of the
    reward at the start; a mean over `window` phases wanders by about .2."""
    score_rise: float = Field(0.01, ge=0)
    """Least rise of the held-out score over its start that counts as following."""
    score_errors: float = Field(2.0, gt=0)
    """Standard errors of the difference by which a held-out score has to fall to have fallen (about 95 %)."""
    component_share: float = Field(0.9, gt=0)
    """Share of the reward's variance due to one of several components, above which the others hardly count."""
    distinct_share: float = Field(0.3, gt=0, lt=1)
    """Share of the variety at the start (different completions of a group, different word pairs) that counts as loss of
    variety; healthy starter runs keep half."""
    chosen_fall: float = Field(0.5, gt=0)
    """Fall of the chosen completions' logprob, as a share of what it was at the start (and of 1 nat at least). Some
    fall is normal in DPO; a large one is likelihood displacement (arXiv:2410.08847, 2402.13228)."""

    @field_validator("stop_on", "ignore")
    @classmethod
    def _known(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for name in given:
            if name not in IDS:
                hint = did_you_mean(name, IDS) or f"there are: {', '.join(IDS)}"
                raise ValueError(f"no finding {name!r}; {hint}")
        return given


@dataclass(frozen=True, slots=True)
class Finding:
    """Something unusual: which, how bad, and a sentence with the number, the likely cause and what to try."""

    id: str
    severity: Severity
    sentence: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a row shows."""

    findings: tuple[Finding, ...]
    """What holds in this row, after its patience."""
    appeared: tuple[Finding, ...]
    """Those of them that did not hold before."""
    cleared: tuple[str, ...]
    """Ids that held before and no longer do."""
    memory: Mapping[str, float]
    """What the next row is compared with."""

    @property
    def stop_reason(self) -> str:
        """Why the run has to end; empty if it may go on."""
        return next((f"{f.id}: {f.sentence}" for f in self.appeared if f.severity == "stop"), "")

    def row(self) -> dict[str, Any]:
        """What the log says about it; nothing where there is nothing."""
        found = [{"id": f.id, "severity": f.severity, "sentence": f.sentence} for f in self.findings]
        return {"diagnosis": found} if found else {}

    def lines(self) -> list[str]:
        """What people are told: each finding when it appears and when it is over."""
        return [f"{f.severity}: {f.id}: {f.sentence}" for f in self.appeared] + [f"over: {id}" for id in self.cleared]


def diagnose(
    metrics: Mapping[str, float], memory: Mapping[str, float], limits: DiagnosisLimits, *, phase: int
) -> Diagnosis:
    """What a row of the log shows, in the light of the rows before it; a pure function.

    Args:
        metrics: of one optimiser step (with those of its phase in the phase's first row), or of an evaluation, whose
            names start with `evaluation/`.
        memory: of the row before; empty at the start.
        phase: number of the phase the row belongs to.
    """
    facts = _Facts(metrics, dict(memory), limits, phase)
    facts.take_in()
    holding, appeared, cleared = [], [], []
    for rule in RULES:
        verdict = None if rule.id in limits.ignore else rule.check(facts)
        if verdict is None:
            continue
        was, now = _patient(facts.memory, rule, verdict, limits)
        severity: Severity = "stop" if rule.id in limits.stop_on else rule.severity
        finding = Finding(rule.id, severity, verdict.sentence)
        if now and verdict.sentence:
            holding.append(finding)
            appeared += [] if was else [finding]
        cleared += [rule.id] if was and not now and rule.patience != "once" else []
    facts.take_in_after()
    return Diagnosis(tuple(holding), tuple(appeared), tuple(cleared), facts.memory)


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The findings of a whole run from its log: when each first and last held, in how many rows, its last sentence."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for finding in row.get("diagnosis", ()):
            entry = found.setdefault(finding["id"], {"id": finding["id"], "first_phase": row["phase"], "rows": 0})
            entry |= {**finding, "last_phase": row["phase"], "rows": entry["rows"] + 1}
    return list(found.values())


def score_noise(scores: Mapping[str, float], tasks: Mapping[str, str]) -> float | None:
    """Standard error of a mean over tasks of means over prompts, by the prompts: sqrt(sum of s_t² / n_t) / tasks.

    Args:
        scores: prompt id -> its score; tasks: prompt id -> its task.

    Returns:
        None where a task has fewer than two prompts.
    """
    by_task: dict[str, list[float]] = {}
    for prompt_id, score in scores.items():
        by_task.setdefault(tasks[prompt_id], []).append(score)
    if not by_task or min(map(len, by_task.values())) < 2:
        return None
    return math.sqrt(sum(variance(values) / len(values) for values in by_task.values())) / len(by_task)


# ---- what rules see --------------------------------------------------------------------------------------------------


class _Verdict(NamedTuple):
    """What a rule says: a sentence if it holds, else nothing; `sure` needs no second look."""

    sentence: str
    sure: bool = False


FINE = _Verdict("")

FOLLOWED = (
    "policy/entropy", "policy/logprobs_chosen", "policy/logprobs_desirable", "reward/mean", "reward/std",
    "completion/length", "group/distinct_fraction",
)  # fmt: skip
"""Phase means whose start and present are remembered."""
EVALUATED = ("evaluation/score", "evaluation/completion/length", "evaluation/completion/distinct_2")
"""Held-out numbers whose first value is remembered."""


@dataclass
class _Facts:
    """One row's metrics with what earlier rows left; the memory is a copy that the rules write into."""

    metrics: Mapping[str, float]
    memory: dict[str, float]
    limits: DiagnosisLimits
    phase: int
    fresh: bool = False
    """This is the first row of its phase, which has the metrics of the whole phase."""
    evaluation: bool = False
    """This is an evaluation."""

    def take_in(self) -> None:
        """Remembers what every rule may need, before any is asked."""
        self.evaluation = any(name.startswith("evaluation/") for name in self.metrics)
        if self.evaluation:
            for name in EVALUATED:
                value = self.of(name)
                if value is not None:
                    self.memory.setdefault(f"{name}.start", value)
            return
        self.fresh = self.memory.get("phase") != self.phase
        self.memory["phase"] = float(self.phase)
        for name in FOLLOWED:
            value = self.of(name)
            if self.fresh and value is not None:
                self._follow(name, value)

    def take_in_after(self) -> None:
        """Remembers the best held-out score, once the rules have compared this row with the best before it."""
        score = self.of("evaluation/score")
        if score is not None and score > self.memory.get("best.score", -math.inf):
            self.memory["best.score"] = score
            self.memory["best.error"] = self.of("evaluation/score_standard_error") or 0.0

    def of(self, name: str) -> float | None:
        """A metric of this row, if it is there and finite."""
        value = self.metrics.get(name)
        return None if value is None or not math.isfinite(value) else float(value)

    def of_phase(self, name: str) -> float | None:
        """A metric of a whole phase: once a phase."""
        return self.of(name) if self.fresh else None

    def of_phase_or_evaluation(self, name: str) -> float | None:
        """A metric of a phase or, in a run whose phases do not have it, of an evaluation."""
        if not self.evaluation:
            value = self.of_phase(name)
            if value is not None:
                self.memory[f"{name}.seen"] = 1.0
            return value
        return None if f"{name}.seen" in self.memory else self.of(f"evaluation/{name}")

    def start_and_now(self, name: str) -> tuple[float, float] | None:
        """Mean of a phase's metric over the first phases and over the latest, once there are some after the first."""
        return None if self.of_phase(name) is None else self.known(name)

    def known(self, name: str) -> tuple[float, float] | None:
        """The same in any row."""
        if self.memory.get(f"{name}.count", 0.0) <= self.limits.window:
            return None
        return self.memory[f"{name}.start"], self.memory[f"{name}.now"]

    def _follow(self, name: str, value: float) -> None:
        count = self.memory.get(f"{name}.count", 0.0) + 1
        within = count <= self.limits.window
        for end in ("start", "now"):
            before = self.memory.get(f"{name}.{end}", 0.0)
            if end == "now" or within:
                self.memory[f"{name}.{end}"] = before + (value - before) / min(count, self.limits.window)
        self.memory[f"{name}.count"] = count


def _patient(memory: dict[str, float], rule: _Rule, verdict: _Verdict, limits: DiagnosisLimits) -> tuple[bool, bool]:
    """Whether a finding held before, and whether it does now: as many verdicts in a row as its patience decide."""
    needed = {"phases": limits.patience, "evaluations": 2, "once": 1}[rule.patience]
    was, streak = f"{rule.id}.holds" in memory, memory.get(f"{rule.id}.streak", 0.0)
    if verdict.sentence:
        streak = needed if verdict.sure else min(float(needed), max(0.0, streak) + 1)
    else:
        streak = max(-float(needed), min(0.0, streak) - 1)
    now = streak >= needed or (was and streak > -needed)
    memory[f"{rule.id}.streak"] = float(streak)
    if now:
        memory[f"{rule.id}.holds"] = 1.0
    else:
        memory.pop(f"{rule.id}.holds", None)
    return was, now


# ---- rules -----------------------------------------------------------------------------------------------------------


def _not_finite(facts: _Facts) -> _Verdict | None:
    names = ("loss/total", "policy/ratio", "policy/entropy", "policy/approx_kl", "policy/kl_per_sequence",
             "reward/mean")  # fmt: skip
    bad = [name for name in names if name in facts.metrics and not math.isfinite(facts.metrics[name])]
    if not bad:
        return FINE if any(name in facts.metrics for name in names) else None
    return _Verdict(
        f"{' and '.join(bad)} {'is' if len(bad) == 1 else 'are'} not a finite number: a ratio or a reward overflowed. "
        "Lower the learning rate, and look at this phase's completions and rewards",
        sure=True,
    )


def _negative_kl(facts: _Facts) -> _Verdict | None:
    """In training against the phase's own standard error or, without one, against how the KL jumps between phases."""
    total, each = (facts.of_phase_or_evaluation(f"policy/kl_per_{unit}") for unit in ("sequence", "token"))
    error, jumps = facts.of_phase_or_evaluation("policy/kl_standard_error"), _jumps(facts)
    error = jumps if error is None else error
    if total is None or each is None or error is None:
        return None
    if total >= -facts.limits.negative_kl_errors * error or each >= -facts.limits.negative_kl_per_token:
        return FINE
    return _Verdict(
        f"the mean KL is {total:.3g} nats a completion (standard error {error:.2g}), and no KL is below 0: what was "
        "sampled is not what is scored. Look for filters (top-k, top-p, a minimum length) or another temperature in "
        "sampling, dropout, padding, or an adapter that only one of the two models has"
    )


def _jumps(facts: _Facts) -> float | None:
    """Running noise of the phase KL: half the mean squared jump is the variance of one value (von Neumann 1941)."""
    total, memory, window = facts.of_phase("policy/kl_per_sequence"), facts.memory, facts.limits.window
    if total is None:
        return None
    count = memory.get("kl.count", 0.0)
    if count:
        square = 0.5 * (total - memory["kl.last"]) ** 2
        noise = memory.get("kl.noise", 0.0)
        memory["kl.noise"] = noise + (square - noise) / min(count, float(window))
    memory["kl.last"], memory["kl.count"] = total, count + 1
    return math.sqrt(memory["kl.noise"]) if count >= window else None


def _kl_over_limit(facts: _Facts) -> _Verdict | None:
    each = facts.of_phase_or_evaluation("policy/kl_per_token")
    if each is None:
        return None
    if each <= facts.limits.kl_per_token:
        return FINE
    where = "start" if facts.evaluation else "reference"
    return _Verdict(
        f"the policy is {each:.2f} nats a token away from the {where} (limit {facts.limits.kl_per_token:g}): rewards "
        "and reward models say little about text this far from what they were made on. Raise kl_coef or beta, lower "
        "the learning rate, train for fewer phases, or keep an earlier checkpoint with evaluation.best",
        sure=facts.evaluation,
    )


def _entropy_collapse(facts: _Facts) -> _Verdict | None:
    known = facts.start_and_now("policy/entropy")
    if known is None or known[0] <= 0:
        return None
    start, now = known
    if now >= facts.limits.entropy_share * start:
        return FINE
    return _Verdict(
        f"the entropy fell from {start:.3g} to {now:.3g} nats a token ({now / start:.0%} of the start): the policy "
        "repeats itself and finds nothing new. Lower the learning rate, raise the KL or entropy coefficient, or raise "
        "clip_high"
    )


def _constant_groups(facts: _Facts) -> _Verdict | None:
    share = facts.of_phase("group/constant_fraction")
    if share is None:
        return None
    if share < facts.limits.constant_groups:
        return FINE
    return _Verdict(
        f"in {share:.0%} of the groups all completions earned the same (mean reward {_shown(facts, 'reward/mean')}), "
        "so they teach nothing: the prompts are too easy or too hard for the policy, or the reward is too coarse. Take "
        "other prompts, a larger group_size or a finer reward, or redraw such groups (max_redraws)"
    )


def _constant_reward(facts: _Facts) -> _Verdict | None:
    spread = facts.of_phase("reward/std")
    if spread is None:
        return None
    if spread > 1e-6 * max(1.0, abs(facts.of_phase("reward/mean") or 0.0)):
        return FINE
    return _Verdict(
        f"every completion of the phase earned {_shown(facts, 'reward/mean')}: there is nothing to prefer. Look at "
        "completions.jsonl: does the reward fit the data's answers, and do completions reach one before the limit?"
    )


def _chosen_falling(facts: _Facts) -> _Verdict | None:
    """Of fixed completions; an online method's own change all the time, and with them their logprobs."""
    known = facts.start_and_now("policy/logprobs_chosen") or facts.start_and_now("policy/logprobs_desirable")
    if known is None or "completion/length" in facts.metrics:
        return None
    start, now = known
    if start - now <= max(LEAST_FALL, facts.limits.chosen_fall * abs(start)):
        return FINE
    return _Verdict(
        f"the logprob of the chosen completions fell from {start:.3g} to {now:.3g}: the margin grows only because the "
        "rejected ones fall faster, and the probability goes to neither (likelihood displacement). Raise beta, lower "
        "the learning rate, add an NLL term on the chosen ones (RPO), or drop pairs that are almost the same"
    )


def _clip_fraction(facts: _Facts) -> _Verdict | None:
    """Of a whole phase, once it is over: the later a step, the more is clipped."""
    memory, here = facts.memory, facts.of("policy/clip_fraction")
    if not facts.fresh:
        if here is not None:
            memory["clip.sum"] = memory.get("clip.sum", 0.0) + here
            memory["clip.count"] = memory.get("clip.count", 0.0) + 1
        return None
    total, count = memory.pop("clip.sum", 0.0), memory.pop("clip.count", 0.0)
    if not count:
        return None
    if total / count <= facts.limits.clip_fraction:
        return FINE
    return _Verdict(
        f"{total / count:.0%} of the tokens were clipped in the last phase, after its first step, and had no gradient: "
        "the policy moves too far between two rounds of sampling. Lower the learning rate, or take fewer epochs or "
        "minibatches a phase"
    )


def _ratio_off(facts: _Facts) -> _Verdict | None:
    ratio, share = facts.of("policy/ratio"), facts.of("policy/clip_fraction")
    if ratio is None or share is None or share > 0.01:
        return None
    if abs(ratio - 1) <= facts.limits.ratio_deviation:
        return FINE
    return _Verdict(
        f"the mean ratio to the sampling policy is {ratio:.3g} though {share:.1%} of the tokens are clipped; on its "
        "own samples it is 1. Sampling and scoring see different temperatures, paddings or adapter states, or a few "
        "tokens have huge ratios: lower the learning rate"
    )


def _critic(facts: _Facts) -> _Verdict | None:
    explained = facts.of_phase("value/explained_variance")
    if explained is None or facts.phase < facts.limits.critic_warmup_phases:
        return None
    if explained > 0:
        return FINE
    return _Verdict(
        f"the critic's explained variance is {explained:.2f} after {facts.phase} phases: it predicts returns no better "
        "than a constant, and advantages are noise. Raise value_learning_rate or value_coef, give it more warm-up "
        "steps, or scale the reward to about 1"
    )


def _gradient_spike(facts: _Facts) -> _Verdict | None:
    judged, worst = False, ("", 0.0, 0.0)
    for name in sorted(n for n in facts.metrics if n.endswith("/grad_norm")):
        norm = facts.of(name)
        if norm is None:
            continue
        count = int(facts.memory.get(f"{name}.count", 0.0))
        last = sorted(facts.memory[f"{name}.{i}"] for i in range(min(count, MEDIAN_OF)))
        facts.memory[f"{name}.{count % MEDIAN_OF}"] = norm
        facts.memory[f"{name}.count"] = float(count + 1)
        if count >= MEDIAN_OF and last[MEDIAN_OF // 2] > 0:
            judged = True
            worst = max(worst, (name, norm, last[MEDIAN_OF // 2]), key=lambda x: x[1] / x[2] if x[2] else 0.0)
    name, norm, median = worst
    if not judged:
        return None
    if norm <= facts.limits.gradient_spike * median:
        return FINE
    return _Verdict(
        f"{name} is {norm:.3g}, {norm / median:.0f} times its median: an odd batch, or a run about to diverge. If it "
        "comes back, lower the learning rate or max_grad_norm, or warm up for longer",
        sure=True,
    )


def _cut_off(facts: _Facts) -> _Verdict | None:
    share = facts.of_phase_or_evaluation("completion/stop_fraction")
    if share is None:
        return None
    if share >= facts.limits.stop_fraction:
        return FINE
    return _Verdict(
        f"{1 - share:.0%} of the completions are cut off at the length limit: either data.max_completion_tokens is too "
        "small, or the policy does not stop (never trained on its stop token, or paid for length). Raise the limit, "
        "start from a fine-tuned policy, or set missing_stop_penalty",
        sure=facts.evaluation and facts.phase > 0,  # before training it may be what training is for
    )


def _length_growth(facts: _Facts) -> _Verdict | None:
    known = facts.start_and_now("completion/length")
    if known is None:
        return None
    start, now = known
    if now < facts.limits.length_growth * start:
        return FINE
    return _Verdict(
        f"completions grew from {start:.0f} to {now:.0f} tokens: fine if the task asks for it. Compare the held-out "
        "score before and after; a reward that pays for length by itself does this too"
    )


def _length_hack(facts: _Facts) -> _Verdict | None:
    length, score = facts.of("evaluation/completion/length"), facts.of("evaluation/score")
    if length is None or score is None:
        return None
    first_length = facts.memory["evaluation/completion/length.start"]
    first = facts.memory["evaluation/score.start"]
    if length < facts.limits.length_growth * first_length or score - first >= facts.limits.score_rise:
        return FINE
    return _Verdict(
        f"held-out completions grew from {first_length:.0f} to {length:.0f} tokens while their score went from "
        f"{first:.3f} to {score:.3f}: the reward pays for length and not for the task. Correlate the reward with the "
        "length, subtract a length penalty, or keep an earlier checkpoint with evaluation.best",
        sure=_fallen(facts, score),
    )


def _reward_hack(facts: _Facts) -> _Verdict | None:
    score, reward = facts.of("evaluation/score"), facts.known("reward/mean")
    spread = facts.memory.get("reward/std.start")
    if score is None or reward is None or spread is None:
        return None
    first, fallen = facts.memory["evaluation/score.start"], _fallen(facts, score)
    risen = reward[1] - reward[0] > facts.limits.reward_rise * spread
    if not risen or (score - first >= facts.limits.score_rise and not fallen):
        return FINE
    best = facts.memory.get("best.score", first)
    against = f"its best, {best:.3f}, by more than noise" if fallen else f"its start, {first:.3f}"
    return _Verdict(
        f"the training reward rose from {reward[0]:.3g} to {reward[1]:.3g} while the held-out score is {score:.3f}, "
        f"{'below' if fallen else 'no better than'} {against}: the reward is being gamed. Read completions.jsonl for "
        "what pays, mend the reward, raise kl_coef, or keep an earlier checkpoint with evaluation.best",
        sure=fallen,
    )


def _fallen(facts: _Facts, score: float) -> bool:
    """The held-out score is below its best by more than both evaluations' noise, taken as independent."""
    error, best = facts.of("evaluation/score_standard_error"), facts.memory.get("best.score")
    if error is None or best is None:
        return False
    noise = facts.limits.score_errors * math.hypot(error, facts.memory["best.error"])
    return score < best - max(noise, facts.limits.score_rise)


def _component_dominates(facts: _Facts) -> _Verdict | None:
    shares = {n.removeprefix("reward_share/"): s for n in facts.metrics if n.startswith("reward_share/")
              if (s := facts.of_phase(n)) is not None}  # fmt: skip
    if len(shares) < 2:
        return None
    name, share = max(shares.items(), key=lambda item: item[1])
    if share <= facts.limits.component_share:
        return FINE
    return _Verdict(
        f"{share:.0%} of the reward's variance is due to {name!r}, so the other components hardly count. If that is "
        "not wanted, change the weights, or normalise each component by itself"
    )


def _same_completions(facts: _Facts) -> _Verdict | None:
    known = facts.start_and_now("group/distinct_fraction")
    if known is None:
        return None
    start, now = known
    if now >= facts.limits.distinct_share * start:
        return FINE
    return _Verdict(
        f"the share of different completions among siblings fell from {start:.2f} to {now:.2f}: the policy has settled "
        "on one answer a prompt, and there is nothing to compare. If the held-out score is not good yet, raise the KL "
        "or entropy coefficient or lower the learning rate; if it is, stop"
    )


def _little_variety(facts: _Facts) -> _Verdict | None:
    pairs = facts.of("evaluation/completion/distinct_2")
    if pairs is None:
        return None
    start = facts.memory["evaluation/completion/distinct_2.start"]
    if pairs >= facts.limits.distinct_share * start:
        return FINE
    return _Verdict(
        f"different word pairs in held-out completions fell from {start:.2f} to {pairs:.2f} of all: the policy says "
        "the same to everything. Read evaluation_samples.json; raise the KL or entropy coefficient, lower the learning "
        "rate, or keep an earlier checkpoint with evaluation.best"
    )


def _loss_near_zero(facts: _Facts) -> _Verdict | None:
    loss = facts.of("loss/total")
    of_groups = all(facts.of_phase(name) is not None for name in ("group/constant_fraction", "policy/ratio"))
    if loss is None or not of_groups or "loss_near_zero.holds" in facts.memory:
        return None
    share = facts.of_phase("group/constant_fraction")
    if abs(loss) > NEAR_ZERO or (share is not None and share >= facts.limits.constant_groups):  # then it is no comfort
        return None
    return _Verdict(
        f"the loss is {loss:.1g}, which is normal: the advantages of a group cancel while the policy is the one that "
        "sampled, their gradients do not. Watch reward/mean and the evaluations instead"
    )


def _silent_reward(facts: _Facts) -> _Verdict | None:
    """Each component by itself: a task with few prompts may be missing in a phase by chance."""
    judged = {n.removeprefix("reward_judged/"): s for n in facts.metrics if n.startswith("reward_judged/")
              if (s := facts.of_phase(n)) is not None}  # fmt: skip
    for name, share in judged.items():
        facts.memory[f"silent/{name}"] = 0.0 if share else facts.memory.get(f"silent/{name}", 0.0) + 1
    silent = [repr(name) for name in judged if facts.memory[f"silent/{name}"] >= facts.limits.patience]
    if not judged:
        return None
    if not silent:
        return FINE
    return _Verdict(
        f"{' and '.join(silent)} judged no completion of the last {facts.limits.patience} phases: as if the reward had "
        "no such component. Its tasks are not the data's, or the rows lack what it reads (an answer, a format). Mend "
        "it, or drop it with reward.NAME=null",
        sure=True,
    )


def _no_step(facts: _Facts) -> _Verdict | None:
    """The phases of a method that samples have a row without a loss where there was nothing to learn from."""
    memory, best = facts.memory, facts.of("rejection/best_score")
    if best is not None:
        memory["best_score"] = max(best, memory.get("best_score", best))
    if facts.of_phase("ledger/completions") is None:
        return None
    memory["no_step"] = 0.0 if "loss/total" in facts.metrics else memory.get("no_step", 0.0) + 1
    if not memory["no_step"]:
        return FINE
    why = (
        "no group says which of its completions is better, or all were cut off. Take other prompts, a larger "
        "group_size, a finer reward, or a higher data.max_completion_tokens"
    )
    if facts.of("rejection/kept_fraction") is not None:
        seen = f"best score seen {memory['best_score']:.3g}" if "best_score" in memory else "nothing was judged"
        why = (
            f"nothing was kept ({seen}). Lower min_reward, take a larger group_size or other prompts, or read "
            "completions.jsonl: does the reward fit the data?"
        )
    return _Verdict(f"no optimiser step for {memory['no_step']:.0f} phases: {why}")


def _shown(facts: _Facts, name: str) -> str:
    value = facts.of(name)
    return "?" if value is None else f"{value:.3g}"


@dataclass(frozen=True)
class _Rule:
    """A rule's name, how bad it is, what its patience counts, and what it looks at (None = nothing to judge by)."""

    id: str
    severity: Severity
    patience: Literal["phases", "evaluations", "once"]
    check: Callable[[_Facts], _Verdict | None]


RULES = (
    _Rule("not_finite", "warning", "once", _not_finite),
    _Rule("negative_kl", "warning", "phases", _negative_kl),
    _Rule("kl_over_limit", "warning", "phases", _kl_over_limit),
    _Rule("entropy_collapse", "warning", "phases", _entropy_collapse),
    _Rule("constant_groups", "warning", "phases", _constant_groups),
    _Rule("constant_reward", "warning", "phases", _constant_reward),
    _Rule("chosen_falling", "warning", "phases", _chosen_falling),
    _Rule("clip_fraction", "warning", "phases", _clip_fraction),
    _Rule("ratio_off", "warning", "phases", _ratio_off),
    _Rule("critic_explains_nothing", "warning", "phases", _critic),
    _Rule("gradient_spike", "warning", "once", _gradient_spike),
    _Rule("cut_off", "warning", "phases", _cut_off),
    _Rule("length_growth", "note", "phases", _length_growth),
    _Rule("length_hack", "warning", "evaluations", _length_hack),
    _Rule("reward_hack", "warning", "evaluations", _reward_hack),
    _Rule("component_dominates", "note", "phases", _component_dominates),
    _Rule("silent_reward", "warning", "phases", _silent_reward),
    _Rule("no_step", "warning", "phases", _no_step),
    _Rule("same_completions", "warning", "phases", _same_completions),
    _Rule("little_variety", "warning", "evaluations", _little_variety),
    _Rule("loss_near_zero", "note", "once", _loss_near_zero),
)
IDS = tuple(rule.id for rule in RULES)
