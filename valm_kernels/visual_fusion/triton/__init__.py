"""visual_fusion_attn in Triton: forward.py and backward.py launch the kernels, which share primitives.py."""
