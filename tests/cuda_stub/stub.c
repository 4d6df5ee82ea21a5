/*
 * CUDA devices that are not there, for PyTorch's own host code to run over.
 *
 * Memory is the host's and copies are real. Kernels and library calls are counted and compute nothing. Captures
 * are held to CUDA's rules: what is launched on a capturing stream is kept as a node and carried out at each
 * replay, what is forbidden during a capture fails as it would and breaks it, and what is launched beside it is
 * counted as escaped. Launches on a stream of a device that is not current fail.
 *
 * Not simulated: time (all is done when a call returns), several captures at once, streams that never rejoin
 * the one that a capture began on, and kernels that Triton compiles: a step that wants one fails here, since it
 * would need a C compiler where it runs.
 *
 * build.py preloads this, together with a body for every other function that PyTorch's libraries want.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define __CUDA_INTERNAL_SKIP_CPP_HEADERS__
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cublasLt.h>
#include <cudnn.h>

enum { DEVICES = 2, VERSION = 13000, MAJOR = 9, MINOR = 0, WARP = 32, PROCESSORS = 132 };
static const size_t DEVICE_MEMORY = 80ull << 30;

/* ---- what is counted, and told */

#define COUNTERS(X)                                                                                         \
    X(kernels) X(library_calls) X(copies) X(fills) X(graphs) X(captures) X(nodes) X(waits) X(to_device)      \
    X(from_device) X(escaped) X(allocations)

#define AS_MEMBER(name) name,
enum counter { COUNTERS(AS_MEMBER) NUMBER_OF_COUNTERS };

#define AS_WORD(name) #name " "
const char *stub_counters(void) { return COUNTERS(AS_WORD); }

static long counts[NUMBER_OF_COUNTERS];
static char faults[1 << 16];
static size_t faults_length;
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP; /* of all state that is no thread's own */

/* Counts so far, in the order of stub_counters(); `nodes` are those of the last capture. */
void stub_counts(long *into) { memcpy(into, counts, sizeof counts); }

/* What was forbidden, or escaped a capture, a line each. */
const char *stub_faults(void) { return faults; }

void stub_forget_faults(void) { faults[faults_length = 0] = 0; }

static void count(enum counter what) { __atomic_add_fetch(&counts[what], 1, __ATOMIC_RELAXED); }

static void fault(const char *format, ...) {
    va_list values;
    va_start(values, format);
    pthread_mutex_lock(&lock);
    size_t room = sizeof faults - faults_length;
    if (room > 512) { /* else there are enough already */
        faults_length += vsnprintf(faults + faults_length, 256, format, values);
        faults_length += sprintf(faults + faults_length, "\n");
    }
    pthread_mutex_unlock(&lock);
    va_end(values);
}

/* ---- devices, streams, events */

struct stream {
    int device;
    int priority;
    bool capturing;
};

struct event {
    int device;
    unsigned long long capture; /* in which it was recorded, or 0 */
};

static __thread int current_device;
static __thread cudaError_t last_error;
static struct stream legacy[DEVICES] = {{.device = 0}, {.device = 1}};

static cudaError_t failed(cudaError_t error) { return last_error = error; }

/* The stream of a handle; the three handles that are no pointers mean the current device's default stream. */
static struct stream *stream_of(cudaStream_t handle) {
    bool is_default = handle == 0 || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
    return is_default ? &legacy[current_device] : (struct stream *)handle;
}

static cudaError_t new_stream(cudaStream_t *handle, int priority) {
    struct stream *made = calloc(1, sizeof *made);
    made->device = current_device;
    made->priority = priority;
    *handle = (cudaStream_t)made;
    return cudaSuccess;
}

/* ---- the capture under way, of which there is one at most */

enum { MOST_STREAMS = 256 };

/* Something that a graph does at each replay; a kernel does nothing. */
struct node {
    enum { NOTHING, COPY, FILL } kind;
    void *to;
    const void *from;
    size_t bytes;
    int value;
};

struct graph {
    size_t size, room;
    struct node *nodes;
};

static struct {
    bool active, broken;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    unsigned long long id;
    struct stream *streams[MOST_STREAMS];
    size_t number_of_streams;
    struct graph *graph;
} capture;

