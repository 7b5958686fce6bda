/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE /* sysconf's number of processors */

#include "factors.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cpu_ops.h"
#include "log.h"

#define TWO_PI 6.283185307179586
/* Vectors that are projected: a pair's energy comes out to some 10 %, its factor to a quarter of that. */
#define N_PROBE 64
#define THREADS_MAX 4
/* Operations between a projection and attention. */
#define OPS_MAX 24

/* ---- the graph ---- */

/* How queries or keys are made: op[0] takes what the product gives, each next one what the one before gives. */
typedef struct chain {
    const struct ggml_tensor *product, *rope; /* rope: NULL where keys and queries do not turn */
    const struct ggml_tensor *op[OPS_MAX];    /* before RoPE */
    int32_t n;
    float scale; /* behind it */
} chain;

static bool is_leaf(const struct ggml_tensor *t)
{
    return t && t->op == tq_ggml_ops.none;
}

static bool is_known_rope(const struct ggml_tensor *t)
{
    int32_t n_dims = t->op_params[1], mode = t->op_params[2];
    bool is_known_mode = mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX || mode == GGML_ROPE_TYPE_MROPE ||
                         mode == GGML_ROPE_TYPE_IMROPE;
    return is_known_mode && n_dims > 0 && n_dims % 2 == 0 && n_dims <= t->ne[0];
}

static bool is_known_op(const struct ggml_tensor *t)
{
    const tq_ggml_op_numbers *ops = &tq_ggml_ops;
    const enum ggml_op known[] = {ops->reshape, ops->view, ops->cont, ops->permute, ops->cpy,      ops->scale,
                                  ops->clamp,   ops->add,  ops->mul,  ops->norm,    ops->rms_norm, ops->l2_norm};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (t->op == known[i]) return true;
    }
    return false;
}

static float scale_of(const struct ggml_tensor *t)
{
    float scale = 1;
    if (t->op == tq_ggml_ops.scale) memcpy(&scale, t->op_params, sizeof scale);
    return scale;
}

/* Follow a tensor back to the weight that projects it. Operations are kept in the order in which they are done. */
static bool follow(chain *out, const struct ggml_tensor *t)
{
    chain c = {.scale = 1};
    for (; t && t->op != tq_ggml_ops.mul_mat; t = t->src[0]) {
        if (t->op == tq_ggml_ops.rope && !c.rope && is_known_rope(t)) {
            c.rope = t;
            for (int32_t i = 0; i < c.n; i++) c.scale *= scale_of(c.op[i]);
            c.n = 0; /* but for scales, what comes behind it changes all channels alike, or hardly */
        } else if (is_known_op(t) && c.n < OPS_MAX) {
            c.op[c.n++] = t;
        } else {
            return false;
        }
    }
    if (!t || !is_leaf(t->src[0]) || t->ne[2] != 1 || t->ne[3] != 1) return false;
    c.product = t;
    for (int32_t i = 0; i < c.n / 2; i++) {
        const struct ggml_tensor *last = c.op[c.n - 1 - i];
        c.op[c.n - 1 - i] = c.op[i];
        c.op[i] = last;
    }
    *out = c;
    return true;
}

/* What an engine fills for each batch, as scales by position: no weight. */
static bool is_input(const struct ggml_tensor *t)
{
    return (t->flags & GGML_TENSOR_FLAG_INPUT) != 0;
}

/* Copies of weights that a device holds, until the probe that reads them has ended. */
typedef struct weight_copies {
    void *list[4 * OPS_MAX];
    int32_t n;
} weight_copies;

/* A weight's n floats, or NULL if it is no weight, or can't be read. */
static const float *read_weight(const struct ggml_tensor *t, weight_copies *copies, int64_t *n)
{
    if (!is_leaf(t) || is_input(t) || t->type != GGML_TYPE_F32 || !t->data || !t->buffer || t->view_src) return NULL;
    if (copies->n == (int32_t)(sizeof copies->list / sizeof copies->list[0])) return NULL;
    *n = tq_ggml_host.ggml_nelements(t);
    return tq_ggml_host_bytes(t, &copies->list[copies->n++]);
}

