"""The static checks of the CUDA kernels: what the compiler made of them, and what their sources may use."""