static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static bool is_captured(cudaEvent_t event) {
    return capture.active && ((struct event *)event)->capture == capture.id;
}

static void join_capture(struct stream *stream) {
    stream->capturing = true;
    if (capture.number_of_streams < MOST_STREAMS) capture.streams[capture.number_of_streams++] = stream;
}

static void add_node(struct node node) {
    struct graph *graph = capture.graph;
    if (graph->size == graph->room) {
        graph->room = graph->room ? 2 * graph->room : 256;
        graph->nodes = realloc(graph->nodes, graph->room * sizeof node);
    }
    graph->nodes[graph->size++] = node;
}

/*
 * Whether this thread may make a call that CUDA names potentially unsafe during a capture: not while it captures
 * itself, and not while another thread captures in global mode; in relaxed mode always.
 */
static bool is_forbidden(void) {
    if (!capture.active || thread_mode == cudaStreamCaptureModeRelaxed) return false;
    if (pthread_equal(capture.thread, pthread_self())) return capture.mode != cudaStreamCaptureModeRelaxed;
    return thread_mode == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal;
}

static cudaError_t break_capture(const char *call, cudaError_t error) {
    capture.broken = true;
    bool own = pthread_equal(capture.thread, pthread_self());
    fault("%s during a capture%s", call, own ? "" : " by another thread");
    return failed(error);
}

#define FORBIDDEN_IN_CAPTURE()                                                                              \
    if (is_forbidden()) return break_capture(__func__, cudaErrorStreamCaptureUnsupported)

/*
 * Count something that is launched on a stream. `now` is set where it is to be carried out at once; in a capture
 * it becomes a node.
 */
