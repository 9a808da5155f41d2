// Blocks per multiprocessor by NVIDIA's own rules (cuda_occupancy.h), which need no GPU.
// Reads lines "<compute capability> <threads a block> <registers a thread> <bytes of shared memory a block>" and writes
// for each the number of blocks, or -1 where the architecture is unknown.
#include <cuda_runtime_api.h>

// after cuda_runtime_api.h
#include <cuda_occupancy.h>

#include <cstddef>
#include <iostream>

namespace {

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". 64 Ki registers on all of them.
struct Multiprocessor {
  int arch, threads;
  size_t shared_kib;
};
const Multiprocessor kKnown[] = {{75, 1024, 64},   {80, 2048, 164},  {86, 1536, 100},  {89, 1536, 100}, {90, 2048, 228},
                                 {100, 2048, 228}, {103, 2048, 228}, {120, 1536, 100}, {121, 1536, 100}};

int blocks(const Multiprocessor& sm, int threads, int registers, size_t shared_bytes) {
  cudaOccDeviceProp device;
  device.computeMajor = sm.arch / 10;
  device.computeMinor = sm.arch % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = sm.threads;
  device.regsPerBlock = device.regsPerMultiprocessor = 64 * 1024;
  device.warpSize = 32;
  device.reservedSharedMemPerBlock = sm.arch >= 80 ? 1024 : 0;
  device.sharedMemPerMultiprocessor = sm.shared_kib * 1024;
  device.sharedMemPerBlock = 48 * 1024;
  device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - device.reservedSharedMemPerBlock;
  device.numSms = 1;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = threads;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = shared_bytes;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = 0;
  kernel.numBlockBarriers = 1;
  const cudaOccDeviceState state;
  cudaOccResult result;
  const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : 0;
}

}  // namespace

int main() {
  int arch, threads, registers;
  size_t shared_bytes;
  while (std::cin >> arch >> threads >> registers >> shared_bytes) {
    int count = -1;
    for (const Multiprocessor& sm : kKnown) {
      if (sm.arch == arch) count = blocks(sm, threads, registers, shared_bytes);
    }
    std::cout << count << '\n';
  }
}
