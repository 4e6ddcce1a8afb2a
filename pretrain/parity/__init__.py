"""Parity check: does every parallel layout of a run compute what a single process computes?

The same initial weights and the same global batch are trained for three steps in each case of a
test matrix (expert parallelism, ZeRO stage, gradient accumulation, activation checkpointing,
precision, missing pairs) and in one process of plain torch. Losses, loss terms, the gradient norm,
all gradients, weights after the first and third step, router biases and expert assignments are
compared.

    cases             one case of the matrix: its axes and their values
    selection         parses `--cases`
    case_runs         the run configuration of a case, and why a case is unsupported
    scale_down        scales a run down so that a laptop can train it (`--small`)
    batches           the synthetic global batch
    tracing           three steps of an engine as named tensors
    replay            expert selections of the reference, used in the compared runs
    compare           differences between traces
    tolerances        which differences exceed their tolerance
    job               what the launcher and the ranks exchange, as JSON
    worker            the program of each rank
    deadline          time limit and failure message of a rank
    launch            starts ranks on this machine
    report            table and JSON
    command           `vlmoe parity`
"""
