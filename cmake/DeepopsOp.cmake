# deepops_add_op(<op> [FOLDER <folder>] [CPU_ONLY|GPU_ONLY]): adds csrc/<folder>/<op>.cpp (checks, allocation, registration) and
# csrc/<folder>/<op>_kernel_cpu.cpp (raw pointers, one object per instruction set) to _ops.so, and
# csrc/<folder>/<op>_cuda.cu to _cuda.so where that is built.
# <folder> is <op> unless given. CPU_ONLY: there is no GPU kernel, GPU_ONLY: no CPU kernel; tests/cpu_only.py and
# tests/gpu_only.py say why.
# A missing file of the set is an error here, not a surprise at run time.
function(deepops_add_op op)
  cmake_parse_arguments(arg "CPU_ONLY;GPU_ONLY" "FOLDER" "" ${ARGN})
  if(NOT arg_FOLDER)
    set(arg_FOLDER ${op})
  endif()
  set(stem csrc/${arg_FOLDER}/${op})
  set(files ${stem}.h)
  if(NOT arg_GPU_ONLY)
    list(APPEND files ${stem}.cpp ${stem}_kernel_cpu.cpp)
  endif()
  if(NOT arg_CPU_ONLY)
    list(APPEND files ${stem}_cuda.cu)
  endif()
  foreach(file IN LISTS files)
    if(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${file})
      message(FATAL_ERROR "deepops_add_op(${op}): ${file} is missing; see CONTRIBUTING.md, 'Add an op'")
    endif()
  endforeach()
  if(NOT arg_GPU_ONLY)
    target_sources(deepops_ops PRIVATE ${stem}.cpp)
    deepops_add_cpu_kernels(${stem}_kernel_cpu.cpp)
  endif()
  if(DEEPOPS_BUILD_CUDA AND NOT arg_CPU_ONLY)
    target_sources(deepops_cuda PRIVATE ${stem}_cuda.cu)
  endif()
endfunction()
