"""The oracle to ask before a big job: does this run, laid over ranks, compute what one process
computes?

The same weights and the same global batch go through every way of spreading the run that is asked
for (a cell: expert parallelism, ZeRO stage, accumulation, recomputation, number format, missing
pairs) and through one process of plain torch. Losses, terms, gradient norm, every gradient, weights
after one and three steps, biases and choices are compared.

    cells     which cells there are, and why one cannot run
    small     a run scaled down to a laptop
    batches   the synthetic global batch
    tracing   three steps of an engine as named tensors
    compare   two such traces: how far apart, and whether that is too far
    worker    what every rank does
    launch    ranks on this machine, and what is done when they hang
    report    the table for people and the JSON for programs
"""
