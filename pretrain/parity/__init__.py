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
    compare           differences between two traces
    tolerances        which differences exceed their tolerance
    job               the input and output of the ranks, as JSON
    deadline          time limit and error report of one rank
    worker            the program of each rank
    launch            starts ranks on this machine
    report            table and JSON report
    collector         collects results while cases run
    command           `vlmoe check-parallel`
"""
