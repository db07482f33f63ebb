"""The backend "compiled": kernels in C for CPU tensors. Optional: compiled if the installation finds a compiler."""
