"""Small trained text classifiers that ship with the package: is this toxic, does this refuse?

texts -> probabilities, by logistic regression on readable features and hashed words; numpy only, no download.

Made by `recipes/classifiers/build.py` from hand labels; what they get right, and what not, is in docs/safety.md.
"""

from alignlab.classifiers._refusal import refusal
from alignlab.classifiers._toxicity import toxicity

__all__ = ["refusal", "toxicity"]
