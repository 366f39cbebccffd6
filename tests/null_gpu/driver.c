/* The CUDA driver, as far as PyTorch and Triton call it. */
#define _GNU_SOURCE
#include "null.h"
#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DONE(code) return (CUresult)remember(code)
#define MAX_ARGUMENTS 256

/* Devices and contexts: a context is the device index plus 1. */

CUresult cuInit(unsigned flags) { return num_devices() ? OK : NO_DEVICE; }
CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_13;
    return OK;
}
CUresult cuDeviceGetCount(int *count) {
    *count = num_devices();
    return OK;
}
CUresult cuDeviceGet(CUdevice *device, int number) {
    *device = number;
    DONE(number < num_devices() ? OK : INVALID_DEVICE);
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = device_attribute(attribute);
    return OK;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)(uintptr_t)(current_device() + 1);
    return OK;
}
CUresult cuCtxSetCurrent(CUcontext context) { DONE(set_current_device((int)(uintptr_t)context - 1)); }
CUresult cuCtxGetDevice(CUdevice *device) {
    *device = current_device();
    return OK;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)(uintptr_t)(device + 1);
    return OK;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *is_active) {
    if (flags)
        *flags = 0;
    if (is_active)
        *is_active = 1;
    return OK;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 1 << 20;
    return OK;
}
CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = error_text(code);
    return OK;
}
CUresult cuGetErrorName(CUresult code, const char **text) { return cuGetErrorString(code, text); }
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *result) {
    char second[128];
    snprintf(second, sizeof second, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, second);
    if (!*function)
        *function = dlsym(RTLD_DEFAULT, name);
    if (result)
        *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? OK : CUDA_ERROR_NOT_FOUND;
}

/* Modules and functions. The section .nv.info.NAME of the machine code (ELF) holds the layout of a kernel's arguments. */

typedef struct {
    char *name;
    int num_arguments; /* -1: unknown */
    unsigned short sizes[MAX_ARGUMENTS];
    int max_shared;
} Function;

typedef struct {
    unsigned char *code;
    size_t bytes;
} Module;

static size_t elf_bytes(const Elf64_Ehdr *header) {
    bool is_elf = memcmp(header->e_ident, ELFMAG, SELFMAG) == 0;
    size_t sections = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
    size_t segments = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
    return !is_elf ? 0 : sections > segments ? sections : segments;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    Module *loaded = calloc(1, sizeof *loaded);
    loaded->bytes = elf_bytes(image);
    loaded->code = malloc(loaded->bytes);
    memcpy(loaded->code, image, loaded->bytes);
    *module = (CUmodule)loaded;
    trace("module\t%zu bytes", loaded->bytes);
    int code = sticky_error();
    DONE(code ? code : unsafe_call("cuModuleLoadData"));
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file)
        DONE(CUDA_ERROR_FILE_NOT_FOUND);
    fseek(file, 0, SEEK_END);
    size_t bytes = ftell(file);
    rewind(file);
    char *image = malloc(bytes + 1);
    bool is_read = fread(image, 1, bytes, file) == bytes;
    fclose(file);
    CUresult code = is_read ? cuModuleLoadData(module, image) : CUDA_ERROR_INVALID_IMAGE;
    free(image);
    return code;
}
CUresult cuModuleUnload(CUmodule module) {
    free(((Module *)module)->code);
    free(module);
    return OK;
}

/* An attribute is (format, number, 16-bit size or value); in format 4, `size` bytes follow. Number 0x17 describes an
   argument: index (4 bytes), ordinal (2), offset (2), and a word whose upper 14 bits are its size. */
static void read_arguments(const Module *module, Function *function) {
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)module->code;
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(module->code + (module->bytes ? header->e_shoff : 0));
    char wanted[512];
    snprintf(wanted, sizeof wanted, ".nv.info.%s", function->name);
    function->num_arguments = -1;
    for (int i = 0; module->bytes && i < header->e_shnum; i++) {
        const char *names = (const char *)module->code + sections[header->e_shstrndx].sh_offset;
        if (strcmp(names + sections[i].sh_name, wanted))
            continue;
        function->num_arguments = 0;
        const unsigned char *at = module->code + sections[i].sh_offset, *end = at + sections[i].sh_size;
        while (at + 4 <= end) {
            unsigned short size;
            memcpy(&size, at + 2, 2);
            if (at[0] == 4 && at[1] == 0x17) {
                unsigned short ordinal;
                unsigned word;
                memcpy(&ordinal, at + 8, 2);
                memcpy(&word, at + 12, 4);
                if (ordinal < MAX_ARGUMENTS) {
                    function->sizes[ordinal] = word >> 18;
                    function->num_arguments += 1;
                }
            }
            at += 4 + (at[0] == 4 ? size : 0);
        }
    }
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    Function *found = calloc(1, sizeof *found);
    found->name = strdup(name);
    found->max_shared = 49152;
    read_arguments((Module *)module, found);
    trace("function\t%s\t%d arguments", name, found->num_arguments);
    *function = (CUfunction)found;
    return OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS_PER_PROGRAM
             : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                                  : 0;
    return OK;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
        return OK;
    Function *found = (Function *)function;
    if (value > SHARED_BYTES_PER_PROGRAM)
        DONE(fault(INVALID_VALUE, "%s asks for %d bytes of shared memory", found->name, value));
    found->max_shared = value;
    return OK;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    *count = 1;
    return OK;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int block, size_t shared) {
    *count = 2;
    return OK;
}

