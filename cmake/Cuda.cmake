# Whether _cuda.so is built, and how. Sets DEEPOPS_BUILD_CUDA and, if it is, the CUDA language and DEEPOPS_CUDA_TEXT.
#   DEEPOPS_CUDA=auto  where the torch of the build has CUDA and there is an nvcc: elsewhere nobody could load it
#   DEEPOPS_CUDA=1     against a CPU-only torch too; else an error
# The binary loads on any torch that has CUDA. It brings its own CUDA runtime: the GPU's driver has to be as new as the
# compiler (CUDA 13: 580), and the GPU not older than the first of DEEPOPS_CUDA_ARCHS.
#
#   DEEPOPS_CUDA=0     never
# nvcc: CUDACXX, CUDA_HOME, the PATH, /usr/local/cuda or, from PyPI, nvidia-cuda-nvcc beside torch.
set(DEEPOPS_CUDA auto CACHE STRING "build the CUDA kernels: auto, 1 or 0")
# Code for these, and PTX of the last, which newer GPUs compile when they load it.
set(DEEPOPS_CUDA_ARCHS "80;90;100" CACHE STRING "compute capabilities of the CUDA kernels, lowest first")
# The static gate (tests/cuda_gate) reads this line. -fmad=false: the bits of the CPU kernels, which contract nothing.
set(DEEPOPS_NVCC_FLAGS -std=c++20 -O3 -fmad=false -lineinfo)

if(NOT DEEPOPS_CUDA MATCHES "^(auto|1|0)$")
  message(FATAL_ERROR "deepops: DEEPOPS_CUDA=${DEEPOPS_CUDA}: expected auto, 1 or 0")
endif()
set(DEEPOPS_BUILD_CUDA OFF)
if(DEEPOPS_CUDA STREQUAL "0" OR (DEEPOPS_CUDA STREQUAL "auto" AND NOT TORCH_CUDA_VERSION))
  return()
endif()

file(GLOB pip_toolkits ${TORCH_ROOT}/../nvidia/cu[0-9]* ${Python_SITELIB}/nvidia/cu[0-9]*)
unset(DEEPOPS_NVCC CACHE) # of another environment, perhaps
find_program(DEEPOPS_NVCC NAMES $ENV{CUDACXX} nvcc HINTS $ENV{CUDA_HOME} PATHS /usr/local/cuda ${pip_toolkits}
  PATH_SUFFIXES bin)
if(NOT DEEPOPS_NVCC)
  if(DEEPOPS_CUDA STREQUAL "1")
    message(FATAL_ERROR "deepops: DEEPOPS_CUDA=1, but no nvcc: set CUDA_HOME or extend the PATH")
  endif()
  message(STATUS "deepops: torch has CUDA, but there is no nvcc: _cuda.so is not built")
  return()
endif()

set(DEEPOPS_BUILD_CUDA ON)
list(JOIN DEEPOPS_CUDA_ARCHS " " DEEPOPS_CUDA_TEXT)
list(TRANSFORM DEEPOPS_CUDA_ARCHS APPEND -real OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
list(GET DEEPOPS_CUDA_ARCHS -1 newest)
list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest}-virtual)
set(CMAKE_CUDA_COMPILER ${DEEPOPS_NVCC})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static) # no libcudart of its own version at run time
get_filename_component(toolkit ${DEEPOPS_NVCC}/../.. ABSOLUTE)
if(EXISTS ${toolkit}/lib/libcudart_static.a AND NOT EXISTS ${toolkit}/lib64)
  set(CMAKE_CUDA_FLAGS "$ENV{CUDAFLAGS} -L${toolkit}/lib") # PyPI's packages: their nvcc looks in lib64, which is lib
endif()
enable_language(CUDA)
if(TORCH_CUDA_VERSION AND NOT CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 1)
  string(REGEX MATCH "^[0-9]+" torch_major "${TORCH_CUDA_VERSION}")
  string(REGEX MATCH "^[0-9]+" nvcc_major "${CMAKE_CUDA_COMPILER_VERSION}")
  if(nvcc_major GREATER torch_major)
    message(WARNING "deepops: torch is built for CUDA ${TORCH_CUDA_VERSION}, nvcc is ${CMAKE_CUDA_COMPILER_VERSION}: "
      "a driver that is new enough for torch may be too old for deepops' kernels; CUDA_HOME chooses another nvcc")
  endif()
endif()

# torch_cuda: the real library or, where torch has none, an empty one. The linker wants its soname and that of one
# symbol; what is loaded at run time is torch's.
add_library(torch_cuda_here INTERFACE)
target_compile_definitions(torch_cuda_here INTERFACE USE_CUDA)
if(TORCH_CUDA_VERSION)
  target_link_libraries(torch_cuda_here INTERFACE ${TORCH_ROOT}/lib/libtorch_cuda.so)
else()
  add_library(torch_cuda_stub SHARED cmake/torch_cuda_stub.cpp)
  set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda CXX_VISIBILITY_PRESET default
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stub)
  target_link_libraries(torch_cuda_here INTERFACE torch_cuda_stub)
endif()
