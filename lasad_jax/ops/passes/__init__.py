"""What a network does around the operator and its matrix products, in single passes over memory.

    add_norm        residual sum, dropout and norm between two branches
    local_conv      a causal depthwise convolution on the grid
    split_heads     queries, keys and values out of a joint projection
    gated_products  a gate, then the product that reads what was gated
    row_losses      cross-entropy of rows of logits, and its gradient
    categorical     a code for every row of logits
    dropout         masks that cost a few integer operations

But for the last, each has a plain form in XLA's own operations and Triton kernels in
`lasad_jax.ops.kernels`, one launch each way; `choice.prefers_triton` decides. XLA splits no
kernel over a mesh: each takes the axes over which images, heads or channels are split, and runs
under `shard_map`.
"""