/* ---- probes ---- */

/* Rows [N_PROBE, width]. */
typedef struct rows {
    float *x;
    int64_t width;
} rows;

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u); /* splitmix64 */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void multiply_by(rows *r, const float *weight, int64_t n)
{
    for (int64_t i = 0; i < N_PROBE * r->width; i++) r->x[i] *= weight[i % r->width % n];
}

static void add_to(rows *r, const float *weight, int64_t n)
{
    for (int64_t i = 0; i < N_PROBE * r->width; i++) r->x[i] += weight[i % r->width % n];
}

/* The input of a product as a norm makes it: random signs, times the norm's weight and plus its bias. */
static void fill_input(rows *r, const struct ggml_tensor *input, weight_copies *copies)
{
    uint64_t state = 1;
    for (int64_t i = 0; i < N_PROBE * r->width; i++) r->x[i] = next_random(&state) >> 63 ? 1.0f : -1.0f;
    int64_t n = 0, n_bias = 0;
    const float *bias = input->op == tq_ggml_ops.add ? read_weight(input->src[1], copies, &n_bias) : NULL;
    if (bias && n_bias == r->width) input = input->src[0];
    const float *weight = input->op == tq_ggml_ops.mul ? read_weight(input->src[1], copies, &n) : NULL;
    if (weight && n == r->width) multiply_by(r, weight, n);
    if (bias && n_bias == r->width) add_to(r, bias, n_bias);
}

/* Norms are of blocks of n values. */
static void normalize(rows *r, const struct ggml_tensor *t)
{
    int64_t n = t->ne[0];
    for (float *x = r->x; x < r->x + N_PROBE * r->width; x += n) {
        double mean = 0, square = 0;
        for (int64_t j = 0; t->op == tq_ggml_ops.norm && j < n; j++) mean += (double)x[j] / (double)n;
        for (int64_t j = 0; j < n; j++) {
            x[j] -= (float)mean;
            square += (double)x[j] * (double)x[j];
        }
        double factor = square > 0 ? 1 / sqrt(t->op == tq_ggml_ops.l2_norm ? square : square / (double)n) : 0;
        for (int64_t j = 0; j < n; j++) x[j] *= (float)factor;
    }
}

/* Keep of each row what a view has of it: ne[1] pieces of ne[0] values. */
static bool select_part(rows *r, const struct ggml_tensor *view, int64_t n_token)
{
    int64_t width = tq_ggml_host.ggml_nelements(view) / n_token, piece = view->ne[0];
    int64_t n = width / piece, first = (int64_t)(view->view_offs / sizeof(float));
    int64_t stride = n > 1 ? (int64_t)(view->nb[1] / sizeof(float)) : 0;
    if (piece * n != width || (n > 1 && n != view->ne[1]) || first + (n - 1) * stride + piece > r->width) return false;
    for (int64_t i = 0; i < N_PROBE; i++) {
        for (int64_t j = 0; j < n; j++)
            memmove(r->x + i * width + j * piece, r->x + i * r->width + first + j * stride, (size_t)piece * sizeof *r->x);
    }
    r->width = width;
    return true;
}

static bool is_view(const struct ggml_tensor *t)
{
    return t->op == tq_ggml_ops.reshape || t->op == tq_ggml_ops.view || t->op == tq_ggml_ops.permute;
}

/*
 * What the graph does to a product before RoPE. Sums with what is computed are adapters', which are left out. False where a
 * weight can't be read: without it factors would be of another model.
 */
