"""`python -m valm_kernels` prints what was built and which code each operation runs on this machine."""

from .build_info import show_paths

show_paths()
