/* SPDX-License-Identifier: MIT */
/*
 * A host of the plug-in: runs one scenario through libllama's C API with a device of the plug-in, with the CPU's FP16 cache
 * and, for reference, with floats, and compares the next-token distributions at each check-point by their KL divergence. Then
 * saves and restores states on the device, which must come back to the byte.
 *
 *   host_test PLUGIN MODEL DEVICE... [--max-kl X] [--max-batches X] [--threads N]
 *
 * A bound X is a fraction of the divergence between unrelated check-points, so it also means something for models with random
 * weights. TQ_GGML=k=f16,v=f16 takes quantization out, and then X can be small.
 */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host.h"

enum { N_CTX_SEQ = 1024, N_SEQ = 4, N_BATCH = 256, N_PREFILL = 400, N_FRESH = 150, POINTS_MAX = 16 };

/* Lincoln at Gettysburg, 1863. */
static const char text[] =
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and "
    "dedicated "
    "to the proposition that all men are created equal. Now we are engaged in a great civil war, testing whether that nation, "
    "or "
    "any nation so conceived and so dedicated, can long endure. We are met on a great battle-field of that war. We have come "
    "to "
    "dedicate a portion of that field, as a final resting place for those who here gave their lives that that nation might "
    "live. "
    "It is altogether fitting and proper that we should do this. But, in a larger sense, we can not dedicate - we can not "
    "consecrate - we can not hallow - this ground. The brave men, living and dead, who struggled here, have consecrated it, "
    "far "
    "above our poor power to add or detract. The world will little note, nor long remember what we say here, but it can never "
    "forget what they did here. It is for us the living, rather, to be dedicated here to the unfinished work which they who "
    "fought "
    "here have thus far so nobly advanced. It is rather for us to be here dedicated to the great task remaining before us - "
    "that "
    "from these honored dead we take increased devotion to that cause for which they gave the last full measure of devotion - "
    "that "
    "we here highly resolve that these dead shall not have died in vain - that this nation, under God, shall have a new birth "
    "of "
    "freedom - and that government of the people, by the people, for the people, shall not perish from the earth.";

typedef struct host {
    struct llama_model *model;
    struct llama_context *ctx;
    llama_memory_t memory;
    int32_t n_vocab, n_tokens;
    llama_token tokens[2048]; /* the text */
} host;

typedef struct point {
    const char *name;
    float *logits;
} point;

typedef struct points {
    point list[POINTS_MAX];
    int n;
} points;

static int n_passed, n_failed;

static void check(bool ok, const char *what)
{
    if (ok) {
        n_passed++;
    } else {
        n_failed++;
        printf("FAILED: %s\n", what);
    }
}

/* ---- hosts ---- */

/* device NULL: the CPU. as_reference: float keys and values, without flash attention (which on the CPU sums up in FP16). */
static void start(host *h, const char *model_path, ggml_backend_dev_t device, bool as_reference, bool unified, int n_threads)
{
    ggml_backend_dev_t devices[] = {device, NULL};
    struct llama_model_params mp = llama_model_default_params();
    mp.devices = devices;
    mp.n_gpu_layers = device ? 999 : 0;
    mp.use_extra_bufts = false; /* llama.cpp ends on deepseek2 when it repacks weights for AMX */
    h->model = llama_model_load_from_file(model_path, mp);
    if (!h->model) die("the model does not load");
    struct llama_context_params cp = llama_context_default_params();
    cp.n_ctx = N_CTX_SEQ * N_SEQ;
    cp.n_batch = cp.n_ubatch = N_BATCH;
    cp.n_seq_max = N_SEQ;
    cp.kv_unified = unified;
    cp.n_threads = cp.n_threads_batch = n_threads;
    cp.flash_attn_type = as_reference ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_ENABLED;
    cp.type_k = cp.type_v = as_reference ? GGML_TYPE_F32 : GGML_TYPE_F16;
    h->ctx = llama_init_from_model(h->model, cp);
    if (!h->ctx) die("no context");
    h->memory = llama_get_memory(h->ctx);
    const struct llama_vocab *vocab = llama_model_get_vocab(h->model);
    h->n_vocab = llama_vocab_n_tokens(vocab);
    h->n_tokens = llama_tokenize(vocab, text, (int32_t)strlen(text), h->tokens, 2048, true, false);
    if (h->n_tokens < 100) die("the text does not tokenize");
}