static cudaError_t launch(cudaStream_t handle, enum counter kind, const char *name, struct node node, bool *now) {
    struct stream *stream = stream_of(handle);
    *now = true;
    count(kind);
    if (stream->device != current_device) {
        fault("%s on a stream of device %d, while device %d is current", name, stream->device, current_device);
        return failed(cudaErrorInvalidResourceHandle);
    }
    pthread_mutex_lock(&lock);
    if (capture.active && stream->capturing) {
        add_node(node);
        *now = false;
    } else if (capture.active) {
        count(escaped);
        fault("%s escaped a capture", name);
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static cudaError_t launch_kernel(cudaStream_t stream, const char *name) {
    bool now;
    return launch(stream, kernels, name, (struct node){NOTHING}, &now);
}

/* Something that may wait for the device; what waits for a stream that is captured breaks the capture. */
static cudaError_t wait_for(const char *call, bool captured) {
    count(waits);
    if (captured || is_forbidden()) return break_capture(call, cudaErrorStreamCaptureUnsupported);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
    pthread_mutex_lock(&lock);
    count(captures);
    capture.id = counts[captures];
    capture.active = true;
    capture.broken = false;
    capture.mode = mode;
    capture.thread = pthread_self();
    capture.number_of_streams = 0;
    capture.graph = calloc(1, sizeof *capture.graph);
    join_capture(stream_of(handle));
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < capture.number_of_streams; i++) capture.streams[i]->capturing = false;
    capture.active = false;
    counts[nodes] = capture.graph->size;
    *graph = capture.broken ? NULL : (cudaGraph_t)capture.graph;
    pthread_mutex_unlock(&lock);
    return capture.broken ? failed(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

static enum cudaStreamCaptureStatus capture_status(cudaStream_t handle) {
    if (!stream_of(handle)->capturing) return cudaStreamCaptureStatusNone;
    return capture.broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
    *status = capture_status(handle);
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                     size_t *number) {
    *status = capture_status(handle);
    if (id) *id = capture.id;
    if (graph) *graph = (cudaGraph_t)capture.graph;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (number) *number = 0;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

/* ---- graphs: an executable one is a graph of its own */

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *into, size_t *number) {
    *number = ((struct graph *)graph)->size; /* PyTorch asks for nothing else */
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t from, unsigned long long flags) {
    struct graph *copy = malloc(sizeof *copy);
    *copy = *(struct graph *)from;
    copy->nodes = malloc(copy->size * sizeof *copy->nodes + 1);
    memcpy(copy->nodes, ((struct graph *)from)->nodes, copy->size * sizeof *copy->nodes);
    *made = (cudaGraphExec_t)copy;
    return cudaSuccess;
}

static cudaError_t destroy_graph(struct graph *graph) {
    free(graph->nodes);
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return destroy_graph((struct graph *)graph); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return destroy_graph((struct graph *)graph); }

cudaError_t cudaGraphLaunch(cudaGraphExec_t launched, cudaStream_t stream) {
    bool now;
    cudaError_t error = launch(stream, graphs, "a graph", (struct node){NOTHING}, &now);
    struct graph *graph = (struct graph *)launched;
    for (size_t i = 0; error == cudaSuccess && i < graph->size; i++) {
        struct node node = graph->nodes[i];
        if (node.kind == COPY) memmove(node.to, node.from, node.bytes);
        if (node.kind == FILL) memset(node.to, node.value, node.bytes);
    }
    return error;
}

/* ---- memory */

struct block {
    char *start;
    size_t bytes;
    int device; /* HOST for pinned memory */
};

enum { HOST = -1, MOST_BLOCKS = 1 << 16 };
static struct block blocks[MOST_BLOCKS];
static int number_of_blocks;

static cudaError_t allocate(void **into, size_t bytes, int device) {
    void *start = mmap(0, bytes + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    pthread_mutex_lock(&lock);
    bool made = start != MAP_FAILED && number_of_blocks < MOST_BLOCKS;
    if (made) blocks[number_of_blocks++] = (struct block){*into = start, bytes, device};
    pthread_mutex_unlock(&lock);
    return made ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

static cudaError_t release(void *start) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < number_of_blocks; i++)
        if (blocks[i].start == start) {
            munmap(start, blocks[i].bytes + 1);
            blocks[i] = blocks[--number_of_blocks];
            break;
        }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **into, size_t bytes) {
    FORBIDDEN_IN_CAPTURE();
    count(allocations);
    return allocate(into, bytes, current_device);
}

cudaError_t cudaFree(void *start) {
    FORBIDDEN_IN_CAPTURE();
    return release(start);
}

cudaError_t cudaMallocAsync(void **into, size_t bytes, cudaStream_t stream) {
    count(allocations);
    return allocate(into, bytes, current_device);
}

cudaError_t cudaFreeAsync(void *start, cudaStream_t stream) { return release(start); }

cudaError_t cudaHostAlloc(void **into, size_t bytes, unsigned flags) {
    FORBIDDEN_IN_CAPTURE();
    return allocate(into, bytes, HOST);
}

cudaError_t cudaFreeHost(void *start) {
    FORBIDDEN_IN_CAPTURE();
    return release(start);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = DEVICE_MEMORY;
    *free_bytes = DEVICE_MEMORY / 8 * 7;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
    memset(found, 0, sizeof *found);
    found->type = cudaMemoryTypeUnregistered;
    found->device = -1;
    found->hostPointer = (void *)pointer;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < number_of_blocks; i++) {
        struct block block = blocks[i];
        if ((char *)pointer < block.start || (char *)pointer >= block.start + block.bytes) continue;
        found->type = block.device == HOST ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
        found->device = block.device == HOST ? current_device : block.device;
        found->devicePointer = (void *)pointer;
        if (block.device != HOST) found->hostPointer = NULL;
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static void count_direction(enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyHostToDevice) count(to_device);
    if (kind == cudaMemcpyDeviceToHost) count(from_device);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    bool now;
    const char *name = kind == cudaMemcpyHostToDevice   ? "a copy to the device"
                       : kind == cudaMemcpyDeviceToHost ? "a copy from the device"
                                                        : "a copy";
    count_direction(kind);
    cudaError_t error = launch(stream, copies, name, (struct node){COPY, to, from, bytes}, &now);
    if (error == cudaSuccess && now) memmove(to, from, bytes);
    return error;
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (size_t row = 0; row < height && error == cudaSuccess; row++)
        error = cudaMemcpyAsync((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind, stream);
    return error;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    count(copies);
    count_direction(kind);
    cudaError_t error = wait_for(__func__, false);
    if (error == cudaSuccess) memmove(to, from, bytes);
    return error;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    bool now;
    cudaError_t error = launch(stream, fills, "a fill", (struct node){FILL, to, NULL, bytes, value}, &now);
    if (error == cudaSuccess && now) memset(to, value, bytes);
    return error;
}

cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    FORBIDDEN_IN_CAPTURE();
    return cudaMemsetAsync(to, value, bytes, 0);
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char variables[1 << 20]; /* nothing is computed from them */
    *address = variables;
    return cudaSuccess;
}

/* ---- streams and events; all is done already, so that nothing ever waits long */

cudaError_t cudaStreamCreate(cudaStream_t *made) { return new_stream(made, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *made, unsigned flags) { return new_stream(made, 0); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *made, unsigned flags, int priority) {
    return new_stream(made, priority);
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) {
    *priority = stream_of(handle)->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    FORBIDDEN_IN_CAPTURE();
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    return wait_for(__func__, capture.active && stream_of(handle)->capturing);
}

cudaError_t cudaDeviceSynchronize(void) { return wait_for(__func__, capture.active); }

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
    struct stream *stream = stream_of(handle);
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&lock);
    bool captured = is_captured(event);
    if (capture.active && captured && !stream->capturing) join_capture(stream);
    if (capture.active && !captured && stream->capturing) {
        fault("a capturing stream waits for an event from outside of the capture");
        capture.broken = true;
        error = failed(cudaErrorStreamCaptureIsolation);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

cudaError_t cudaEventCreate(cudaEvent_t *made) {
    struct event *event = calloc(1, sizeof *event);
    event->device = current_device;
    *made = (cudaEvent_t)event;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *made, unsigned flags) { return cudaEventCreate(made); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) {
    struct event *event = (struct event *)handle;
    struct stream *stream = stream_of(on);
    if (stream->device != event->device) {
        fault("an event of device %d recorded on a stream of device %d", event->device, stream->device);
        return failed(cudaErrorInvalidResourceHandle);
    }
    event->capture = capture.active && stream->capturing ? capture.id : 0;
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
    return cudaEventRecord(event, handle);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (is_captured(event)) return break_capture(__func__, cudaErrorCapturedEvent);
    FORBIDDEN_IN_CAPTURE();
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return wait_for(__func__, is_captured(event));
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = 1;
    return cudaSuccess;
}

/* ---- what a device says of itself */

static cudaError_t on_device(int device) {
    return device >= 0 && device < DEVICES ? cudaSuccess : failed(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int *number) {
    *number = DEVICES;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    cudaError_t error = on_device(device);
    if (error == cudaSuccess) current_device = device;
    return error;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    *found = (struct cudaDeviceProp){
        .name = "CUDA stub",
        .totalGlobalMem = DEVICE_MEMORY,
        .sharedMemPerBlock = 48 << 10,
        .sharedMemPerBlockOptin = 227 << 10,
        .sharedMemPerMultiprocessor = 228 << 10,
        .regsPerBlock = 65536,
        .regsPerMultiprocessor = 65536,
        .warpSize = WARP,
        .maxThreadsPerBlock = 1024,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535},
        .maxThreadsPerMultiProcessor = 2048,
        .maxBlocksPerMultiProcessor = 32,
        .major = MAJOR,
        .minor = MINOR,
        .multiProcessorCount = PROCESSORS,
        .l2CacheSize = 50 << 20,
        .totalConstMem = 65536,
        .textureAlignment = 512,
        .concurrentKernels = 1,
        .unifiedAddressing = 1,
        .managedMemory = 1,
        .canMapHostMemory = 1,
        .asyncEngineCount = 3,
        .memoryBusWidth = 5120,
        .pciBusID = device,
    };
    return on_device(device);
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp known;
    cudaError_t error = cudaGetDeviceProperties(&known, device);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = known.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *value = known.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = known.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = known.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = known.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = known.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = known.maxGridSize[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = known.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = known.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = known.sharedMemPerMultiprocessor; break;
    case cudaDevAttrTotalConstantMemory: *value = known.totalConstMem; break;
    case cudaDevAttrWarpSize: *value = known.warpSize; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = known.regsPerBlock; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = known.regsPerMultiprocessor; break;
    case cudaDevAttrMultiProcessorCount: *value = known.multiProcessorCount; break;
    case cudaDevAttrL2CacheSize: *value = known.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = known.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = known.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = known.minor; break;
    default: *value = 1; /* features: it has them */
    }
    return error;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device); /* same numbers */
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *into, int length, int device) {
    snprintf(into, length, "0000:%02x:00.0", device);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    static int pools[DEVICES];
    *pool = (cudaMemPool_t)&pools[device];
    return on_device(device);
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
CUresult cuDriverGetVersion(int *version) { return (CUresult)cudaDriverGetVersion(version); }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    static int contexts[DEVICES];
    *context = (CUcontext)&contexts[current_device];
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    default: return "an error that the CUDA stub does not name";
    }
}

const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

static int nothing(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
    void *own = dlsym(RTLD_DEFAULT, name);
    *function = own ? own : (void *)nothing;
    if (found) *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ---- kernels */

static __thread struct {
    dim3 grid, block;
    size_t shared_memory;
    cudaStream_t stream;
} call; /* between a launch's <<<…>>> and its function */

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, cudaStream_t stream) {
    call.grid = grid;
    call.block = block;
    call.shared_memory = shared_memory;
    call.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_memory, cudaStream_t *stream) {
    *grid = call.grid;
    *block = call.block;
    *shared_memory = call.shared_memory;
    *stream = call.stream;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared_memory,
                             cudaStream_t stream) {
    return launch_kernel(stream, "a kernel");
}

cudaError_t __cudaLaunchKernel(cudaKernel_t function, dim3 grid, dim3 block, void **arguments,
                               size_t shared_memory, cudaStream_t stream) {
    return launch_kernel(stream, "a kernel");
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                        size_t shared_memory, cudaStream_t stream) {
    return launch_kernel(stream, "a kernel");
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *function, void **arguments) {
    return launch_kernel(how->stream, "a kernel");
}

/* A kernel that PyTorch itself compiled at run time. */
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_memory, CUstream stream,
                        void **arguments, void **further) {
    return (CUresult)launch_kernel(stream, "a kernel compiled at run time");
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}

char __cudaInitModule(void **handle) { return 0; }

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    *found = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = 10 * MAJOR, .binaryVersion = 10 * MAJOR};
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size,
                                                                   size_t shared_memory, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int size,
                                                          size_t shared_memory) {
    *blocks = 2;
    return cudaSuccess;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int size,
                                                     size_t shared_memory) {
    *blocks = 2;
    return CUDA_SUCCESS;
}

