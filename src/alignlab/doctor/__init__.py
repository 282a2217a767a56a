"""The reward doctor: a trained reward model → whether it is fit for RL, and what to know about it.

`runs` finds the model and its held-out pairs, `examination` scores them in several ways and decides, `measures` are the
numbers, `perturbations` the small changes to texts, `report` and `plots` what is shown.
"""

from alignlab.doctor.examination import Examination, Judge, examine
from alignlab.doctor.report import terminal_tables, write
from alignlab.doctor.runs import Examined, examine_run

__all__ = ["Examination", "Examined", "Judge", "examine", "examine_run", "terminal_tables", "write"]