static void stop(host *h)
{
    llama_free(h->ctx);
    llama_model_free(h->model);
}

/* n tokens of the text, the first at position pos of a sequence; logits after the last. */
static const float *decode(host *h, llama_seq_id seq, llama_pos pos, int n)
{
    for (int done = 0; done < n; done += N_BATCH) {
        struct llama_batch batch = llama_batch_init(N_BATCH, 0, 1);
        for (int i = done; i < n && i < done + N_BATCH; i++)
            add(&batch, h->tokens[(pos + i) % h->n_tokens], pos + i, seq, i == n - 1);
        if (llama_decode(h->ctx, batch) != 0) die("llama_decode failed");
        llama_batch_free(batch);
    }
    return llama_get_logits_ith(h->ctx, -1);
}

static void note(points *out, const host *h, const char *name, const float *logits)
{
    size_t bytes = (size_t)h->n_vocab * sizeof *logits;
    float *copy = malloc(bytes);
    if (!copy || out->n == POINTS_MAX) die("out of memory");
    memcpy(copy, logits, bytes);
    out->list[out->n++] = (point){name, copy};
}

/* ---- the scenario ---- */

static uint8_t *get_state(host *h, llama_seq_id seq, size_t *n)
{
    *n = seq < 0 ? llama_state_get_size(h->ctx) : llama_state_seq_get_size(h->ctx, seq);
    uint8_t *state = calloc(*n, 1);
    if (!state) die("out of memory");
    size_t written = seq < 0 ? llama_state_get_data(h->ctx, state, *n) : llama_state_seq_get_data(h->ctx, state, *n, seq);
    if (written == 0 || written > *n) die("a state could not be saved");
    *n = written;
    return state;
}

static void set_state(host *h, llama_seq_id seq, const uint8_t *state, size_t n)
{
    size_t used = seq < 0 ? llama_state_set_data(h->ctx, state, n) : llama_state_seq_set_data(h->ctx, state, n, seq);
    if (used == 0) die("a state could not be restored");
}

static void run_scenario(points *out, host *h)
{
    size_t n;
    note(out, h, "prefill", decode(h, 0, 0, N_PREFILL));
    note(out, h, "decode", decode(h, 0, N_PREFILL, 1));

    llama_memory_seq_cp(h->memory, 0, 1, -1, -1);
    note(out, h, "decode after seq_cp", decode(h, 1, N_PREFILL + 1, 1));

    uint8_t *state = get_state(h, 0, &n);
    set_state(h, 2, state, n);
    free(state);
    note(out, h, "decode after a sequence's state went to another", decode(h, 2, N_PREFILL + 1, 1));

    state = get_state(h, -1, &n);
    llama_memory_clear(h->memory, true);
    set_state(h, -1, state, n);
    free(state);
    note(out, h, "decode after save, clear and restore of all", decode(h, 0, N_PREFILL + 1, 1));

    note(out, h, "prefill of a fresh sequence", decode(h, 3, 0, N_FRESH));

    /* It loses its positions 20 to 79, and those after move down. */
    llama_pos end = N_FRESH;
    if (llama_memory_can_shift(h->memory) && llama_memory_seq_rm(h->memory, 3, 20, 80)) {
        llama_memory_seq_add(h->memory, 3, 80, -1, -60);
        end -= 60;
        note(out, h, "decode after a context shift", decode(h, 3, end++, 1));
    }

    struct llama_batch batch = llama_batch_init(N_BATCH, 0, 1);
    add(&batch, h->tokens[7], N_PREFILL + 2, 0, true);
    add(&batch, h->tokens[9], end, 3, true);
    if (llama_decode(h->ctx, batch) != 0) die("llama_decode failed");
    llama_batch_free(batch);
    note(out, h, "two sequences in a batch, first", llama_get_logits_ith(h->ctx, 0));
    note(out, h, "two sequences in a batch, second", llama_get_logits_ith(h->ctx, 1));
}