/* Launches */

static int check_arguments(const Function *function, void **arguments) {
    if (function->num_arguments > 0 && !arguments)
        return fault(INVALID_VALUE, "%s takes %d arguments and gets none", function->name, function->num_arguments);
    for (int i = 0; i < function->num_arguments; i++) {
        char what[300];
        uint64_t value;
        if (function->sizes[i] != 8)
            continue;
        memcpy(&value, arguments[i], 8);
        snprintf(what, sizeof what, "argument %d of %s", i, function->name);
        int code = check_pointer(value, current_device(), what);
        if (code)
            return code;
    }
    return OK;
}

static CUresult launch_of(CUfunction function, const unsigned grid[3], const unsigned block[3], unsigned shared, CUstream stream,
                          void **arguments) {
    Function *found = (Function *)function;
    if ((int)shared > found->max_shared)
        DONE(fault(INVALID_VALUE, "%s has %u bytes of shared memory, set up are %d", found->name, shared, found->max_shared));
    int code = launch(found->name, stream_of(stream), grid, block, shared);
    DONE(code ? code : check_arguments(found, arguments));
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **arguments, void **extra) {
    return launch_of(function, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared, stream, arguments);
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream stream, void **arguments) {
    return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, NULL);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
    return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                          c->sharedMemBytes, c->hStream, arguments, extra);
}

/* The requirements on tensor maps, which a driver checks too (CUDA driver API, cuTensorMapEncodeTiled). */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *dims,
                                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    static const unsigned sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    if ((uintptr_t)address % 16)
        DONE(fault(INVALID_VALUE, "tensor map of %p, which does not begin on 16 bytes", address));
    if (kind_of(address, NULL, NULL, NULL) != DEVICE)
        DONE(fault(INVALID_VALUE, "tensor map of %p, which is no memory of a device", address));
    if (rank < 1 || rank > 5)
        DONE(fault(INVALID_VALUE, "tensor map of rank %u", rank));
    for (unsigned i = 0; i < rank; i++)
        if (dims[i] < 1 || dims[i] > 1ull << 32 || box[i] < 1 || box[i] > 256)
            DONE(fault(INVALID_VALUE, "tensor map: %llu elements and a box of %u along dim %u", (long long)dims[i], box[i], i));
    for (unsigned i = 0; i + 1 < rank; i++)
        if (strides[i] % 16 || strides[i] >= 1ull << 40)
            DONE(fault(INVALID_VALUE, "tensor map: a stride of %llu bytes along dim %u", (long long)strides[i], i + 1));
    unsigned inner = box[0] * (type < sizeof sizes / sizeof *sizes ? sizes[type] : 1);
    unsigned limit = swizzle == CU_TENSOR_MAP_SWIZZLE_32B    ? 32
                     : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                     : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
                                                             : 1024;
    if (inner % 16 || inner > limit)
        DONE(fault(INVALID_VALUE, "tensor map: a box of %u bytes inside, at most %u", inner, limit));
    return OK;
}

/* Memory */

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    int device = 0;
    Kind kind = kind_of((void *)address, &device, NULL, NULL);
    if (kind == UNKNOWN)
        return INVALID_VALUE; /* the result for host memory, which is not an error of the caller */
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
        *(int *)value = device;
    else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        *(CUmemorytype *)value = kind == DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
    else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)value = address;
    else
        return INVALID_VALUE;
    return OK;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    void *begin;
    size_t length;
    if (kind_of((void *)address, NULL, &begin, &length) != DEVICE)
        DONE(INVALID_VALUE);
    if (base)
        *base = (CUdeviceptr)begin;
    if (bytes)
        *bytes = length;
    return OK;
}
CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *of, CUmemAllocationGranularity_flags flags) {
    *bytes = 2 << 20;
    return OK;
}
CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr wanted, unsigned long long flags) {
    *address = (CUdeviceptr)reserve(bytes);
    DONE(*address ? OK : OUT_OF_MEMORY);
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *of, unsigned long long flags) {
    *handle = 1;
    DONE(used_bytes(current_device()) + bytes <= MEMORY_BYTES ? OK : OUT_OF_MEMORY);
}
CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags) {
    DONE(map((void *)address, bytes));
}
CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    unmap((void *)address, bytes);
    return OK;
}
CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream stream) {
    DONE(fill((void *)address, 4 * count, stream_of(stream)));
}
