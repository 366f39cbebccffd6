/* Reports of the null GPU: a trace of all calls, faults on stderr, and the last error of a thread. */
#define _GNU_SOURCE
#include "null.h"
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *file;
static int faults;
static __thread int error;
static __thread char message[512];
static __thread int code_of_message;

/* Append a line to `path` for each event from now on; NULL stops the trace. */
void null_gpu_trace(const char *path) {
    pthread_mutex_lock(&lock);
    if (file)
        fclose(file);
    file = path ? fopen(path, "a") : NULL;
    if (file)
        setlinebuf(file); /* so that a killed process loses no event, and several processes can share a file */
    pthread_mutex_unlock(&lock);
}

/* Return the number of faults in this process. */
int null_gpu_faults(void) { return faults; }

void trace(const char *format, ...) {
    if (!file)
        return;
    va_list arguments;
    va_start(arguments, format);
    pthread_mutex_lock(&lock);
    if (file) {
        vfprintf(file, format, arguments);
        fputc('\n', file);
    }
    pthread_mutex_unlock(&lock);
    va_end(arguments);
}

/* Report a fault on stderr and in the error message of the caller; return the code. */
int fault(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    __atomic_add_fetch(&faults, 1, __ATOMIC_RELAXED);
    fprintf(stderr, "[null GPU] fault: %s\n", message);
    trace("fault\t%s", message);
    return error = code_of_message = code;
}

const char *error_text(int code) {
    static __thread char text[640];
    const char *what = code == OUT_OF_MEMORY         ? "out of memory"
                       : code == NO_DEVICE           ? "no CUDA-capable device is detected"
                       : code == INVALID_DEVICE      ? "invalid device ordinal"
                       : code == ILLEGAL_ADDRESS     ? "an illegal memory access was encountered"
                       : code == CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing"
                       : code == CAPTURE_INVALIDATED ? "operation failed due to a previous error during capture"
                       : code == CAPTURE_UNJOINED    ? "capturing stream has unjoined work"
                       : code == CAPTURE_IMPLICIT    ? "operation would make the legacy stream depend on a capturing stream"
                                                     : "error";
    snprintf(text, sizeof text, "%s (null GPU, %d) %s", what, code, code == code_of_message ? message : "");
    return text;
}

int remember(int code) {
    if (code)
        error = code;
    return code;
}

int last_error(bool forget) {
    int code = error;
    if (forget)
        error = OK;
    return code;
}

__attribute__((constructor)) static void begin(void) {
    if (getenv("NULL_GPU_TRACE"))
        null_gpu_trace(getenv("NULL_GPU_TRACE"));
}

__attribute__((destructor)) static void end(void) { null_gpu_trace(NULL); }
