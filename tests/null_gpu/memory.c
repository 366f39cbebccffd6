/* Memory: each device has its own range of unmapped addresses, and no address is allocated twice. */
#define _GNU_SOURCE
#include "null.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* PyTorch reserves 170 GB anew after each time that it empties its cache; a process can address 128 TiB. */
#define RANGE_BYTES (50ull << 40)
#define MAX_BLOCKS (1 << 18)

typedef struct {
    uintptr_t begin;
    size_t bytes;
    Kind kind;
} Block;

static Block blocks[MAX_BLOCKS]; /* sorted by address */
static int num_blocks;
static uintptr_t range[MAX_DEVICES], next_free[MAX_DEVICES];
static size_t used[MAX_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int range_of(uintptr_t address) {
    for (int device = 0; device < MAX_DEVICES; device++)
        if (range[device] && address - range[device] < RANGE_BYTES)
            return device;
    return -1;
}

/* Return the index of the first block that begins after the address. */
static int after(uintptr_t address) {
    int low = 0, high = num_blocks;
    while (low < high) {
        int middle = (low + high) / 2;
        if (blocks[middle].begin <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void insert(uintptr_t begin, size_t bytes, Kind kind) {
    if (num_blocks == MAX_BLOCKS)
        abort();
    int at = after(begin);
    memmove(blocks + at + 1, blocks + at, (num_blocks++ - at) * sizeof *blocks);
    blocks[at] = (Block){begin, bytes, kind};
}

static Block *find(uintptr_t address) {
    int at = after(address) - 1;
    return at >= 0 && address - blocks[at].begin < blocks[at].bytes ? blocks + at : NULL;
}

static void erase(Block *block) { memmove(block, block + 1, (char *)(blocks + num_blocks--) - (char *)(block + 1)); }

static uintptr_t take_addresses(size_t bytes) {
    int device = current_device();
    if (!range[device]) {
        void *reserved = mmap(NULL, RANGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reserved == MAP_FAILED)
            abort();
        next_free[device] = range[device] = ((uintptr_t)reserved + (2 << 20) - 1) & ~((2ull << 20) - 1);
    }
    uintptr_t address = next_free[device];
    /* Leave a gap after each allocation to detect out-of-bounds accesses. */
    next_free[device] += (bytes + (4 << 20) - 1) & ~((2ull << 20) - 1);
    return next_free[device] < range[device] + RANGE_BYTES - (2 << 20) ? address : 0;
}

void *allocate(size_t bytes, Kind kind) {
    bytes = bytes ? bytes : 1;
    if (kind == PINNED) {
        void *address = NULL;
        if (posix_memalign(&address, 4096, bytes))
            return NULL;
        pin(address, bytes);
        return address;
    }
    pthread_mutex_lock(&lock);
    int device = current_device();
    uintptr_t address = bytes <= MEMORY_BYTES - used[device] ? take_addresses(bytes) : 0;
    if (address) {
        insert(address, bytes, DEVICE);
        used[device] += bytes;
    }
    pthread_mutex_unlock(&lock);
    trace("allocate\t%zu", bytes);
    return (void *)address;
}

int release(void *address, Kind kind) {
    pthread_mutex_lock(&lock);
    Block *block = find((uintptr_t)address);
    bool is_whole = block && block->begin == (uintptr_t)address && block->kind == kind;
    if (is_whole) {
        if (kind == DEVICE)
            used[range_of(block->begin)] -= block->bytes;
        erase(block);
    }
    pthread_mutex_unlock(&lock);
    return is_whole ? OK : fault(INVALID_VALUE, "free of %p, which is no allocation", address);
}

void pin(void *address, size_t bytes) {
    pthread_mutex_lock(&lock);
    insert((uintptr_t)address, bytes, PINNED);
    pthread_mutex_unlock(&lock);
}

/* Virtual memory management: reserve addresses first, map memory to parts of them later. */
void *reserve(size_t bytes) {
    pthread_mutex_lock(&lock);
    uintptr_t address = take_addresses(bytes);
    pthread_mutex_unlock(&lock);
    return (void *)address;
}

int map(void *address, size_t bytes) {
    pthread_mutex_lock(&lock);
    int device = range_of((uintptr_t)address);
    bool fits = device >= 0 && used[device] + bytes <= MEMORY_BYTES && !find((uintptr_t)address);
    if (fits) {
        insert((uintptr_t)address, bytes, DEVICE);
        used[device] += bytes;
    }
    pthread_mutex_unlock(&lock);
    trace("allocate\t%zu", bytes);
    return fits ? OK : OUT_OF_MEMORY;
}

void unmap(void *address, size_t bytes) {
    pthread_mutex_lock(&lock);
    uintptr_t end = (uintptr_t)address + bytes;
    for (Block *block; (uintptr_t)address < end && (block = find((uintptr_t)address));) {
        address = (void *)(block->begin + block->bytes);
        used[range_of(block->begin)] -= block->bytes;
        erase(block);
    }
    pthread_mutex_unlock(&lock);
}

Kind kind_of(const void *address, int *device, void **base, size_t *bytes) {
    pthread_mutex_lock(&lock);
    Block *block = find((uintptr_t)address);
    Kind kind = block ? block->kind : UNKNOWN;
    if (block && device)
        *device = kind == DEVICE ? range_of(block->begin) : current_device();
    if (block && base)
        *base = (void *)block->begin;
    if (block && bytes)
        *bytes = block->bytes;
    pthread_mutex_unlock(&lock);
    return kind;
}

size_t used_bytes(int device) { return used[device]; }

/* Check that all bytes are in device memory or none is; a range may span several adjacent mappings. */
static int check_range(const void *address, size_t bytes, bool *is_device, bool *is_pinned, const char *what) {
    *is_device = range_of((uintptr_t)address) >= 0;
    *is_pinned = kind_of(address, NULL, NULL, NULL) == PINNED;
    uintptr_t end = (uintptr_t)address + bytes;
    for (uintptr_t at = (uintptr_t)address; *is_device && at < end;) {
        void *base;
        size_t length;
        if (kind_of((void *)at, NULL, &base, &length) != DEVICE)
            return fault(ILLEGAL_ADDRESS, "%s of %zu bytes at %p, of which %p is not allocated", what, bytes, address, (void *)at);
        at = (uintptr_t)base + length;
    }
    return OK;
}

int copy(void *to, const void *from, size_t bytes, Stream *stream, bool is_async) {
    static const char *const directions[2][2] = {{"host to host", "host to device"}, {"device to host", "device to device"}};
    bool to_device, from_device, to_pinned, from_pinned;
    int code = sticky_error();
    if (!code)
        code = check_range(to, bytes, &to_device, &to_pinned, "copy to");
    if (!code)
        code = check_range(from, bytes, &from_device, &from_pinned, "copy from");
    if (code)
        return code;
    bool pinned = (to_device || to_pinned) && (from_device || from_pinned);
    if (stream->capture) {
        if (!pinned) {
            stream->capture->is_invalid = true;
            return CAPTURE_UNSUPPORTED;
        }
        stream->capture->nodes++;
    } else if (!is_async && (code = unsafe_call("cudaMemcpy"))) {
        return code;
    }
    const char *how = !is_async ? "waits" : pinned ? "async" : "pageable";
    trace("copy\t%s\t%zu\t%s", directions[from_device][to_device], bytes, how);
    if (!to_device && from_device)
        memset(to, 0, bytes);
    else if (!to_device)
        memmove(to, from, bytes);
    return OK;
}

int fill(void *to, size_t bytes, Stream *stream) {
    bool is_device, is_pinned;
    int code = check_range(to, bytes, &is_device, &is_pinned, "memset");
    if (code)
        return code;
    if (stream->capture)
        stream->capture->nodes++;
    trace("fill\t%zu", bytes);
    if (!is_device)
        memset(to, 0, bytes);
    return OK;
}

/* Check 8 bytes of a kernel's arguments if they look like a pointer. */
int check_pointer(uint64_t value, int device, const char *what) {
    int owner = range_of(value);
    if (owner >= 0) {
        if (kind_of((void *)value, NULL, NULL, NULL) != DEVICE)
            return fault(ILLEGAL_ADDRESS, "%s points to %p, which is not allocated", what, (void *)value);
        if (owner != device)
            return fault(ILLEGAL_ADDRESS, "%s points to memory of device %d, and the stream is of device %d", what, owner, device);
        return OK;
    }
    /* Integer arguments are smaller than this range, and the bits of a float64 are larger. */
    bool looks_like_host = value >= 1ull << 40 && value < 1ull << 47;
    if (looks_like_host && kind_of((void *)value, NULL, NULL, NULL) != PINNED)
        return fault(ILLEGAL_ADDRESS, "%s points to %p, memory of the host", what, (void *)value);
    return OK;
}
