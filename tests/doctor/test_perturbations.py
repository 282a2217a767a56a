"""Small changes: what they do by hand, what they never touch, and that they are a function of text and seed."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.doctor.perturbations import PERTURBATIONS, SYNONYMS, perturb, pieces, protected

PROSE = "Has fever. Takes aspirin. I will help you now."
MIXED = (
    "Start with 3 apples, i.e. the big ones.\nThen buy 1,000.50 more!\n"
    "```python\nbig = help(now)\n\n\nstop. Start.\n```\n<reasoning>Think first. 35 + 2 = 37</reasoning>\n"
    "<answer>now help. Then stop.</answer> Use `buy  now` or max(xs). I think it is good. Really."
)
TEXTS = st.lists(
    st.sampled_from(
        ["help", "Now", "buy", "it.", "so!", "\n", "<answer>", "</answer>", "<b>", "```", "`", "3", "4.5", "-", "=",
         "f(x)", "[1]", "{", "}", "Dr.", "e.g.", "  ", "é", "'s", "%", ";"]
    ),
    max_size=25,
).map(" ".join)  # fmt: skip


def test_what_is_protected() -> None:
    assert protected(MIXED) == [
        "3", "1,000.50", "```python\nbig = help(now)\n\n\nstop. Start.\n```", "<reasoning>", "35 + 2 = 37",
        "</reasoning>", "<answer>now help. Then stop.</answer>", "`buy  now`", "max(xs)",
    ]  # fmt: skip
    assert "".join(piece.text for piece in pieces(MIXED)) == MIXED


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("17 - 9 = 8", ["17 - 9 = 8"]),
        ("sum(scores) / len(scores)", ["sum(scores) / len(scores)"]),
        ('user["age"] and names[:3]', ['user["age"]', "names[:3]"]),
        ("It costs $1,000.50, or 5 % of -3.", ["$1,000.50", "5 %", "-3"]),
        ("on 12/05/2024 at 10:30", ["12/05/2024", "10:30"]),
        ("def f(x):\n    return x", ["def f(x):", "    return x"]),
        ("<answer>never closed. Help", ["<answer>never closed. Help"]),
        ("Happy to help (with care), as you said: stop.", []),
        ("", []),
    ],
)
def test_protected_by_hand(text: str, found: list[str]) -> None:
    assert protected(text) == found


def test_synonyms_by_hand() -> None:
    assert perturb("synonyms", "BUY it") == "PURCHASE it"
    assert perturb("synonyms", "Sorry") == "Regretful"
    assert perturb("synonyms", "buyer 3 xyz") == "buyer 3 xyz"  # whole words only
    assert all(other != word and " " not in other for word, other in SYNONYMS.items())


def test_sentence_order_by_hand() -> None:
    """Three sentences move; the one with a number stays in its place; line breaks stay where they are."""
    assert perturb("sentence_order", "One. Two.") == "Two. One."
    assert perturb("sentence_order", "Yes.\nNo!") == "No!\nYes."
    assert perturb("sentence_order", "One. It is 3. Two.") == "Two. It is 3. One."
    assert perturb("sentence_order", "One. It is 3.") == "One. It is 3."
    assert perturb("sentence_order", "Ask Dr. House. Now.") == "Now. Ask Dr. House."


def test_truncation_by_hand() -> None:
    assert perturb("truncation", "One. Two. Three.") == "One. Two."
    assert perturb("truncation", "One. Two. It is 3.") == "One. It is 3."
    assert perturb("truncation", "Two. It is 3.") == "It is 3."
    assert perturb("truncation", "It is 3. So 4.") == "It is 3. So 4."
    assert perturb("truncation", "a b c d e f g h i j k l m n o p q r s t") == "a b c d e f g h i j k l m n o p q r"
    assert perturb("truncation", "only this") == "only"
    assert perturb("truncation", "word") == "word"


def test_whitespace_by_hand() -> None:
    assert perturb("whitespace", "a b") == "a  b"
    assert perturb("whitespace", "x = 1") == "x = 1"
    changed = perturb("whitespace", PROSE)
    assert changed != PROSE and changed.split() == PROSE.split()


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_the_same_text_and_seed_give_the_same_text(name: str) -> None:
    assert perturb(name, MIXED, 1) == perturb(name, MIXED, 1)
    long = " ".join(f"Word {word}. Help now." for word in "abcdefghij")
    assert name == "truncation" or len({perturb(name, long, seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("name", PERTURBATIONS)
@given(text=TEXTS, seed=st.integers(0, 3))
def test_protected_regions_stay(name: str, text: str, seed: int) -> None:
    changed = perturb(name, text, seed)
    assert protected(changed) == protected(text)
    assert perturb(name, text, seed) == changed


@given(text=TEXTS)
def test_what_each_may_change(text: str) -> None:
    """Whitespace: no word. Order: no word but its place. Truncation: leaves words out. Synonyms: no gap."""
    words = text.split()
    assert perturb("whitespace", text).split() == words
    assert Counter(re.sub(r"\s", "", perturb("sentence_order", text))) == Counter(re.sub(r"\s", "", text))
    left = iter(words)
    assert all(word in left for word in perturb("truncation", text).split())
    assert len(re.findall(r"\s+", perturb("synonyms", text))) == len(re.findall(r"\s+", text))


@given(text=st.text(max_size=60))
def test_no_text_breaks_them(text: str) -> None:
    for name in PERTURBATIONS:
        perturb(name, text)


def test_hostile_text_is_quick() -> None:
    started = time.monotonic()
    for text in ("<answer>" * 3000, "a(" * 3000, "a.b." * 1500, "{\n" * 3000, "a. " * 3000, "a" * 10_000, "`" * 3001):
        for name in PERTURBATIONS:
            perturb(name, text)
    assert time.monotonic() - started < 20
