"""Row kernels in C for CPU tensors, compiled where the installation finds a compiler; nothing else needs them."""