/* ---- comparison ---- */

/* What divergence means that nothing is right: the mean between check-points of the reference that have little in common. */
static double unrelated(const points *reference, int32_t n_vocab)
{
    double sum = 0;
    int n = 0;
    for (int i = 0; i < reference->n; i++) {
        for (int j = 0; j < reference->n; j++) {
            if (i == j) continue;
            sum += divergence(reference->list[i].logits, reference->list[j].logits, n_vocab);
            n++;
        }
    }
    return sum / n;
}

/*
 * Our divergence at a check-point may be POINT_FACTOR times the bound, but less than that of unrelated ones; the mean of all
 * must keep the bound. Both may be STOCK_FACTOR times the stock FP16 cache's, which has an error too where keys are large or
 * where experts are chosen.
 */
#define POINT_FACTOR 5.0
#define STOCK_FACTOR 3.0

static void compare(const points *reference, const points *stock, const points *ours, int32_t n_vocab, double bound)
{
    double scale = unrelated(reference, n_vocab), sum_ours = 0, sum_stock = 0;
    int n = reference->n;
    check(n == ours->n && n == stock->n, "all runs went through the same check-points");
    if (n != ours->n || n != stock->n) return;
    printf("  unrelated %.6f, bound %.6f\n", scale, bound * scale);
    for (int i = 0; i < n; i++) {
        double kl_stock = divergence(reference->list[i].logits, stock->list[i].logits, n_vocab);
        double kl = divergence(reference->list[i].logits, ours->list[i].logits, n_vocab);
        double limit = fmax(fmin(POINT_FACTOR * bound, 1) * scale, STOCK_FACTOR * kl_stock);
        printf("  ours %.6f, stock %.6f: %s\n", kl, kl_stock, reference->list[i].name);
        check(kl <= limit, reference->list[i].name); /* false for NaN too */
        sum_ours += kl;
        sum_stock += kl_stock;
    }
    check(sum_ours <= fmax(bound * scale * n, STOCK_FACTOR * sum_stock), "the mean of all check-points");
}

static void free_points(points *p)
{
    for (int i = 0; i < p->n; i++) free(p->list[i].logits);
    p->n = 0;
}

/* ---- states ---- */

/*
 * Are two states equal? With references (docs/formats.md) keys are quantized a second time when they are restored, so FP16
 * values may differ by what that costs. Without them all must be equal, but for a few vectors of the trellis formats.
 */
#define SECOND_CODING_MAX 0.1 /* root mean square of what differs, relative */
#define OTHER_VALUES_MAX 0.0005

/* Of the FP16 values from byte `first` on: how many differ, and by how much of their size. */
static size_t count_other(const uint8_t *a, const uint8_t *b, size_t n, size_t first, double *change)
{
    size_t n_other = 0;
    double error = 0, size = 0;
    for (size_t i = first; i + 1 < n; i += 2) {
        if (memcmp(a + i, b + i, 2) == 0) continue;
        ggml_fp16_t x, y;
        memcpy(&x, a + i, 2);
        memcpy(&y, b + i, 2);
        double e = (double)ggml_fp16_to_fp32(x) - (double)ggml_fp16_to_fp32(y);
        error += e * e;
        size += (double)ggml_fp16_to_fp32(x) * (double)ggml_fp16_to_fp32(x);
        n_other++;
    }
    *change = n_other > 0 ? sqrt(error / size) : 0;
    return n_other;
}