/* ---- libraries: cuBLAS and cuDNN. A thread's handles stand for one stream each. */

static __thread cudaStream_t cublas_stream, cudnn_stream;

/* Called by the generated bodies of functions that compute something. */
int stub_library_call(const char *name) {
    bool now;
    cudaStream_t stream = strncmp(name, "cudnn", 5) == 0 ? cudnn_stream : cublas_stream;
    return launch(stream, library_calls, name, (struct node){NOTHING}, &now);
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    cublas_stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t found[], int *number) {
    *number = 1;
    memset(found, 0, sizeof *found);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
    bool now;
    return (cublasStatus_t)launch(stream, library_calls, __func__, (struct node){NOTHING}, &now);
}

cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
    cudnn_stream = stream;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) {
    *stream = cudnn_stream;
    return CUDNN_STATUS_SUCCESS;
}

/* Every search for a convolution's algorithm finds the second, which needs no memory. */
#define FOUND(kind)                                                                                         \
    {                                                                                                       \
        *number = 1;                                                                                        \
        memset(found, 0, sizeof *found);                                                                    \
        found->algo = (kind)1;                                                                              \
        found->determinism = CUDNN_DETERMINISTIC;                                                           \
        found->mathType = CUDNN_FMA_MATH;                                                                   \
        return CUDNN_STATUS_SUCCESS;                                                                        \
    }

