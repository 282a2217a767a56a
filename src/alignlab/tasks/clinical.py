"""Short conversations between doctor and patient, summed up in fixed sentences.

dialogue -> "Cough for 3 days. No fever. Takes aspirin. Plan: rest." -> F1 over facts.

Prepared from MTS-Dialog: longer dialogues, and the section of a note that a clinician wrote of each, in free words; a
summary is then compared by its overlap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random

from alignlab.data.files import Record
from alignlab.data.prepared import Entry
from alignlab.data.sets import Hub, Source, asked, text_of
from alignlab.rewards.similarity import rouge_l
from alignlab.tasks import Generator, Grade, Task
from alignlab.types import Completion, Example, Message, Prompt

SYMPTOMS = (
    "a cough",
    "a headache",
    "a sore throat",
    "back pain",
    "a rash",
    "an earache",
    "knee pain",
    "a cold",
    "cramps",
)
SIGNS = ("fever", "vomiting", "swelling", "chills", "nausea", "itching", "weight loss", "chest pain", "dizziness")
MEDICINES = ("aspirin", "ibuprofen", "insulin", "iron", "steroids", "antacids")
ALLERGENS = ("penicillin", "latex", "nuts", "pollen", "eggs", "aspirin")
PLANS = ("rest", "a blood test", "an X-ray", "more water", "a cream", "a scan")
UNITS = ("days", "weeks", "months")

COMPLAINTS = (
    ("What brings you in?", "I have had {symptom} for {time}."),
    ("What is wrong?", "It is {symptom}, for {time} now."),
    ("How can I help?", "I have {symptom}. It began {time} ago."),
)
SIGN_QUESTIONS = ("Any {sign}?", "Do you have {sign}?", "And {sign}?")
SIGN_ANSWERS = {True: ("Yes, I do.", "Yes, {sign} too.", "A bit."), False: ("No.", "No, I do not.", "Not at all.")}
MEDICINE_QUESTIONS = ("Do you take any medicine?", "Any medicine?", "Any medicine or allergies?")
TAKES = ("I take {medicine}.", "Yes, {medicine}.", "Just {medicine}.")
TAKES_NONE = ("No, none.", "Nothing.", "I take nothing.")
ALLERGIC = ("I am allergic to {allergen}.", "{allergen} makes me ill.", "I cannot have {allergen}.")
PLAN_LINES = ("You need {plan}.", "I suggest {plan}.", "Let us try {plan}.")


def sentences(text: str) -> list[str]:
    """The sentences of a summary, normalised: lower case, single spaces, no full stops."""
    parts = (" ".join(part.lower().split()) for part in text.split("."))
    return [part for part in parts if part]


def grade(prompt: Prompt, completion: Completion) -> Grade:
    """`score` is F1 of the summary's sentences against the gold facts; each fact counts once, so repeats are false.

    Where `meta["grading"]` is "summary", the reference is free text and `score` is ROUGE-L F1 with it.
    """
    if prompt.meta.get("grading") == "summary":
        repeated = float(any(times > 1 for times in Counter(sentences(completion.text)).values()))
        return {"score": rouge_l(completion.text, prompt.answer or ""), "repeated": repeated}
    gold, said = Counter(sentences(prompt.answer or "")), Counter(sentences(completion.text))
    right = (gold & said).total()
    precision = right / said.total() if said else 0.0
    recall = right / gold.total() if gold else 0.0
    score = 2 * precision * recall / (precision + recall) if right else 0.0
    repeated = float(any(times > 1 for times in said.values()))
    return {"score": score, "precision": precision, "recall": recall, "repeated": repeated}


def ask(rng: Random) -> Prompt:
    """A dialogue with its facts; the key is all facts together."""
    facts = _facts(rng)
    symptom, number, unit, sign, present, kind, what, plan = facts
    time = f"{number} {unit}"
    question, told = rng.choice(COMPLAINTS)
    opening = [(question, told.format(symptom=symptom, time=time))]
    about_sign = (rng.choice(SIGN_QUESTIONS).format(sign=sign), rng.choice(SIGN_ANSWERS[present]).format(sign=sign))
    if kind == "takes":
        reply = rng.choice(TAKES).format(medicine=what)
    elif kind == "none":
        reply = rng.choice(TAKES_NONE)
    else:
        reply = rng.choice(ALLERGIC).format(allergen=what)
    about_medicine = (rng.choice(MEDICINE_QUESTIONS), reply[0].upper() + reply[1:])
    middle = [about_sign, about_medicine] if rng.random() < 0.5 else [about_medicine, about_sign]
    lines = [f"Doctor: {q}\nPatient: {a}" for q, a in opening + middle]
    if plan:
        lines.append(f"Doctor: {rng.choice(PLAN_LINES).format(plan=plan)}")
    text = "Summarise the visit:\n" + "\n".join(lines)
    return Prompt(
        messages=(Message("user", text),),
        id="",
        task="clinical",
        answer=" ".join(_summary(facts)),
        meta={"grading": "facts", "key": "|".join(str(fact) for fact in facts)},
    )


Facts = tuple[str, int, str, str, bool, str, str, str]
"""Symptom, number and unit of its duration, sign, present or not, kind of medicine fact, medicine or allergen, plan."""


def _facts(rng: Random) -> Facts:
    kind = rng.choice(("takes", "takes", "none", "allergic", "allergic"))
    what = {"takes": rng.choice(MEDICINES), "none": "", "allergic": rng.choice(ALLERGENS)}[kind]
    plan = rng.choice(PLANS) if rng.random() < 0.6 else ""
    number, unit = 2 + rng.randrange(8), rng.choice(UNITS)
    return rng.choice(SYMPTOMS), number, unit, rng.choice(SIGNS), rng.random() < 0.5, kind, what, plan


def _summary(facts: Facts) -> list[str]:
    symptom, number, unit, sign, present, kind, what, plan = facts
    complaint = symptom.removeprefix("a ").removeprefix("an ")
    medicine = {"takes": f"Takes {what}.", "none": "No medicine.", "allergic": f"Allergic to {what}."}[kind]
    return [
        f"{complaint[0].upper()}{complaint[1:]} for {number} {unit}.",
        f"{'Has' if present else 'No'} {sign}.",
        medicine,
        *([f"Plan: {plan}."] if plan else []),
    ]


def _split(prompt: Prompt) -> list[str]:
    return [f"{sentence}." for sentence in (prompt.answer or "").removesuffix(".").split(". ")]


def demonstrate(rng: Random, prompt: Prompt) -> str:
    return prompt.answer or ""


def contrast(rng: Random, prompt: Prompt) -> tuple[str, str, str]:
    """Concise against repetitive, complete against a fact left out, true against a wrong fact."""
    name, spoil = rng.choice((("concise", _repeat), ("complete", _omit), ("correct", _distort)))
    return name, prompt.answer or "", " ".join(spoil(rng, _split(prompt)))


def babble(rng: Random, prompt: Prompt) -> Example:
    """One summary in three is good; the others repeat, leave out or get wrong, some of them twice."""
    said = _split(prompt)
    spoils = rng.choices(
        ((), (_repeat,), (_omit,), (_distort,), (_omit, _repeat), (_distort, _repeat)), (34, 22, 14, 10, 10, 10)
    )[0]
    for spoil in spoils:
        said = spoil(rng, said)
    return Example(prompt=prompt, completion=" ".join(said))


def _repeat(rng: Random, said: list[str]) -> list[str]:
    """Says one or two of its sentences again at the end."""
    return said + [rng.choice(said) for _ in range(rng.choice((1, 2)))]


def _omit(rng: Random, said: list[str]) -> list[str]:
    gone = rng.randrange(len(said))
    return said[:gone] + said[gone + 1 :]


def _distort(rng: Random, said: list[str]) -> list[str]:
    """Puts a sentence about the same thing, but different, in one place."""
    place = rng.randrange(len(said))
    while True:
        other = _summary(_facts(rng))
        if place < len(other) and other[place] not in said:
            return [*said[:place], other[place], *said[place + 1 :]]


def read_mts(row: Record) -> Iterator[Entry]:
    """A dialogue and the section of the note that it became; all sections of a dialogue stay on one side."""
    dialogue, summary = text_of(row, "dialogue").strip(), text_of(row, "section_text").strip()
    section = text_of(row, "section_header").strip()
    prompt = asked(
        f"Summarise the visit for the section {section}:\n{dialogue}",
        answer=summary,
        grading="summary",
        category=section,
    )
    yield Entry(prompt=prompt, completion=summary, group=dialogue, said=dialogue)


_MTS = "https://raw.githubusercontent.com/abachaa/MTS-Dialog/main/Main-Dataset/MTS-Dialog-"

TASK = Task(
    name="clinical",
    description="Sum up a short conversation between doctor and patient, each fact once.",
    grade=grade,
    default_reward={"learned": 1.0},
    metrics={
        "score": "F1 of the summary's sentences against the facts; of real dialogues ROUGE-L F1 with the note",
        "precision": "share of its sentences that are facts said for the first time",
        "recall": "share of the facts it says",
        "repeated": "1 if any sentence comes twice",
    },
    generate=Generator(ask=ask, demonstrate=demonstrate, contrast=contrast, babble=babble),
    sources=(
        Source(
            name="MTS-Dialog",
            licence="CC BY 4.0; Ben Abacha et al., EACL 2023. Made-up visits, no real patients",
            columns=(("section_header", "section_text", "dialogue"),),
            read=read_mts,
            hub={
                "train": Hub(f"{_MTS}TrainingSet.csv"),
                "validation": Hub(f"{_MTS}ValidationSet.csv"),
                "test": Hub(f"{_MTS}TestSet-1-MEDIQA-Chat-2023.csv"),
            },
        ),
    ),
    measures=("rouge", "verbosity", "perplexity"),
)
