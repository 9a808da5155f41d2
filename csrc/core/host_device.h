// DEEPOPS_HD: a function for host and device. DEEPOPS_LIBM(name): a function of the C library, on either.
#pragma once

#ifdef __CUDACC__
#define DEEPOPS_HD __host__ __device__ inline
#define DEEPOPS_LIBM(name) ::name
#else
#define DEEPOPS_HD inline
#define DEEPOPS_LIBM(name) __builtin_##name  // no std header: see core/dtype.h
#endif
