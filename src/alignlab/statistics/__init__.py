"""Arrays in, numbers out: what a handful of runs can and cannot show; scores per run and prompt → verdicts.

`effects` compares two arms run by run (Cohen's d, Hedges' g), `inference` puts intervals and verdicts on gains over
seeds and prompts, `clustered` puts them on what is measured on several samples a prompt, `aggregates` describes scores
and learning curves, `calibration` compares stated probabilities with what happens, `agreement` says whether raters
agree beyond chance, `wins` counts won, tied and lost games. No model, no file, no configuration in here.
"""

from alignlab.statistics.agreement import (
    alpha_interval,
    cohens_kappa,
    discordant,
    kappa_interval,
    krippendorff_alpha,
    mcnemar_exact,
)
from alignlab.statistics.clustered import (
    bootstrap_interval,
    clustered_interval,
    clustered_proportion,
    clustered_standard_error,
    jackknife_interval,
    mean_interval,
    mean_of_bounds,
    paired_interval,
    paired_proportion,
    ratio_interval,
)
from alignlab.statistics.inference import Interval, prompt_interval, wilson_interval
from alignlab.statistics.wins import length_controlled, trinomial_interval, win_rate

__all__ = [
    "Interval",
    "alpha_interval",
    "bootstrap_interval",
    "clustered_interval",
    "clustered_proportion",
    "clustered_standard_error",
    "cohens_kappa",
    "discordant",
    "jackknife_interval",
    "kappa_interval",
    "krippendorff_alpha",
    "length_controlled",
    "mcnemar_exact",
    "mean_interval",
    "mean_of_bounds",
    "paired_interval",
    "paired_proportion",
    "prompt_interval",
    "ratio_interval",
    "trinomial_interval",
    "wilson_interval",
    "win_rate",
]