static bool same_state(const uint8_t *a, size_t n_a, const uint8_t *b, size_t n_b)
{
    const char *options = getenv("TQ_GGML");
    bool has_references = !options || !strstr(options, "ref=0");
    double change, change_odd;
    if (n_a != n_b) return false;
    size_t n_other = count_other(a, b, n_a, 0, &change);
    if (n_other > 0) printf("  %zu of %zu values differ, by %.4f of their size\n", n_other, n_a / 2, change);
    if (!has_references) return (double)n_other <= OTHER_VALUES_MAX * (double)n_a / 2;
    /* What stands before the values may have an odd length. */
    count_other(a, b, n_a, 1, &change_odd);
    return change <= SECOND_CODING_MAX || change_odd <= SECOND_CODING_MAX;
}

/* Save, clear, restore, save: the same state; for another sequence too. */
static void check_states(host *h, bool unified)
{
    size_t n1, n2, n3, n4;
    llama_memory_clear(h->memory, true);
    decode(h, 0, 0, N_PREFILL);
    uint8_t *first = get_state(h, 0, &n1);
    llama_memory_clear(h->memory, true);
    set_state(h, 0, first, n1);
    uint8_t *second = get_state(h, 0, &n2);
    check(same_state(first, n1, second, n2), "a restored sequence saves to the same bytes");

    /* In one stream with others the sequence lies elsewhere, so its keys may get other references; but only once. */
    set_state(h, 1, second, n2);
    uint8_t *third = get_state(h, 1, &n3);
    llama_memory_seq_rm(h->memory, 1, -1, -1);
    set_state(h, 1, third, n3);
    uint8_t *fourth = get_state(h, 1, &n4);
    check(same_state(third, n3, fourth, n4), "a state restored twice as another sequence saves to the same bytes");
    if (!unified) {
        /* A stream of its own has the same slots, so nothing changed on the way there and back. */
        free(fourth);
        set_state(h, 0, third, n3);
        fourth = get_state(h, 0, &n4);
        check(same_state(first, n1, fourth, n4), "a state that went to another stream and back saves to the same bytes");
    }
    free(first);
    free(second);
    free(third);
    free(fourth);

    uint8_t *all = get_state(h, -1, &n1);
    llama_memory_clear(h->memory, true);
    set_state(h, -1, all, n1);
    uint8_t *again = get_state(h, -1, &n2);
    llama_memory_clear(h->memory, true);
    set_state(h, -1, again, n2);
    uint8_t *more = get_state(h, -1, &n3);
    check(same_state(again, n2, more, n3), "the whole state, restored twice, saves to the same bytes");
    free(all);
    free(again);
    free(more);
}

/*
 * A batch gives what its tokens give one by one: the attention of all layers sees the same exact tokens, also where layers
 * share keys and values. The host's sums differ a little between the two, and so does a code here or there.
 */
static void check_batches(host *h, double limit)
{
    enum { STEP = 16 };
    points together = {0};
    llama_memory_clear(h->memory, true);
    struct llama_batch batch = llama_batch_init(N_BATCH, 0, 1);
    for (int i = 0; i < N_BATCH; i++) add(&batch, h->tokens[i % h->n_tokens], i, 0, i % STEP == 0);
    if (llama_decode(h->ctx, batch) != 0) die("llama_decode failed");
    llama_batch_free(batch);
    for (int i = 0; i < N_BATCH; i += STEP) note(&together, h, "in a batch", llama_get_logits_ith(h->ctx, i));
    llama_memory_clear(h->memory, true);
    double sum = 0;
    for (int i = 0; i < N_BATCH; i++) {
        const float *logits = decode(h, 0, i, 1);
        if (i % STEP == 0) sum += divergence(together.list[i / STEP].logits, logits, h->n_vocab);
    }
    sum /= together.n;
    printf("  a batch differs from its tokens one by one by %.6f\n", sum);
    check(sum <= limit, "a batch gives what its tokens give one by one");
    free_points(&together);
}

