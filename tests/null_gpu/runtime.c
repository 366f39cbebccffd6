/* The CUDA runtime, as far as PyTorch calls it. */
#define _GNU_SOURCE
#include "null.h"
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DONE(code) return (cudaError_t)remember(code)

static Stream *of(cudaStream_t stream) { return stream_of(stream); }

/* Devices */

cudaError_t cudaGetDeviceCount(int *count) {
    *count = num_devices();
    DONE(*count ? OK : NO_DEVICE);
}
cudaError_t cudaGetDevice(int *device) {
    *device = current_device();
    DONE(num_devices() ? OK : NO_DEVICE);
}
cudaError_t cudaSetDevice(int device) { DONE(set_current_device(device)); }
cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDA_13;
    return OK;
}
cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = device_attribute(attribute);
    DONE(device < num_devices() ? OK : INVALID_DEVICE);
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (device >= num_devices())
        DONE(INVALID_DEVICE);
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200");
    p->uuid.bytes[0] = 1 + device;
    p->totalGlobalMem = MEMORY_BYTES;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = SHARED_BYTES_PER_PROGRAM;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = 65536;
    p->warpSize = 32;
    p->memPitch = 2147483647;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = THREADS_PER_PROGRAM;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = 9;
    p->textureAlignment = 512;
    p->multiProcessorCount = SM_COUNT;
    p->l2CacheSize = 62914560;
    p->persistingL2CacheMaxSize = 32 << 20;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->memoryBusWidth = 6144;
    p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = p->ECCEnabled = p->cooperativeLaunch = 1;
    return OK;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:0%d:00.0", 1 + device);
    return OK;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return OK;
}
cudaError_t cudaDeviceSynchronize(void) { DONE(synchronise("cudaDeviceSynchronize", NULL)); }

/* Errors */

cudaError_t cudaGetLastError(void) { return last_error(true); }
cudaError_t cudaPeekAtLastError(void) { return last_error(false); }
const char *cudaGetErrorString(cudaError_t code) { return error_text(code); }
const char *cudaGetErrorName(cudaError_t code) { return error_text(code); }

/* Memory */

cudaError_t cudaMalloc(void **address, size_t bytes) {
    int code = sticky_error();
    if (!code)
        code = unsafe_call("cudaMalloc");
    if (!code && !(*address = allocate(bytes, DEVICE)))
        code = OUT_OF_MEMORY;
    DONE(code);
}
cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) {
    DONE((*address = allocate(bytes, DEVICE)) ? OK : OUT_OF_MEMORY);
}
cudaError_t cudaFree(void *address) {
    if (!address)
        return OK;
    int code = unsafe_call("cudaFree");
    DONE(code ? code : release(address, DEVICE));
}
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { DONE(release(address, DEVICE)); }
cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    int code = unsafe_call("cudaHostAlloc");
    if (!code && !(*address = allocate(bytes, PINNED)))
        code = OUT_OF_MEMORY;
    DONE(code);
}
cudaError_t cudaFreeHost(void *address) {
    int code = release(address, PINNED);
    if (!code)
        free(address);
    DONE(code);
}
cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
    pin(address, bytes);
    return OK;
}
cudaError_t cudaHostUnregister(void *address) { DONE(release(address, PINNED)); }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = MEMORY_BYTES - used_bytes(current_device());
    *total = MEMORY_BYTES;
    DONE(sticky_error());
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    memset(attributes, 0, sizeof *attributes);
    Kind kind = kind_of(address, &attributes->device, NULL, NULL);
    attributes->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->devicePointer = kind == UNKNOWN ? NULL : (void *)address;
    attributes->hostPointer = kind == PINNED ? (void *)address : NULL;
    return OK;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    DONE(copy(to, from, bytes, stream_of(NULL), false));
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    DONE(of(stream) ? copy(to, from, bytes, of(stream), true) : INVALID_HANDLE);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t code = OK;
    for (size_t row = 0; row < height && !code; row++)
        code = cudaMemcpyAsync((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind, stream);
    return code;
}
cudaError_t cudaMemset(void *address, int value, size_t bytes) { DONE(fill(address, bytes, stream_of(NULL))); }
cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t stream) {
    DONE(of(stream) ? fill(address, bytes, of(stream)) : INVALID_HANDLE);
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    DONE((*address = allocate(4096, DEVICE)) ? OK : OUT_OF_MEMORY);
}

