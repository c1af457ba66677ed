"""Attention kernels, one module for each kind of chip.

Each module has two functions. `reason_against` returns why the kernel does not support given shapes, or None.
`attention` computes attention on one device, from these arguments:

    q                                 [rows, q, heads, d]
    k, v                              [rows, k, heads, d]
    bias                              [heads, q, k] float32, added to the scores; None adds nothing
    query_segments, key_segments      [rows, q] and [rows, k] int32; as for `attention.attention`
    seeds                             [2, rows, heads] uint32 from `dropout_seeds`; None turns dropout off
    causal                            whether a query sees only its own and earlier positions
    kept                              limit for random draws, from `dropout.kept_draws`
    interpret                         whether to run the kernel on a CPU with Pallas's interpreter, for tests

The result, [rows, q, heads, d] in the dtype of v, is that of `attention.attention`. A query
that sees no key gets 0 and contributes to no gradient. The dropout masks equal those of `dropout.dropout`.

In the backward passes, `slope` is the gradient of the loss with respect to the result of `attention`.
"""
