"""alignlab beside the peer (trl): the same model, data, lengths, batch, precision and adapters, in one interleaved run.

    make bench                                   # everything that stands in docs/performance.md
    python -m benchmarks grpo-tiny sft-g270      # some cases
    python -m benchmarks scaling                 # cost against length, group, vocabulary, batch and model size
    python -m benchmarks --device cuda --write   # on a GPU, results and page

cases -> two worker processes each -> seconds of every step, in turn -> medians and ratios -> results-*.json ->
the tables in docs/performance.md.
"""
