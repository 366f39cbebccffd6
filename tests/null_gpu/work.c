/* Devices, streams, captures and launches: calls are checked and traced, but not executed. */
#define _GNU_SOURCE
#include "null.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STREAM_MAGIC 0x53545245
#define EVENT_MAGIC 0x45564e54

static __thread int device_of_thread;
static Stream default_streams[MAX_DEVICES];
static bool hangs, is_broken;

int num_devices(void) {
    const char *text = getenv("NULL_GPU");
    int count = text ? atoi(text) : 0;
    return count > MAX_DEVICES ? MAX_DEVICES : count;
}

int current_device(void) { return device_of_thread; }

int set_current_device(int device) {
    if (device < 0 || device >= num_devices())
        return INVALID_DEVICE;
    device_of_thread = device;
    return OK;
}

/* Attributes have the same numbers in the runtime and in the driver. */
int device_attribute(int attribute) {
    static const struct { int attribute, value; } of_an_h200[] = {
        {1, THREADS_PER_PROGRAM}, {2, 1024}, {3, 1024}, {4, 64},       /* threads of a program, and by axis */
        {5, 2147483647}, {6, 65535}, {7, 65535},                       /* programs by axis */
        {8, 49152}, {9, 65536}, {10, 32}, {12, 65536}, {16, SM_COUNT}, /* shared and constant bytes, warp, registers, SMs */
        {20, 0}, {38, 62914560}, {39, 2048},                           /* compute mode, L2 bytes, threads of an SM */
        {75, 9}, {76, 0},                                              /* compute capability */
        {81, 233472}, {82, 65536}, {97, SHARED_BYTES_PER_PROGRAM},     /* shared bytes and registers of an SM */
        {106, 32},                                                     /* programs of an SM */
    };
    for (size_t i = 0; i < sizeof of_an_h200 / sizeof *of_an_h200; i++)
        if (of_an_h200[i].attribute == attribute)
            return of_an_h200[i].value;
    return 1; /* all other features are supported */
}

static void forget_closed(Capture **capture) {
    if (*capture && !(*capture)->is_open)
        *capture = NULL;
}

/* A handle of 0, 1, or 2 is a default stream of the current device. */
Stream *stream_of(void *handle) {
    if ((uintptr_t)handle <= 2) {
        Stream *stream = default_streams + device_of_thread;
        *stream = (Stream){STREAM_MAGIC, device_of_thread, 0, NULL};
        return stream;
    }
    Stream *stream = handle;
    if (stream->magic != STREAM_MAGIC) {
        fault(INVALID_HANDLE, "%p is no stream", handle);
        return NULL;
    }
    forget_closed(&stream->capture);
    return stream;
}

Event *event_of(void *handle) {
    Event *event = handle;
    if (event && event->magic == EVENT_MAGIC) {
        forget_closed(&event->capture);
        return event;
    }
    fault(INVALID_HANDLE, "%p is no event", handle);
    return NULL;
}

/* After a fault in a kernel, all later calls of the process fail. */
int sticky_error(void) { return is_broken ? remember(ILLEGAL_ADDRESS) : OK; }

static __thread bool thread_is_relaxed;
static Capture *global_capture; /* the global-mode capture, during which no thread may make an unsafe call, or NULL */

bool relax_thread(bool relaxed) {
    bool before = thread_is_relaxed;
    thread_is_relaxed = relaxed;
    return before;
}

int unsafe_call(const char *name) {
    if (!global_capture || thread_is_relaxed)
        return OK;
    global_capture->is_invalid = true;
    return fault(CAPTURE_UNSUPPORTED, "%s while a stream is captured", name);
}

int synchronise(const char *name, Stream *stream) {
    if (stream && stream->capture) {
        stream->capture->is_invalid = true;
        return fault(CAPTURE_UNSUPPORTED, "%s on a captured stream", name);
    }
    int code = unsafe_call(name);
    if (code)
        return code;
    trace("synchronise\t%s", name);
    while (hangs)
        pause();
    return sticky_error();
}

void begin_capture(Stream *stream, bool is_global) {
    static unsigned long long id;
    Capture *capture = calloc(1, sizeof *capture);
    *capture = (Capture){.is_open = true, .id = ++id};
    stream->capture = capture;
    stream->is_branch = false;
    if (is_global)
        global_capture = capture;
}

void end_capture(Stream *stream) {
    stream->capture->is_open = false; /* not freed: joined streams and events still read this flag */
    if (global_capture == stream->capture)
        global_capture = NULL;
    stream->capture = NULL;
}

static bool matches(const char *variable, const char *name) {
    const char *part = getenv(variable);
    return part && *part && strstr(name, part);
}

int launch(const char *name, Stream *stream, const unsigned grid[3], const unsigned block[3], size_t shared) {
    if (!stream)
        return INVALID_HANDLE;
    if (sticky_error())
        return ILLEGAL_ADDRESS;
    if (stream->device != device_of_thread)
        return fault(INVALID_HANDLE, "%s on a stream of device %d, current is %d", name, stream->device, device_of_thread);
    bool has_programs = grid[0] && grid[1] && grid[2] && grid[0] <= 2147483647u && grid[1] <= 65535 && grid[2] <= 65535;
    size_t threads = (size_t)block[0] * block[1] * block[2];
    if (!has_programs || threads < 1 || threads > THREADS_PER_PROGRAM || shared > SHARED_BYTES_PER_PROGRAM)
        return fault(INVALID_VALUE, "launch of %s: grid %u x %u x %u, block %u x %u x %u, %zu bytes of shared memory", name, grid[0],
                     grid[1], grid[2], block[0], block[1], block[2], shared);
    if (stream->capture)
        stream->capture->nodes++;
    bool is_default = stream == default_streams + stream->device;
    trace("launch\t%s\t%s\t%d", name, stream->capture ? "captured" : is_default ? "default" : "side", stream->device);
    hangs |= matches("NULL_GPU_HANGS_AT", name);
    is_broken |= matches("NULL_GPU_BREAKS_AT", name);
    return OK;
}

int library_call(const char *name) {
    trace("launch\t%s\tlibrary\t%d", name, device_of_thread);
    return OK;
}

Stream *new_stream(int priority) {
    Stream *stream = malloc(sizeof *stream);
    *stream = (Stream){STREAM_MAGIC, device_of_thread, priority, NULL};
    return stream;
}

Event *new_event(void) {
    Event *event = malloc(sizeof *event);
    *event = (Event){EVENT_MAGIC, 0, NULL};
    return event;
}