static bool apply(rows *r, const chain *c, weight_copies *copies)
{
    bool is_part = false; /* of what was computed last */
    for (int32_t i = 0; i < c->n; i++) {
        const struct ggml_tensor *t = c->op[i];
        if (is_view(t)) {
            if (tq_ggml_host.ggml_nelements(t) == r->width * c->product->ne[1]) continue;
            if (is_part || !select_part(r, t, c->product->ne[1])) return false;
            is_part = true;
            continue;
        }
        is_part = false;
        int64_t n = 0;
        bool has_weight = (t->op == tq_ggml_ops.add || t->op == tq_ggml_ops.mul) && is_leaf(t->src[1]) && !is_input(t->src[1]);
        const float *weight = has_weight ? read_weight(t->src[1], copies, &n) : NULL;
        if (has_weight && (!weight || r->width % n != 0)) return false;
        if (weight && t->op == tq_ggml_ops.add) add_to(r, weight, n);
        if (weight && t->op == tq_ggml_ops.mul) multiply_by(r, weight, n);
        float scale = scale_of(t);
        if (scale != 1) multiply_by(r, &scale, 1);
        if (t->op == tq_ggml_ops.norm || t->op == tq_ggml_ops.rms_norm || t->op == tq_ggml_ops.l2_norm) {
            if (r->width % t->ne[0] != 0) return false;
            normalize(r, t);
        }
    }
    return true;
}

static int n_threads(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n < THREADS_MAX ? (int)n : THREADS_MAX;
}

/* Mean squares, and means where they are wanted, of `width` channels. */
static bool probe(const chain *c, int64_t width, float *squares, float *means)
{
    struct ggml_tensor *weight = c->product->src[0];
    rows in = {.width = weight->ne[0]}, out = {.width = weight->ne[1]};
    if (!weight->data || !weight->buffer) return false;
    in.x = malloc((size_t)(N_PROBE * in.width) * sizeof *in.x);
    out.x = malloc((size_t)(N_PROBE * out.width) * sizeof *out.x);
    ggml_backend_t cpu = in.x && out.x ? tq_ggml_cpu_start(n_threads()) : NULL;
    bool ok = cpu != NULL;
    weight_copies copies = {.n = 0};
    if (ok) fill_input(&in, c->product->src[1], &copies);
    ok = ok && tq_ggml_cpu_multiply(cpu, weight, in.x, N_PROBE, out.x) && apply(&out, c, &copies) && out.width == width;
    for (int64_t j = 0; ok && j < width; j++) {
        double square = 0, mean = 0;
        for (int64_t i = 0; i < N_PROBE; i++) {
            double x = (double)out.x[i * width + j];
            square += x * x / N_PROBE;
            mean += x / N_PROBE;
        }
        squares[j] = (float)square;
        if (means) means[j] = (float)mean;
    }
    for (int32_t i = 0; i < copies.n; i++) free(copies.list[i]);
    if (cpu) tq_ggml_host.ggml_backend_free(cpu);
    free(in.x);
    free(out.x);
    return ok;
}

/* ---- RoPE ---- */

/* Each position is a few times the one before, so that what is known of an angle tells its whole turns. */
static const int32_t probe_positions[] = {1, 16, 256, 4096};
enum { N_POSITIONS = sizeof probe_positions / sizeof probe_positions[0] };

static void pair_of(const struct ggml_tensor *rope, int32_t i, int32_t *first, int32_t *second)
{
    bool is_interleaved = rope->op_params[2] == GGML_ROPE_TYPE_NORMAL;
    *first = is_interleaved ? 2 * i : i;
    *second = is_interleaved ? 2 * i + 1 : i + rope->op_params[1] / 2;
}

