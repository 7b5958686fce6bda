/* SPDX-License-Identifier: MIT */
/*
 * Fuzz target: what llama.cpp does to a KV buffer of the plug-in when it saves and restores states, with bytes of anybody's
 * making: set, get, fill, copy of streams and clear at any offset and size. At the end, a state that is restored into an empty
 * cache must save to the same bytes. There is no ggml here: the few functions that the buffer needs are below.
 */
#include "standalone.h"

#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "buffer.h"
#include "log.h"

#define ENSURE(condition) \
    if (!(condition)) abort()

enum { HEAD_DIM = 64, N_EMBD = 2 * HEAD_DIM, N_SLOTS = 11, N_STREAM = 3, N_VALUES = N_EMBD * N_SLOTS * N_STREAM };
enum { N_BYTES = N_VALUES * 2, STREAM_BYTES = N_EMBD * N_SLOTS * 2 };

static void fp16_to_fp32(const ggml_fp16_t *x, float *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = tq_half_to_float(x[i]);
}

static void fp32_to_fp16(const float *x, ggml_fp16_t *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = tq_half_from_float(x[i]);
}

static ggml_backend_buffer_t buffer_init(ggml_backend_buffer_type_t buft, struct ggml_backend_buffer_i iface, void *context,
                                         size_t size)
{
    ggml_backend_buffer_t buffer = calloc(1, sizeof *buffer);
    ENSURE(buffer);
    buffer->iface = iface;
    buffer->buft = buft;
    buffer->context = context;
    buffer->size = size;
    return buffer;
}

static size_t nbytes(const struct ggml_tensor *t)
{
    return (size_t)(t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]) * 2;
}

typedef struct fixture {
    ggml_backend_buffer_t buffer;
    struct ggml_tensor root, streams[N_STREAM];
} fixture;

static void set_shape(struct ggml_tensor *t, int64_t ne0, int64_t ne1, int64_t ne2)
{
    t->type = GGML_TYPE_F16;
    t->ne[0] = ne0;
    t->ne[1] = ne1;
    t->ne[2] = ne2;
    t->ne[3] = 1;
    t->nb[0] = 2;
    for (int i = 1; i < 4; i++) t->nb[i] = t->nb[i - 1] * (size_t)t->ne[i - 1];
}

static void make_fixture(fixture *f, tq_ggml_device *device)
{
    memset(f, 0, sizeof *f);
    f->buffer = device->host_buft.iface.alloc_buffer(&device->host_buft, N_BYTES);
    ENSURE(f->buffer);
    set_shape(&f->root, N_EMBD, N_SLOTS, N_STREAM);
    strcpy(f->root.name, "cache_k_l0");
    f->root.buffer = f->buffer;
    ENSURE(f->buffer->iface.init_tensor(f->buffer, &f->root) == GGML_STATUS_SUCCESS);
    for (int i = 0; i < N_STREAM; i++) {
        set_shape(&f->streams[i], N_EMBD, N_SLOTS, 1);
        f->streams[i].buffer = f->buffer;
        f->streams[i].view_src = &f->root;
        f->streams[i].view_offs = (size_t)i * STREAM_BYTES;
    }
    /* The view that attention takes, which binds the tensor. */
    struct ggml_tensor view = f->streams[0];
    view.ne[0] = HEAD_DIM;
    view.ne[2] = N_EMBD / HEAD_DIM;
    view.nb[1] = N_EMBD * 2;
    view.nb[2] = HEAD_DIM * 2;
    char why[128];
    tq_ggml_kv_view ignored;
    ENSURE(tq_ggml_kv_attend_view(&ignored, f->root.extra, &view, NULL, false, why, sizeof why));
}

static void free_fixture(fixture *f)
{
    f->buffer->iface.free_buffer(f->buffer);
    free(f->buffer);
}

static uint32_t take(const uint8_t **data, size_t *size, size_t n_bytes)
{
    uint32_t value = 0;
    for (size_t i = 0; i<n_bytes && * size> 0; i++, (*data)++, (*size)--) value = value << 8 | **data;
    return value;
}

/* Fill with the input's bytes, again and again. Every eighth fill is left raw; else magnitudes are tamed, to have few
 * infinities. */
static void fill(uint8_t *out, size_t n, const uint8_t *data, size_t size, uint32_t kind)
{
    for (size_t i = 0; i < n; i++) {
        out[i] = size ? data[i % size] : (uint8_t)i;
        if (kind % 8 != 0 && i % 2 == 1) out[i] &= 0xbf;
    }
}

