/* Functions of cuBLAS, cuDNN, NVRTC and NCCL whose results PyTorch reads; all other functions do nothing and return 0. */
#include <stddef.h>
#include <stdlib.h>

static int handle(void **made) {
    *made = calloc(1, 1024);
    return 0;
}

int cublasCreate_v2(void **made) { return handle(made); }
int cublasLtCreate(void **made) { return handle(made); }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { return handle(made); }
int cublasLtMatmulPreferenceCreate(void **made) { return handle(made); }
int cublasLtMatrixLayoutCreate(void **made, int type, unsigned long long rows, unsigned long long columns, long long stride) {
    return handle(made);
}
int cublasGetMathMode(void *of, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *of, int *mode) { return *mode = 0; }
size_t cublasLtGetVersion(void) { return 130100; }
int cublasGetVersion_v2(void *of, int *version) {
    *version = 130100;
    return 0;
}
const char *cublasGetStatusString(int code) { return "null GPU"; }
int cublasLtMatmulAlgoGetHeuristic(void *of, void *matmul, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   void *results, int *found) {
    *found = 1;
    return 0;
}

size_t cudnnGetVersion(void) { return 91900; }
int cudnnCreate(void **made) { return handle(made); }
/* This cuDNN supports no plan (CUDNN_STATUS_NOT_SUPPORTED). */
int cudnnBackendCreateDescriptor(int type, void **made) {
    *made = NULL;
    return 3000;
}
const char *cudnnGetErrorString(int code) { return "null GPU"; }

int nvrtcVersion(int *major, int *minor) {
    *major = 13;
    return *minor = 0;
}
int nvrtcGetPTXSize(void *program, size_t *bytes) {
    *bytes = 1;
    return 0;
}
int nvrtcGetCUBINSize(void *program, size_t *bytes) { return nvrtcGetPTXSize(program, bytes); }
int nvrtcGetProgramLogSize(void *program, size_t *bytes) { return nvrtcGetPTXSize(program, bytes); }
int nvrtcGetLoweredName(void *program, const char *expression, const char **name) {
    *name = "compiled_by_nvrtc";
    return 0;
}
const char *nvrtcGetErrorString(int code) { return "null GPU"; }

int ncclGetVersion(int *version) {
    *version = 22809;
    return 0;
}
const char *ncclGetErrorString(int code) { return "null GPU"; }

typedef struct { char bytes[128]; } NcclId;

int ncclCommInitRank(void **made, int ranks, NcclId id, int rank) { return handle(made); }
int ncclCommInitRankConfig(void **made, int ranks, NcclId id, int rank, void *config) { return handle(made); }
int ncclCommGetAsyncError(void *of, int *error) { return *error = 0; }
int ncclCommUserRank(void *of, int *rank) { return *rank = 0; }
int ncclCommCount(void *of, int *ranks) {
    *ranks = 1;
    return 0;
}
