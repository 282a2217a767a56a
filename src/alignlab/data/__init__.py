"""From files and hub sets to what models read.

`source`, `files`: rows -> `formats`, `examples`: Example | Pair | Labelled | Prompt -> ids (`conversation`) ->
`batches`: Batch.

Data order is a pure function of (seed, phase), so a resumed run sees what an uninterrupted one sees. The split of one
file into train and validation is a function of each prompt's text alone, so no prompt is ever on both sides.
"""

from alignlab.data.batches import collate, fit, left_pad, order, plan_microbatches, take
from alignlab.data.examples import Loaded, Report, Side, fingerprint, load_examples
from alignlab.data.files import read_rows
from alignlab.data.formats import Kind, placeholders
from alignlab.data.source import DataSource

__all__ = [
    "DataSource",
    "Kind",
    "Loaded",
    "Report",
    "Side",
    "collate",
    "fingerprint",
    "fit",
    "left_pad",
    "load_examples",
    "order",
    "placeholders",
    "plan_microbatches",
    "read_rows",
    "take",
]
