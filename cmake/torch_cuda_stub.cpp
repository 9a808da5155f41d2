// Stands for libtorch_cuda.so where _cuda.so is linked without a torch that has CUDA; see Cuda.cmake. Never loaded.
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
extern "C" int aoti_torch_cuda_mm_out(void*, void*, void*) { return 1; }
extern "C" int aoti_torch_cuda_addmm_out(void*, void*, void*, void*, double, double) { return 1; }