static void run_operation(fixture *f, const uint8_t **data, size_t *size)
{
    static uint8_t bytes[N_BYTES];
    ggml_backend_buffer_t buffer = f->buffer;
    uint32_t what = take(data, size, 1);
    int i = (int)(what / 8 % (N_STREAM + 1));
    struct ggml_tensor *t = i < N_STREAM ? &f->streams[i] : &f->root;
    size_t all = nbytes(t), offset = take(data, size, 2) % all, n = take(data, size, 2) % (all - offset + 1);
    if (what & 128) { /* whole rows, as states have them */
        offset -= offset % (N_EMBD * 2);
        n -= n % (N_EMBD * 2);
    }
    switch (what % 8) {
    case 0:
    case 1:
    case 2:
    case 3:
        fill(bytes, n, *data, *size, what / 32);
        if (n) buffer->iface.set_tensor(buffer, t, bytes, offset, n);
        break;
    case 4:
        if (n) buffer->iface.get_tensor(buffer, t, bytes, offset, n);
        break;
    case 5:
        if (n) buffer->iface.memset_tensor(buffer, t, (uint8_t)take(data, size, 1), offset, n);
        break;
    case 6:
        buffer->iface.cpy_tensor(buffer, &f->streams[what / 32 % N_STREAM], &f->streams[i % N_STREAM]);
        break;
    default:
        buffer->iface.clear(buffer, 0);
    }
}

/*
 * Is the largest value of each head vector from 1/16 to 8192, or 0? Below, what is decoded rounds to subnormals; above, norms
 * and decoded values are cut off.
 */
static bool is_moderate(const uint8_t *state)
{
    for (int first = 0; first < N_BYTES; first += 2 * HEAD_DIM) {
        int largest = 0;
        for (int i = first; i < first + 2 * HEAD_DIM; i += 2) {
            int magnitude = state[i] | (state[i + 1] & 0x7f) << 8;
            if (magnitude > largest) largest = magnitude;
        }
        if (largest != 0 && (largest < 0x2c00 || largest >= 0x7000)) return false;
    }
    return true;
}

/* Equal values. A value that rounds to zero may be either zero. */
static bool is_equal(const uint8_t *a, const uint8_t *b)
{
    for (int i = 0; i < N_BYTES; i += 2) {
        bool zeros = (a[i] | b[i] | ((a[i + 1] | b[i + 1]) & 0x7f)) == 0;
        if (!zeros && (a[i] != b[i] || a[i + 1] != b[i + 1])) return false;
    }
    return true;
}

static int64_t count_marks(const tq_ggml_kv_tensor *kv)
{
    int64_t n = 0;
    for (int64_t i = 0; i < N_SLOTS * N_STREAM; i++) n += kv->damaged[i];
    return n;
}

static void check_restore(fixture *f)
{
    static uint8_t first[N_BYTES], second[N_BYTES], third[N_BYTES];
    ggml_backend_buffer_t buffer = f->buffer;
    const tq_ggml_kv_tensor *kv = f->root.extra;
    int64_t n_damaged = kv->n_damaged;
    ENSURE(n_damaged == count_marks(kv));
    buffer->iface.get_tensor(buffer, &f->root, first, 0, N_BYTES);
    uint8_t *states[] = {first, second, third};
    for (int i = 0; i < 2; i++) {
        buffer->iface.clear(buffer, 0);
        buffer->iface.set_tensor(buffer, &f->root, states[i], 0, N_BYTES);
        buffer->iface.get_tensor(buffer, &f->root, states[i + 1], 0, N_BYTES);
    }
    ENSURE(kv->n_damaged == n_damaged && n_damaged == count_marks(kv));
    /* References are made again of what is restored, so that keys may round otherwise. The product formats,
     * which are there for comparison, have a sketch of the rest that changes with each encoding. */
    const tq_preset *preset = &kv->device->preset;
    if (preset->k_ref_block == 0 && preset->k_format < TQ_FORMAT_SQ4_PROD && is_moderate(first))
        ENSURE(is_equal(second, third));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static tq_ggml_device device;
    static tq_ggml_options options;
    uint32_t kind = take(&data, &size, 1);
    char error[256], text[64];
    static const char *const formats[] = {"f16", "bf16", "sq8", "sq4", "sq3", "sq2", "sq4_prod", "sq2_prod", "tt4", "tt2"};
    const char *format = formats[kind % 10];
    uint32_t n_recent = kind / 32 * 2;
    /* Which is refused where it would have no effect. */
    bool may_learn = n_recent > 0 && !strstr(format, "f16") && !strstr(format, "_prod");
    snprintf(text, sizeof text, "k=%s,sinks=%u,recent=%u,%s", format, (unsigned)(kind / 10 % 3), (unsigned)n_recent,
             kind % 4 == 0 && may_learn ? "ref=16" : "ref=0");
    ENSURE(tq_ggml_options_parse(&options, text, error, sizeof error));
    tq_ggml_log_set_level(-1);
    tq_ggml_host.ggml_fp16_to_fp32_row = fp16_to_fp32;
    tq_ggml_host.ggml_fp32_to_fp16_row = fp32_to_fp16;
    tq_ggml_host.ggml_backend_buffer_init = buffer_init;
    tq_ggml_host.ggml_nbytes = nbytes;
    ENSURE(tq_ggml_device_init(&device, tq_preset_get(0), &options, NULL) == TQ_OK);
    fixture f;
    make_fixture(&f, &device);
    while (size > 0) run_operation(&f, &data, &size);
    check_restore(&f);
    free_fixture(&f);
    return 0;
}
