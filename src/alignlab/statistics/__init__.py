"""Arrays in, numbers out: what a handful of runs can and cannot show; scores per run and prompt → verdicts.

`effects` compares two arms run by run (Cohen's d, Hedges' g), `inference` puts intervals and verdicts on gains over
seeds and prompts, `aggregates` describes scores and learning curves, `calibration` compares stated probabilities with
what happens, `agreement` says whether raters agree beyond chance, `wins` counts won, tied and lost games. No model, no
file, no configuration in here.
"""

from alignlab.statistics.agreement import (
    alpha_interval,
    cohens_kappa,
    discordant,
    kappa_interval,
    krippendorff_alpha,
    mcnemar_exact,
)
from alignlab.statistics.inference import wilson_interval
from alignlab.statistics.wins import length_controlled, trinomial_interval, win_rate

__all__ = [
    "alpha_interval",
    "cohens_kappa",
    "discordant",
    "kappa_interval",
    "krippendorff_alpha",
    "length_controlled",
    "mcnemar_exact",
    "trinomial_interval",
    "wilson_interval",
    "win_rate",
]
