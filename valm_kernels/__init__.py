"""Kernels of a visually-augmented language model: fused image attention and exact top-K inner product."""
