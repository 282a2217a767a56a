"""alignlab beside the peer (trl): the same model, data, lengths, batch, precision and adapters, in one interleaved run.

    make bench                                   # every case of the table
    python -m benchmarks grpo-tiny sft-g270      # some of them
    python -m benchmarks --rounds 9 --threads 1

cases -> two worker processes each -> seconds of every step, in turn -> medians and ratios -> results.json, the table in
docs/performance.md.
"""
