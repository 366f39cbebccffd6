/* The shared state of the null GPU: devices, memory, streams, captures and error reports.

   Device memory is inaccessible address space: a host that reads or writes it crashes, as with a real GPU. Copies from it give
   zeros, regardless of earlier copies to it. Kernels and libraries compute nothing. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_DEVICES 2
#define SM_COUNT 132
#define SHARED_BYTES_PER_PROGRAM 232448
#define THREADS_PER_PROGRAM 1024
#define MEMORY_BYTES 150754820096ull /* of an H200 */

enum { CUDA_13 = 13000, OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101,
       INVALID_HANDLE = 400, ILLEGAL_ADDRESS = 700, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNJOINED = 904,
       CAPTURE_ISOLATION = 905, CAPTURE_IMPLICIT = 906, CAPTURED_EVENT = 907 };

typedef struct Capture {
    bool is_invalid, is_open;
    int nodes;
    int num_branches; /* streams that joined the capture and were not waited for since */
    unsigned long long id;
} Capture;

typedef struct Stream {
    uint32_t magic;
    int device;
    int priority;
    Capture *capture;
    bool is_branch;
} Stream;

typedef struct Event {
    uint32_t magic;
    double recorded_ms;
    Capture *capture;
    Stream *stream; /* the stream that recorded it */
} Event;

typedef struct Graph {
    int nodes;
} Graph;

typedef enum { UNKNOWN, DEVICE, PINNED } Kind;

/* work.c: devices */
int num_devices(void);
int current_device(void);
int set_current_device(int device);
int device_attribute(int attribute);

/* report.c */
void trace(const char *format, ...) __attribute__((format(printf, 1, 2)));
int fault(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *error_text(int code);
int remember(int code);
int last_error(bool forget);

/* memory.c */
void *allocate(size_t bytes, Kind kind);
int release(void *address, Kind kind);
void pin(void *address, size_t bytes);
void *reserve(size_t bytes);
int map(void *address, size_t bytes);
void unmap(void *address, size_t bytes);
Kind kind_of(const void *address, int *device, void **base, size_t *bytes);
size_t used_bytes(int device);
int copy(void *to, const void *from, size_t bytes, Stream *stream, bool is_async);
int fill(void *to, size_t bytes, Stream *stream);
int check_pointer(uint64_t value, int device, const char *what);

/* work.c: streams and launches */
Stream *stream_of(void *handle);
Event *event_of(void *handle);
int unsafe_call(const char *name);
int synchronise(const char *name, Stream *stream);
int launch(const char *name, Stream *stream, const unsigned grid[3], const unsigned block[3], size_t shared);
int library_call(const char *name);
int sticky_error(void);
bool relax_thread(bool relaxed);
void begin_capture(Stream *stream, bool is_global);
void end_capture(Stream *stream);
Stream *new_stream(int priority);
Event *new_event(void);
