"""The maths of alignment as pure functions: tensors -> tensors; no model, no configuration, no logging.

`logprobs`    hidden states -> log-probabilities and entropies of tokens, without the logits
`masked`      means, whitening and aggregation over the tokens that count
`advantages`  rewards -> advantages: group-relative, leave-one-out, GAE
`kl`          estimators of the divergence from a reference
`surrogate`   the clipped policy and value losses
`preference`  losses on pairs: DPO and its relatives, Bradley-Terry
"""
