"""The page holds what results.json says: in order, escaped, without a network; the terminal has the same numbers."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import jinja2
import pytest
from rich.console import Console

from alignlab.statistics.inference import NO_SPREAD, permutation_floor
from alignlab.study import report
from alignlab.study.reading import Arm
from alignlab.study.report import headline, render_report, terminal_table, verdict_lines, write_report

from .fake_results import CASES, HOSTILE, SEEDS, TASKS, bare, broken, failed, fake_results, with_text

Results = dict[str, Any]
SECTIONS = [
    "How much each method gains",
    "All arms",
    "Task by task",
    "Between the methods",
    "How they got there",
    "What they say",
    "Shared stages and the ledger",
    "What this does and does not say",
]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page with their texts, in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[str] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open, "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.contents.append("")
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.contents[index] += data

    def texts(self, tag: str, **attributes: str) -> list[str]:
        """The texts of all elements of a tag that have these attributes, with plain spaces."""
        return [
            re.sub(r"\s+", " ", content).strip()
            for (name, found), content in zip(self.elements, self.contents, strict=True)
            if name == tag and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())
        ]

    def table(self, number: int) -> list[list[str]]:
        """The cells of a table's body."""
        rows: list[list[str]] = []
        tables = -1
        for (tag, _), content in zip(self.elements, self.contents, strict=True):
            tables += tag == "table"
            if tables == number and tag == "tr":
                rows.append([])
            if tables == number and tag in ("th", "td"):
                rows[-1].append(re.sub(r"\s+", " ", content).strip())
        return rows[1:]

    @property
    def skeleton(self) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes in self.elements]


@pytest.fixture(scope="module")
def results() -> Results:
    return fake_results()


@pytest.fixture(scope="module")
def page(results: Results) -> Page:
    return Page(render_report(results))