/* A state with a NaN among its values: its sequence gets NaN, another one in the same batch does not. Clearing repairs it. */
static void check_damaged_state(host *h)
{
    size_t n;
    llama_memory_clear(h->memory, true);
    decode(h, 0, 0, N_FRESH);
    uint8_t *state = get_state(h, 0, &n);
    memset(state + n - 2, 0xff, 2); /* the last FP16 of the last layer, as there is one stream */
    set_state(h, 0, state, n);
    free(state);
    decode(h, 1, 0, N_FRESH);
    printf("  (an error about a state follows, as it should)\n");
    fflush(stdout);
    struct llama_batch batch = llama_batch_init(2, 0, 1);
    for (llama_seq_id seq = 0; seq < 2; seq++) add(&batch, h->tokens[N_FRESH], N_FRESH, seq, true);
    if (llama_decode(h->ctx, batch) != 0) die("llama_decode failed");
    llama_batch_free(batch);
    check(isnan(llama_get_logits_ith(h->ctx, 0)[0]), "a sequence restored with NaN gets NaN");
    check(isfinite(llama_get_logits_ith(h->ctx, 1)[0]), "another one does not");
    llama_memory_clear(h->memory, true);
    check(isfinite(decode(h, 0, 0, N_FRESH)[0]), "a cleared cache works again");
}

static double default_bound(const char *device)
{
    static const struct {
        const char *device;
        double bound;
    } bounds[] = {{"TQ6", 0.03}, {"TQ4", 0.05}, {"TQ3", 0.1}, {"TQ2", 0.2}};
    for (size_t i = 0; i < sizeof bounds / sizeof bounds[0]; i++) {
        /* TQ4-CUDA0 is of the same preset. */
        if (strncmp(device, bounds[i].device, strlen(bounds[i].device)) == 0) return bounds[i].bound;
    }
    return 0;
}

static double max_batches; /* 0: that is not compared */

/* One device at a time, and what to compare it with. */
static void test_device(const char *model_path, const char *name, double bound, const points *reference, const points *stock,
                        bool unified, int n_threads)
{
    ggml_backend_dev_t device = ggml_backend_dev_by_name(name);
    if (!device) die("there is no such device");
    host h;
    points ours = {0};
    printf("%s, kv_unified %d, KL divergence from the CPU with float keys and values:\n", name, unified);
    start(&h, model_path, device, false, unified, n_threads);
    run_scenario(&ours, &h);
    compare(reference, stock, &ours, h.n_vocab, bound);
    if (max_batches > 0) check_batches(&h, max_batches * unrelated(reference, h.n_vocab));
    check_states(&h, unified);
    if (unified) check_damaged_state(&h);
    stop(&h);
    free_points(&ours);
}

static void run_cpu(points *out, const char *model_path, bool as_reference, bool unified, int n_threads)
{
    host h;
    start(&h, model_path, NULL, as_reference, unified, n_threads);
    run_scenario(out, &h);
    stop(&h);
}

int main(int argc, char **argv)
{
    double max_kl = 0;
    int n_threads = 2, n_names = argc - 3;
    for (; n_names >= 2 && strncmp(argv[n_names + 1], "--", 2) == 0; n_names -= 2) {
        if (strcmp(argv[n_names + 1], "--max-kl") == 0)
            max_kl = atof(argv[n_names + 2]);
        else if (strcmp(argv[n_names + 1], "--threads") == 0)
            n_threads = atoi(argv[n_names + 2]);
        else if (strcmp(argv[n_names + 1], "--max-batches") == 0)
            max_batches = atof(argv[n_names + 2]);
        else
            die("unknown option");
    }
    if (n_names < 1) die("usage: host_test PLUGIN MODEL DEVICE... [--max-kl X] [--max-batches X] [--threads N]");
    llama_log_set(log_errors, NULL);
    llama_backend_init();
    if (!ggml_backend_load(argv[1])) die("the plug-in does not load");
    for (int unified = 0; unified < 2; unified++) {
        points reference = {0}, stock = {0};
        run_cpu(&reference, argv[2], true, unified, n_threads);
        run_cpu(&stock, argv[2], false, unified, n_threads);
        for (int i = 0; i < n_names; i++) {
            const char *name = argv[3 + i];
            test_device(argv[2], name, max_kl > 0 ? max_kl : default_bound(name), &reference, &stock, unified, n_threads);
        }
        free_points(&reference);
        free_points(&stock);
    }
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed != 0;
}