#define NO_MEMORY(bytes)                                                                                    \
    {                                                                                                       \
        *bytes = 0;                                                                                         \
        return CUDNN_STATUS_SUCCESS;                                                                        \
    }

cudnnStatus_t cudnnGetConvolutionForwardAlgorithm_v7(cudnnHandle_t handle, const cudnnTensorDescriptor_t x,
                                                     const cudnnFilterDescriptor_t w,
                                                     const cudnnConvolutionDescriptor_t convolution,
                                                     const cudnnTensorDescriptor_t y, const int requested,
                                                     int *number, cudnnConvolutionFwdAlgoPerf_t *found)
FOUND(cudnnConvolutionFwdAlgo_t)

cudnnStatus_t cudnnGetConvolutionBackwardDataAlgorithm_v7(
    cudnnHandle_t handle, const cudnnFilterDescriptor_t w, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t convolution, const cudnnTensorDescriptor_t dx, const int requested,
    int *number, cudnnConvolutionBwdDataAlgoPerf_t *found)
FOUND(cudnnConvolutionBwdDataAlgo_t)

cudnnStatus_t cudnnGetConvolutionBackwardFilterAlgorithm_v7(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t convolution, const cudnnFilterDescriptor_t dw, const int requested,
    int *number, cudnnConvolutionBwdFilterAlgoPerf_t *found)
