# deepops_add_cpu_kernels(<source>): compiles one raw-pointer kernel file once per instruction set, each time with
# DEEPOPS_ISA naming its namespace (isa_baseline, isa_avx2, isa_avx512). core/cpu_isa.h chooses one at run time.
#
# Flags, each for a measured reason:
#   -ffp-contract=off   the same bits on every instruction set: no fused multiply-add that only some of them have
#   -fno-math-errno     without it a loop with a square root does not vectorise
#   -Wno-uninitialized: false alarms inside GCC 12's own AVX-512 header (GCC bug 105593)
#   -fno-trapping-math  lets comparisons in a loop become selects
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(DEEPOPS_CPU_ISAS baseline avx2 avx512)
else()
  set(DEEPOPS_CPU_ISAS baseline)
endif()
list(JOIN DEEPOPS_CPU_ISAS " " DEEPOPS_CPU_ISAS_TEXT)
set(isa_flags_baseline)
set(isa_flags_avx2 -mavx2 -mfma -mf16c)
set(isa_flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512)

function(deepops_add_cpu_kernels source)
  get_filename_component(stem ${source} NAME_WE)
  foreach(isa IN LISTS DEEPOPS_CPU_ISAS)
    set(object ${stem}_${isa})
    add_library(${object} OBJECT ${source})
    target_include_directories(${object} PRIVATE csrc)
    target_compile_definitions(${object} PRIVATE DEEPOPS_ISA=isa_${isa})
    target_compile_options(${object} PRIVATE -O3 -Wall -Wextra -Wno-psabi -Wno-uninitialized -fopenmp-simd
      -ffp-contract=off -fno-math-errno -fno-trapping-math ${isa_flags_${isa}})
    target_sources(deepops_ops PRIVATE $<TARGET_OBJECTS:${object}>)
  endforeach()
endfunction()

# The dispatch in core/cpu_isa.cpp and core/cpu_isa.h must know which variants exist.
if(avx512 IN_LIST DEEPOPS_CPU_ISAS)
  add_compile_definitions(DEEPOPS_HAVE_X86_VARIANTS)
endif()
