"""Fused kernels: the operator in one launch forward and one backward.

`recurrence` and `manhattan` are the two differentiable calls, each over the kernels of a
backend: Mosaic GPU (Hopper), Triton (other NVIDIA GPUs, float32 and further widths) or
Mosaic TPU. `choice` says which can run and which suits best. docs/kernels.md explains them.

`add_norm_triton`, `local_conv_triton`, `local_conv_rows_triton`, `split_heads_triton`,
`gated_triton`, `row_losses_triton`, `categorical_triton`, `mixed_heads_mosaic` and
`swiglu_mosaic` are apart from them: the kernels of `lasad_jax.ops.passes`.
`decode_triton`, `decode_product` and `decode_layers` are decoding's.
"""
