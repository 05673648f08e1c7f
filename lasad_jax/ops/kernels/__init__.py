"""Fused kernels: the operator in one launch forward and one backward.

`recurrence` and `manhattan` are the two differentiable calls, each over the kernels of a
backend: Mosaic GPU (Hopper), Triton (other NVIDIA GPUs, float32 and further widths) or
Mosaic TPU. `choice` says which can run and which suits best. docs/kernels.md explains them.

`local_conv_triton` and `split_heads_triton` are apart from them: the convolution of
`lasad_jax.ops.local_conv`, and the split of a joint projection of `lasad_jax.ops.split_heads`.
"""
