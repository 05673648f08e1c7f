"""What a network does around the operator and its matrix products, in single passes over memory.

    add_norm        residual sum, dropout and norm between two branches
    local_conv      the causal 5x5 depthwise convolution on the grid
    split_heads     queries, keys and values out of a joint projection
    gated_products  a gate, then the product that reads what was gated
    feed_forward    SwiGLU with the products around it
    mixed_heads     splitting, the operator, norm and gate, and the product
    row_losses      cross-entropy of rows of logits, and its gradient
    categorical     a code for every row of logits
    dropout         masks that cost a few integer operations

Each but `dropout` has kernels in `lasad_jax.ops.kernels`, one launch each way (Triton's; those of
`feed_forward` and `mixed_heads` are Mosaic GPU's, for Hopper), and a plain form in XLA's own
operations (of those two, their parts); `choice` decides. XLA splits no kernel over a mesh: each
takes the axes over which images, heads or channels are split, and runs under `shard_map`.
"""
