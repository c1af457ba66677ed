"""Attention kernels, one module for each kind of chip.

Each module has two functions. `reason_against` returns why shapes have no kernel. `attention` takes the
arrays of one device:

    q                                 [rows, q, heads, d]
    k, v                              [rows, k, heads, d]
    bias                              [heads, q, k] float32, added to the scores of each row; or None
    query_segments, key_segments      [rows, q] and [rows, k] int32; key segment 0 is never seen
    seeds                             [2, rows, heads] uint32 from `dropout_seeds`; None: no dropout
    causal                            a query does not see keys at later places
    kept                              how many of the `DRAWS` values of a draw keep a weight
    interpret                         runs the programs on a CPU, for tests

For each query it returns the mean of the values that the query sees, weighted by the softmax of the
scores: [rows, q, heads, d] in the dtype of v. Its dropout masks equal the masks of `dropout.dropout`, bit
for bit. A query that sees no key gets 0 and gives no gradient.
"""
