"""visual_fusion_attn in Triton: forward.py and backward.py launch the kernels; primitives.py has their common parts."""
