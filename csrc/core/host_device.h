// DEEPOPS_HD: a function for host and device. DEEPOPS_LIBM(name): a function of the C library, on either. DEEPOPS_ISA:
// the namespace of what is compiled more than once (cmake/CpuIsa.cmake; isa_gpu in gpu.cuh).
#pragma once

#ifdef __CUDACC__
#define DEEPOPS_HD __host__ __device__ inline
#define DEEPOPS_LIBM(name) ::name
#else
#define DEEPOPS_HD inline
#define DEEPOPS_LIBM(name) __builtin_##name  // no std header: see core/dtype.h
#endif

#ifndef DEEPOPS_ISA
#define DEEPOPS_ISA isa_generic
#endif