/* Streams, events, host functions */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = (cudaStream_t)new_stream(priority);
    return OK;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    Stream *found = of(stream);
    if (!found)
        DONE(INVALID_HANDLE);
    found->magic = 0;
    return OK;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = of(stream)->priority;
    return OK;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    DONE(of(stream) ? synchronise("cudaStreamSynchronize", of(stream)) : INVALID_HANDLE);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Stream *found = of(stream);
    if (found && found->capture) {
        found->capture->is_invalid = true;
        DONE(CAPTURE_UNSUPPORTED);
    }
    int code = sticky_error();
    DONE(code ? code : unsafe_call("cudaStreamQuery"));
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    Stream *waiting = of(stream);
    Event *awaited = event_of(event);
    if (!waiting || !awaited)
        DONE(INVALID_HANDLE);
    if (awaited->capture && !waiting->capture) {
        if ((uintptr_t)stream <= 2) {
            awaited->capture->is_invalid = true;
            DONE(CAPTURE_IMPLICIT);
        }
        waiting->capture = awaited->capture; /* the stream joins the capture */
        waiting->is_branch = true;
        waiting->capture->num_branches++;
    } else if (waiting->capture && awaited->capture == waiting->capture) {
        if (awaited->stream != waiting && awaited->stream->is_branch) {
            awaited->stream->is_branch = false;
            waiting->capture->num_branches--;
        }
    } else if (waiting->capture && !awaited->capture && awaited->recorded_ms > 0) {
        waiting->capture->is_invalid = true;
        DONE(CAPTURE_ISOLATION);
    }
    return OK;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    Stream *found = of(stream);
    if (found && found->capture)
        found->capture->nodes++;
    else
        function(data);
    return OK;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned flags) {
    function(stream, OK, data);
    return OK;
}

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * now.tv_sec + 1e-6 * now.tv_nsec;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)new_event();
    return OK;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Event *found = event_of(event);
    if (!found)
        DONE(INVALID_HANDLE);
    found->magic = 0;
    free(found);
    return OK;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    Event *recorded = event_of(event);
    Stream *found = of(stream);
    if (!recorded || !found)
        DONE(INVALID_HANDLE);
    recorded->capture = found->capture;
    recorded->stream = found;
    recorded->recorded_ms = now_ms();
    return OK;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    Event *found = event_of(event);
    if (found && found->capture)
        DONE(CAPTURED_EVENT);
    int code = sticky_error();
    DONE(code ? code : unsafe_call("cudaEventQuery"));
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    Event *found = event_of(event);
    if (found && found->capture)
        DONE(CAPTURED_EVENT);
    DONE(synchronise("cudaEventSynchronize", NULL));
}
/* The elapsed time is the host time between the two events. */
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
    Event *from = event_of(begin), *to = event_of(end);
    if (!from || !to || !from->recorded_ms || !to->recorded_ms)
        DONE(INVALID_HANDLE);
    double elapsed = to->recorded_ms - from->recorded_ms;
    *ms = elapsed > 1e-3 ? elapsed : 1e-3;
    DONE(sticky_error());
}

/* Captures and graphs */

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    bool before = relax_thread(*mode == cudaStreamCaptureModeRelaxed);
    *mode = before ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal;
    return OK;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if ((uintptr_t)stream <= 2)
        DONE(CAPTURE_UNSUPPORTED);
    begin_capture(of(stream), mode == cudaStreamCaptureModeGlobal);
    return OK;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    Capture *capture = of(stream)->capture;
    *graph = NULL;
    if (!capture)
        DONE(INVALID_VALUE);
    end_capture(of(stream));
    if (capture->is_invalid)
        DONE(CAPTURE_INVALIDATED);
    if (capture->num_branches)
        DONE(fault(CAPTURE_UNJOINED, "a capture ends before %d streams that joined it have come back", capture->num_branches));
    Graph *made = malloc(sizeof *made);
    made->nodes = capture->nodes;
    *graph = (cudaGraph_t)made;
    return OK;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    Capture *capture = of(stream)->capture;
    *status = !capture              ? cudaStreamCaptureStatusNone
              : capture->is_invalid ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
    return OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    Capture *capture = of(stream)->capture;
    cudaStreamIsCapturing(stream, status);
    if (id && capture)
        *id = capture->id;
    if (graph)
        *graph = (cudaGraph_t)capture;
    if (dependencies)
        *dependencies = NULL;
    if (edges)
        *edges = NULL;
    if (count)
        *count = 0;
    return OK;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    Graph *copied = malloc(sizeof *copied);
    *copied = *(Graph *)graph;
    *executable = (cudaGraphExec_t)copied;
    return OK;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    trace("graph\t%d nodes", ((Graph *)executable)->nodes);
    DONE(sticky_error());
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = ((Graph *)graph)->nodes;
    return OK;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph);
    return OK;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    free(executable);
    return OK;
}

/* PyTorch's own kernels, identified by the address of a host function */

#define MAX_KERNELS 65536
static struct { const void *function; const char *name; } kernels[MAX_KERNELS];
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } configuration;

static size_t slot_of(const void *function) {
    size_t slot = ((uintptr_t)function >> 4) * 2654435761u % MAX_KERNELS;
    while (kernels[slot].function && kernels[slot].function != function)
        slot = (slot + 1) % MAX_KERNELS;
    return slot;
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 1; }
void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name, int limit, uint3 *tid,
                            uint3 *bid, dim3 *block, dim3 *grid, int *warp) {
    static int count;
    if (++count > MAX_KERNELS / 4 * 3)
        abort();
    size_t slot = slot_of(function);
    kernels[slot].function = function;
    kernels[slot].name = name;
}

static cudaError_t launch_of(const void *function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    const char *name = kernels[slot_of(function)].name;
    const unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
    DONE(launch(name ? name : "a kernel of PyTorch", of(stream), g, b, shared));
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(cudaStream_t *)stream = configuration.stream;
    return OK;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return OK;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch_of(kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch_of(function, grid, block, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream) {
    return launch_of(function, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return launch_of(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = THREADS_PER_PROGRAM;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 49152;
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int block, size_t shared,
                                                                   unsigned flags) {
    *count = 2;
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *function, int block, size_t shared) {
    *count = 2;
    return OK;
}

/* The driver, by the names of its functions */

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    char second[128];
    snprintf(second, sizeof second, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, second);
    if (!*function)
        *function = dlsym(RTLD_DEFAULT, name);
    if (result)
        *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return OK;
}
