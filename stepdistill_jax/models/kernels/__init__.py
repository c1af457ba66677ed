"""Attention in kernels of a chip, one module for each kind of chip.

Each has `reason_against`, and `attention` on the arrays of one device:

    q                                 [rows, q, heads, d]
    k, v                              [rows, k, heads, d]
    bias                              [heads, q, k] float32, added to the scores of each row; or None
    query_segments, key_segments      [rows, q] and [rows, k] int32; key segment 0 is never seen
    seeds                             [2, rows, heads] uint32 of `dropout_seeds`; None is no dropout
    causal                            a query does not see keys of later places
    kept                              how many of the `DRAWS` values of a draw keep a weight
    interpret                         runs the programs on a CPU, for tests

It gives the mean of the values that each query sees, weighted by the softmax of its scores: [rows, q,
heads, d] in the dtype of v. Masks of dropout are those of `dropout.dropout`, bit for bit. A query that
sees no key gets 0 and gives no gradient.
"""