/* What RoPE does to each channel, measured on vectors that are 1 in the first of each pair. */
static bool measure(const struct ggml_tensor *rope, int32_t *partners, double *angles)
{
    int32_t n_pairs = rope->op_params[1] / 2, first, second, pos[N_POSITIONS];
    size_t head_dim = (size_t)rope->ne[0], n = (size_t)n_pairs * head_dim;
    for (int32_t j = 0; j < rope->ne[0]; j++) {
        partners[j] = j;
        angles[j] = 0;
    }
    float *x = calloc(N_POSITIONS * n, sizeof *x);
    ggml_backend_t cpu = x ? tq_ggml_cpu_start(1) : NULL;
    for (size_t i = 0; x && i < N_POSITIONS * (size_t)n_pairs; i++) {
        pair_of(rope, (int32_t)(i % (size_t)n_pairs), &first, &second);
        x[i * head_dim + (size_t)first] = 1.0f;
    }
    memcpy(pos, probe_positions, sizeof pos);
    bool ok = cpu && tq_ggml_cpu_rope(cpu, rope, x, (int64_t)head_dim, n_pairs, pos, N_POSITIONS) == GGML_STATUS_SUCCESS;
    for (int32_t i = 0; ok && i < n_pairs; i++) {
        pair_of(rope, i, &first, &second);
        double angle = 0;
        for (size_t j = 0; j < N_POSITIONS; j++) {
            const float *y = x + j * n + (size_t)i * head_dim;
            double measured = atan2((double)y[second], (double)y[first]), position = probe_positions[j];
            angle = (measured + TWO_PI * rint((angle * position - measured) / TWO_PI)) / position;
        }
        ok = isfinite(angle);
        partners[first] = second;
        partners[second] = first;
        angles[first] = angles[second] = angle;
    }
    if (cpu) tq_ggml_host.ggml_backend_free(cpu);
    free(x);
    return ok;
}

/* ---- layers ---- */

static tq_ggml_key_energies *allocate(int64_t n_embd, int64_t head_dim)
{
    tq_ggml_key_energies *energies = calloc(1, sizeof *energies);
    if (!energies) return NULL;
    energies->head_dim = (int32_t)head_dim;
    energies->squares = malloc((size_t)n_embd * sizeof *energies->squares);
    energies->means = malloc((size_t)n_embd * sizeof *energies->means);
    energies->partners = malloc((size_t)(head_dim + 1) * sizeof *energies->partners);
    energies->angles = malloc((size_t)(head_dim + 1) * sizeof *energies->angles);
    if (energies->squares && energies->means && energies->partners && energies->angles) return energies;
    tq_ggml_key_energies_free(energies);
    return NULL;
}

void tq_ggml_key_energies_free(tq_ggml_key_energies *energies)
{
    if (!energies) return;
    free(energies->squares);
    free(energies->means);
    free(energies->partners);
    free(energies->angles);
    free(energies);
}

void tq_ggml_factors_look(tq_ggml_kv_tensor *kv, const struct ggml_tensor *set_rows)
{
    chain c;
    if (kv->energies || kv->head_dim != 0 || !follow(&c, set_rows->src[0])) return;
    tq_ggml_key_energies *energies = allocate(kv->n_embd, c.rope ? c.rope->ne[0] : 0);
    if (energies && probe(&c, kv->n_embd, energies->squares, energies->means) &&
        (!c.rope || measure(c.rope, energies->partners, energies->angles))) {
        kv->energies = energies;
        return;
    }
    tq_ggml_key_energies_free(energies);
}

bool tq_ggml_factors_find(int8_t *factors, float *spread, const tq_ggml_kv_tensor *kv, int32_t head_dim,
                          const struct ggml_tensor *q)
{
    chain c;
    const tq_ggml_key_energies *energies = kv->energies;
    if (!energies || (energies->head_dim != 0 && energies->head_dim != head_dim) || !follow(&c, q)) return false;
    tq_key_factors_params params = {.struct_size = sizeof params};
    params.n_head = (int32_t)q->ne[2];
    params.n_head_kv = (int32_t)(kv->n_embd / head_dim);
    params.head_dim = head_dim;
    params.k_square = energies->squares;
    params.k_mean = energies->means;
    params.partners = energies->head_dim ? energies->partners : NULL;
    params.angles = energies->head_dim ? energies->angles : NULL;
    params.ref_block = kv->device->preset.n_recent > 0 ? kv->device->preset.k_ref_block : 0;
    float *squares = malloc((size_t)(params.n_head * head_dim) * sizeof *squares);
    bool ok = squares && probe(&c, (int64_t)params.n_head * head_dim, squares, NULL);
    params.q_square = squares;
    ok = ok && tq_key_factors(factors, spread, &params) == TQ_OK;
    if (ok) *spread *= c.scale;
    free(squares);
    return ok;
}
