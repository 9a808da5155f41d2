# Target torch_stable: headers and libraries of the libtorch stable ABI; variables TORCH_ROOT, TORCH_BUILD_VERSION and
# TORCH_CUDA_VERSION.
# find_package(Torch) is avoided on purpose: it overwrites CUDA flags (pytorch#172034) and pulls in what a
# stable-ABI library must not use. TORCH_TARGET_VERSION is the oldest torch the binary runs on (2.11).
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import os, torch
print(os.path.dirname(torch.__file__), torch.__version__, torch.version.cuda or 0, sep=';', end='')"
  OUTPUT_VARIABLE torch_facts RESULT_VARIABLE torch_missing ERROR_QUIET)
if(torch_missing)
  message(FATAL_ERROR "deepops: torch is not importable by ${Python_EXECUTABLE}; install torch>=2.11 first")
endif()
list(GET torch_facts 0 TORCH_ROOT)
list(GET torch_facts 1 TORCH_BUILD_VERSION)
list(GET torch_facts 2 TORCH_CUDA_VERSION) # 0: a torch without CUDA

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${TORCH_ROOT}/include)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000 TORCH_STABLE_ONLY)
target_link_libraries(torch_stable INTERFACE ${TORCH_ROOT}/lib/libtorch_cpu.so ${TORCH_ROOT}/lib/libc10.so)
