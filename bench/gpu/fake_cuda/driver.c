/* A CUDA runtime and driver with one device that holds nothing and launches nothing: what torch asks while it runs on fake CUDA
   tensors. Preloaded before the real runtime. What is not here fails in the real runtime, which finds no GPU. */
#include <string.h>

typedef int Status; /* 0: success */

Status cudaGetDeviceCount(int *count) { *count = 1; return 0; }
Status cudaGetDevice(int *device) { *device = 0; return 0; }
Status cudaSetDevice(int device) { return device != 0; }
Status cudaGetLastError(void) { return 0; }
Status cudaPeekAtLastError(void) { return 0; }
Status cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
Status cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Status cudaDeviceSynchronize(void) { return 0; }
Status cudaStreamSynchronize(void *stream) { return 0; }
Status cudaStreamQuery(void *stream) { return 0; }

/* Of a device's properties torch's C++ reads these (it picks cuDNN for bf16 by the architecture); Python's are patched. The offsets
   are those of cudaDeviceProp in CUDA 13. */
Status cudaGetDeviceProperties(void *properties, int device) {
    char *p = properties;
    memset(p, 0, 900);
    *(unsigned long *)(p + 288) = 80UL << 30; /* totalGlobalMem */
    *(int *)(p + 308) = 32;                   /* warpSize */
    *(int *)(p + 360) = 9;                    /* major */
    *(int *)(p + 384) = 132;                  /* multiProcessorCount */
    return device != 0;
}

Status cuInit(unsigned flags) { return 0; }
Status cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Status cuDeviceGetCount(int *count) { *count = 1; return 0; }
Status cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Status cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 1; return 0; }
Status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