FOUND(cudnnConvolutionBwdFilterAlgo_t)

cudnnStatus_t cudnnFindConvolutionForwardAlgorithmEx(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x_layout, const void *x,
    const cudnnFilterDescriptor_t w_layout, const void *w, const cudnnConvolutionDescriptor_t convolution,
    const cudnnTensorDescriptor_t y_layout, void *y, const int requested, int *number,
    cudnnConvolutionFwdAlgoPerf_t *found, void *workspace, size_t workspace_bytes)
FOUND(cudnnConvolutionFwdAlgo_t)

cudnnStatus_t cudnnFindConvolutionBackwardDataAlgorithmEx(
    cudnnHandle_t handle, const cudnnFilterDescriptor_t w_layout, const void *w,
    const cudnnTensorDescriptor_t dy_layout, const void *dy, const cudnnConvolutionDescriptor_t convolution,
    const cudnnTensorDescriptor_t dx_layout, void *dx, const int requested, int *number,
    cudnnConvolutionBwdDataAlgoPerf_t *found, void *workspace, size_t workspace_bytes)
FOUND(cudnnConvolutionBwdDataAlgo_t)

cudnnStatus_t cudnnFindConvolutionBackwardFilterAlgorithmEx(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x_layout, const void *x,
    const cudnnTensorDescriptor_t dy_layout, const void *dy, const cudnnConvolutionDescriptor_t convolution,
    const cudnnFilterDescriptor_t dw_layout, void *dw, const int requested, int *number,
    cudnnConvolutionBwdFilterAlgoPerf_t *found, void *workspace, size_t workspace_bytes)
FOUND(cudnnConvolutionBwdFilterAlgo_t)

cudnnStatus_t cudnnGetConvolutionForwardWorkspaceSize(cudnnHandle_t handle, const cudnnTensorDescriptor_t x,
                                                      const cudnnFilterDescriptor_t w,
                                                      const cudnnConvolutionDescriptor_t convolution,
                                                      const cudnnTensorDescriptor_t y,
                                                      cudnnConvolutionFwdAlgo_t algorithm, size_t *bytes)
NO_MEMORY(bytes)

cudnnStatus_t cudnnGetConvolutionBackwardDataWorkspaceSize(
    cudnnHandle_t handle, const cudnnFilterDescriptor_t w, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t convolution, const cudnnTensorDescriptor_t dx,
    cudnnConvolutionBwdDataAlgo_t algorithm, size_t *bytes)
NO_MEMORY(bytes)

cudnnStatus_t cudnnGetConvolutionBackwardFilterWorkspaceSize(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t convolution, const cudnnFilterDescriptor_t dw,
    cudnnConvolutionBwdFilterAlgo_t algorithm, size_t *bytes)
NO_MEMORY(bytes)

cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t operations,
    const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t z, const cudnnTensorDescriptor_t y,
    const cudnnTensorDescriptor_t weights, const cudnnActivationDescriptor_t activation, size_t *bytes)
NO_MEMORY(bytes)

cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t operations,
    const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t dy,
    const cudnnTensorDescriptor_t dz, const cudnnTensorDescriptor_t dx, const cudnnTensorDescriptor_t weights,
    const cudnnActivationDescriptor_t activation, size_t *bytes)
NO_MEMORY(bytes)

cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t operations,
    const cudnnActivationDescriptor_t activation, const cudnnTensorDescriptor_t x, size_t *bytes)
NO_MEMORY(bytes)
