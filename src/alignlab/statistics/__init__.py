"""Arrays in, numbers out: what a handful of runs can and cannot show; scores per run and prompt → verdicts.

`effects` compares two arms run by run (Cohen's d, Hedges' g), `inference` puts intervals and verdicts on gains over
seeds and prompts, `aggregates` describes scores and learning curves, `calibration` compares stated probabilities with
what happens. No model, no file, no configuration in here.
"""
