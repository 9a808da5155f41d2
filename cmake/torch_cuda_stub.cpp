// Stands for libtorch_cuda.so where _cuda.so is linked without a torch that has CUDA; see Cuda.cmake. Never loaded.
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