def arm(results: Results, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(arm for arm in results["arms"] if arm["name"] == name)
    return found


# ---- what it shows ---------------------------------------------------------------------------------------------------


def test_sections_come_in_order_after_the_verdicts(results: Results, page: Page) -> None:
    assert page.texts("h1") == [headline(results)]
    assert page.texts("h2") == SECTIONS
    tags = [tag for tag, _ in page.elements]
    assert tags.index("h1") < tags.index("dl") < tags.index("h2")
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for v in verdict_lines(results) for line in (v.text, v.detail)]
    shown = " ".join(page.texts("dd"))
    assert all(line in shown for line in lines)
    assert page.texts("dt")[: len(lines) // 2] == [line.label for line in verdict_lines(results)]


def test_the_table_of_arms_is_the_mean_and_sd_over_seeds_of_the_runs(results: Results, page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.table(0)}
    assert list(rows) == ["untrained starter", "SFT", "DPO", "PPO", "GRPO"]
    for name, label in (("dpo", "DPO"), ("ppo", "PPO"), ("grpo", "GRPO")):
        scores = [100 * fmean(run["scores"]["score"].values()) for run in arm(results, name)["runs"]]
        assert rows[label][0] == f"{fmean(scores):.1f} ±{stdev(scores):.1f}"
        (row,) = (c for c in results["comparisons"] if (c["arm"], c["against"], c["task"]) == (name, "sft", None))
        expected = f"{100 * row['mean']:+.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        assert rows[label][1] == expected.replace("-", "−")
    assert rows["SFT"][1:3] == ["—", "—"] and "±" not in rows["SFT"][0]
    assert rows["DPO"][2] == "mixed" and rows["PPO"][2] == "better"
    assert rows["PPO"][5:] == ["10 240", "398 212", "796 424", "96", "1.41"]
    assert rows["SFT"][5:] == ["0", "0", "262 144", "61", "0.61"]  # from the shared stage


def test_an_interval_of_width_zero_is_no_spread_and_the_facts_say_so(results: Results, page: Page) -> None:
    assert "no spread" not in " ".join(page.texts("dd"))
    found = Page(render_report(broken()))
    rows = {row[0]: row[1:] for row in found.table(0)}
    assert rows["GRPO"][1].endswith(" [no spread]")
    assert any(f"[no spread]: {NO_SPREAD}" in text for text in found.texts("dd"))


def test_the_table_of_tasks_marks_what_was_trained_on(results: Results, page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.table(1)}
    runs = [100 * run["metrics"]["reasoning/score"] for run in arm(results, "ppo")["runs"]]
    assert rows["PPO"][0].startswith(f"† {fmean(runs):.1f} ±{stdev(runs):.1f}+")
    assert [cell.startswith("†") for cell in rows["GRPO"]] == [True, False, False, True]
    assert [cell.startswith("†") for cell in rows["DPO"]] == [False] * 4
    assert rows["DPO"][0].endswith("worse") and rows["DPO"][1].endswith("better")


def test_other_metrics_are_shown_for_every_arm(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.table(2)}
    assert rows["reasoning · format rate"] == ["41.0 %", "88.0 %", "97.0 %", "97.0 %", "97.0 %"]
    assert "completion · length" not in rows and "reasoning · score" not in rows  # they stand elsewhere


def test_pairs_are_the_leaders_against_the_others_with_their_effect_sizes(results: Results, page: Page) -> None:
    rows = page.table(3)
    assert [row[0] for row in rows] == ["GRPO − PPO", "GRPO − DPO", "PPO − DPO"]
    (row,) = (c for c in results["comparisons"] if (c["arm"], c["against"], c["task"]) == ("ppo", "grpo", None))
    effect = row["effect"]  # of PPO against GRPO: the page turns it round
    assert rows[0][4] == f"{-effect['d']:.2f} [{-effect['high']:.2f}, {-effect['low']:.2f}]".replace("-", "−")
    assert rows[0][5] == f"{-effect['g']:.2f}"
    assert rows[0][3] == f"{sum(v < 0 for v in row['per_seed'].values())} of 3"


def test_the_ledger_lists_shared_stages_every_run_and_their_sum(page: Page) -> None:
    rows = page.table(4)
    assert [row[0] for row in rows[:2]] == [
        "SFT, sharedhash 9f2c41d07ab3",
        "reward model, sharedhash 03be77c1da20, accuracy 0.83 [0.79, 0.87]",
    ]
    assert [row[0] for row in rows[2:-1]] == [f"{a}, seed {s}" for a in ("DPO", "PPO", "GRPO") for s in SEEDS]
    total = 6400 + 3200 + 3 * (4800 + 1280 + 1280)
    assert rows[-1][:2] == ["all together", f"{total // 1000} {total % 1000}"]
    assert rows[-1][-1] == "1.41"  # memory is not added up


def test_every_curve_is_drawn_and_a_missing_one_named(page: Page) -> None:
    titles = [str(attributes["aria-label"]) for tag, attributes in page.elements if tag == "svg"]
    assert len(titles) == 6  # the gains twice (desk and phone), four curves
    assert [title.split(":")[0] for title in titles[2:]] == [
        "Held-out score, points",
        "Training reward",
        "KL to the starting policy, nats per completion",
        "Completion length, tokens",
    ]
    assert "Training reward: not recorded by DPO." in page.texts("p")
    assert any("DPO 150 steps of 32 pairs, PPO 40 phases" in lead for lead in page.texts("p"))


def test_curves_are_means_over_seeds_with_standard_errors() -> None:
    runs = [{"curves": {"score": [[0, 0.5], [10, value], [20, None]]}} for value in (0.5, 0.6, 0.7)]
    found = report._curve(_arm(runs), "score", 100.0)
    assert found is not None and found.x == (0.0, 10.0)  # a point that a run lacks is left out
    assert found.mean == pytest.approx((50.0, 60.0))
    assert found.error == pytest.approx((0.0, 10.0 / 3**0.5))  # sd of 50, 60, 70 is 10


def _arm(runs: list[dict[str, Any]]) -> Arm:
    return Arm(name="a", label="A", is_baseline=False, tone="k1", planned=3, finished=tuple(runs), failed=())


def test_samples_stand_side_by_side_and_are_readable_without_a_script(results: Results, page: Page) -> None:
    sections = [attributes for tag, attributes in page.elements if tag == "section"]
    assert len(sections) == len(results["samples"])
    assert not any("hidden" in attributes or "style" in attributes for attributes in sections)
    assert page.texts("section")[0].count("Mia has 17 coins") == 1
    for label in ("untrained starter", "SFT", "DPO", "PPO", "GRPO"):
        assert label in page.texts("section")[0]
    (bar,) = (attributes for tag, attributes in page.elements if attributes.get("class") == "bar")
    assert "hidden" in bar  # the script shows it
    assert page.texts("button")[:6] == ["all tasks", *TASKS, "arms disagree"]


def test_samples_are_graded_in_words() -> None:
    assert report._grade([1.0], True) == "right"
    assert report._grade([0.0, 1.0, 1.0], True) == "wrong · 2 of 3 right"
    assert report._grade([0.37, 1.0], False) == "score 37.0 · mean 68.5"
    assert report._grade([], True) == ""


@pytest.mark.parametrize(("ppo", "expected"), [([0.0, 0.0], "no"), ([1.0, 0.0], "yes"), ([1.0, 1.0], "yes")])
def test_arms_disagree_where_methods_are_50_points_apart(results: Results, ppo: list[float], expected: str) -> None:
    scores = {"start": [1.0], "sft": [0.0], "dpo": [0.0, 0.0], "ppo": ppo}  # baselines do not count
    completions = {name: [{"text": "", "score": score} for score in row] for name, row in scores.items()}
    sample = {"prompt_id": "1", "task": "reasoning", "prompt": "?", "answer": None, "completions": completions}
    page = Page(render_report({**results, "samples": [sample]}))
    (section,) = (attributes for tag, attributes in page.elements if tag == "section")
    assert section["data-disagree"] == expected


def test_it_says_what_it_is_conditional_on_and_how_far_tests_could_go(page: Page) -> None:
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert "this one SFT checkpoint and this one reward model" in facts["Estimand"]
    assert "35 comparisons, not corrected for their number" in facts["Intervals"]  # (1 + 3 + 3) x (overall + 4 tasks)
    assert facts["Trained on the metric"] == (
        "The training reward of PPO and GRPO contains the graders of reasoning and code (marked †). "
        "On safety and clinical no arm was trained on the metric."
    )
    assert (permutation_floor(3, paired=False), permutation_floor(3, paired=True)) == (0.1, 0.25)
    assert "cannot fall below 0.10 (unpaired) or 0.25 (paired by seed)" in facts["Permutation tests"]
    assert facts["Tuning"] == "8 trials a method, on validation prompts only."
    assert facts["Failed runs"] == "None."
    assert "torch 2.13.0" in facts["Environment"] and "seeds 42, 123, 777" in facts["Environment"]


# ---- what went wrong -------------------------------------------------------------------------------------------------


def test_failed_runs_are_shown_everywhere() -> None:
    page = Page(render_report(failed()))
    arms = {row[0]: row for row in page.table(0)}
    assert arms["PPO0 of 3 runs"][1] == "failed" and "GRPO2 of 3 runs" in arms
    assert ["failed"] * 4 in [row[1:] for row in page.table(1)]
    ledger = [row[0] for row in page.table(4)]
    assert "PPO, seed 42failed: the ratio at the first step was 1.3, not 1" in ledger
    assert "GRPO, seed 777failed: killed for memory at phase 12" in ledger
    assert page.texts("text").count("no finished run") == 2 * 5  # overall and four tasks, in both sizes
    assert sum(article == "PPO no finished run" for article in page.texts("article")) == 12
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert "PPO: none of 3 runs finished" in facts["Failed runs"]
    assert "GRPO: only 2 of 3 runs finished" in facts["Failed runs"]


def test_one_seed_has_no_spread_and_no_effect_size() -> None:
    page = Page(render_report(bare()))
    assert not any("±" in cell for row in page.table(0) for cell in row)
    assert [row[4:] for row in page.table(3)] == [["—", "—"]] * 3
    assert all("at least 2 runs in each arm are needed" in row[0] for row in page.table(3))


def test_missing_curves_and_samples_are_said_in_a_sentence() -> None:
    page = Page(render_report(bare()))
    assert "Held-out score: not recorded by any run." in page.texts("p")
    assert "The study kept no sample completions." in page.texts("p")
    assert sum(tag == "svg" for tag, _ in page.elements) == 2


@pytest.mark.parametrize("case", ["failed", "bare", "broken", "hostile"])
def test_no_raw_none_or_nan_reaches_the_page(case: str) -> None:
    html = render_report(CASES[case]())
    shown = " ".join(
        content for (tag, _), content in zip(Page(html).elements, Page(html).contents, strict=True) if tag == "main"
    )
    assert not re.search(r"\b(None|nan|NaN|inf)\b", shown)
    assert not re.search(r'="(nan|inf|None)', html)


# ---- safety ----------------------------------------------------------------------------------------------------------


def test_hostile_text_changes_no_element_of_the_page() -> None:
    harmless = Page(render_report(with_text(fake_results(), "harmless")))
    hostile = Page(render_report(with_text(fake_results(), HOSTILE)))
    assert hostile.skeleton == harmless.skeleton
    shown = hostile.contents[0]
    assert "<script>alert(1)</script><img src=x onerror=alert(1)>" in shown  # as text
    assert "{{ 7 * 7 }}" in shown and "]]>" in shown and "javascript:alert(1)" in shown


def test_the_comparison_of_elements_would_notice_unescaped_text(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = jinja2.Environment
    monkeypatch.setattr(jinja2, "Environment", lambda **options: environment(**options | {"autoescape": False}))
    harmless, hostile = (render_report(with_text(results, text)) for text in ("harmless", HOSTILE))
    with pytest.raises(AssertionError):
        assert Page(hostile).skeleton == Page(harmless).skeleton


def test_one_script_runs_and_the_policy_names_it() -> None:
    html = render_report(with_text(fake_results(), HOSTILE))
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for t, a in Page(html).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]


def test_the_page_asks_for_nothing_from_outside(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "a")
        assert not {"src", "href", "srcset", "action", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    html = render_report(fake_results())
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html


def test_hidden_control_characters_cannot_turn_numbers_round_or_reach_the_terminal() -> None:
    results = with_text(fake_results(), HOSTILE)
    html = render_report(results)
    for text in (html, "\n".join(printed(results, 2000)), headline(results)):
        assert not re.search("[\x00\x1b\u202e\ud800]", text)
        assert "⟨U+202E⟩" in text


def test_write_report_writes_utf_8_into_a_new_folder(tmp_path: Path, results: Results) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(with_text(results, HOSTILE), path)
    assert path.read_bytes().decode("utf-8") == render_report(with_text(results, HOSTILE))


def test_the_same_results_give_the_same_bytes(results: Results) -> None:
    assert render_report(results) == render_report(fake_results())


# ---- the terminal ----------------------------------------------------------------------------------------------------


def printed(results: Results, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table(results))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_terminal_table_fits_80_characters_with_every_number() -> None:
    lines = printed(failed(), 80)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    assert all(
        label in text for label in ("untrained starter", "SFT", "DPO", "GRPO", "0 of 3 runs", "2 of 3 runs", "failed")
    )


def test_the_terminal_table_has_the_numbers_of_the_page(results: Results, page: Page) -> None:
    lines = [re.sub(r"[^\S ]", " ", line) for line in printed(results, 120)]
    (row,) = (row for row in page.table(0) if row[0] == "GRPO")
    label, score, gain, verdict, length, kl, completions, generated, _trained, seconds, peak = row
    first = [label, score.split()[0], gain.split()[0], verdict, length, kl, completions, generated, seconds, peak]
    assert lines[-2].split() == " ".join(first).split()
    assert lines[-1].split(maxsplit=1) == [score.split()[1], gain.split(maxsplit=1)[1]]
