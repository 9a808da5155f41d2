# deepops_add_op(<op> [FOLDER <folder>]): adds csrc/<folder>/<op>.cpp (checks, allocation, registration) and
# csrc/<folder>/<op>_kernel_cpu.cpp (raw pointers, one object per instruction set) to _ops.so, and
# csrc/<folder>/<op>_cuda.cu to _cuda.so where that is built.
# <folder> is <op> unless given. A missing file of the set is an error here, not a surprise at run time.
function(deepops_add_op op)
  cmake_parse_arguments(arg "" "FOLDER" "" ${ARGN})
  if(NOT arg_FOLDER)
    set(arg_FOLDER ${op})
  endif()
  set(stem csrc/${arg_FOLDER}/${op})
  foreach(file ${stem}.h ${stem}.cpp ${stem}_kernel_cpu.cpp ${stem}_cuda.cu)
    if(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${file})
      message(FATAL_ERROR "deepops_add_op(${op}): ${file} is missing; see CONTRIBUTING.md, 'Add an op'")
    endif()
  endforeach()
  target_sources(deepops_ops PRIVATE ${stem}.cpp)
  deepops_add_cpu_kernels(${stem}_kernel_cpu.cpp)
  if(DEEPOPS_BUILD_CUDA)
    target_sources(deepops_cuda PRIVATE ${stem}_cuda.cu)
  endif()
endfunction()
