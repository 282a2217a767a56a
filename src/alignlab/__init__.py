"""Align language models and compare the methods honestly: recipe -> training -> evaluation -> report."""

import logging

# Wherever bitsandbytes is installed, peft imports it, and it warns of a kernel that is missing and not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
