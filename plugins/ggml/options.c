/* SPDX-License-Identifier: MIT */
/* Parsing TQ_GGML. Anything that is not understood is an error: an option without effect would be found out much too late. */
#include "options.h"

#include "cache/cells.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define VALUE_MAX 256                    /* bytes of what a message says of a value */
#define SEQUENCES_DEFAULT 4              /* llama-server's, which then shares a stream */
#define ITEM_MAX (TQ_GGML_PATH_MAX + 64) /* of one key=value */

typedef struct error_text {
    char *text;
    size_t bytes;
} error_text;

typedef struct option_key {
    const char *name;
    const char *value; /* what it may be, for messages */
    bool (*parse)(tq_ggml_options *options, const char *value, error_text *error);
} option_key;

static bool fail(error_text *error, const char *key, const char *value, const char *expected)
{
    snprintf(error->text, error->bytes, "TQ_GGML: %s=%s: %s", key, value, expected);
    return false;
}

static bool fail_format(error_text *error, const char *key, const char *value)
{
    char names[VALUE_MAX] = "give one of";
    for (int i = 0; i < TQ_FORMAT_COUNT; i++) {
        tq_format_info info;
        if (tq_format_describe(&info, (tq_format)i, 128) != TQ_OK) continue;
        size_t n = strlen(names);
        snprintf(names + n, sizeof names - n, "%s %s", n > strlen("give one of") ? "," : "", info.name);
    }
    return fail(error, key, value, names);
}

/* Decimal digits only; the value is at most max. Returns the end of the digits, or NULL. */
static const char *parse_number(int32_t *out, const char *text, int32_t max)
{
    int64_t number = 0;
    const char *p = text;
    for (; *p >= '0' && *p <= '9'; p++) {
        number = 10 * number + (*p - '0');
        if (number > max) return NULL;
    }
    if (p == text) return NULL;
    *out = (int32_t)number;
    return p;
}

static bool parse_whole_number(int32_t *out, const char *text, int32_t max)
{
    const char *end = parse_number(out, text, max);
    return end && *end == '\0';
}

static bool parse_k(tq_ggml_options *options, const char *value, error_text *error)
{
    options->has_k_format = true;
    return tq_format_from_name(&options->k_format, value) == TQ_OK || fail_format(error, "k", value);
}

static bool parse_v(tq_ggml_options *options, const char *value, error_text *error)
{
    options->has_v_format = true;
    return tq_format_from_name(&options->v_format, value) == TQ_OK || fail_format(error, "v", value);
}

/* Would a store take these? The library knows its limit. */
static bool exact_counts_fit(int32_t n_sink, int32_t n_recent, int32_t n_keep)
{
    tq_store_params params = {.struct_size = sizeof params, .format = TQ_FORMAT_SQ4, .n_head_kv = 1};
    params.head_dim = 64;
    params.n_slots = 1;
    params.n_sink = n_sink;
    params.n_recent = n_recent;
    params.n_keep = n_keep;
    size_t bytes;
    return tq_store_bytes(&bytes, &params) == TQ_OK;
}

/* The library's limit of sinks and recent tokens together, rounded down to a power of two. */
static int32_t max_exact_count(void)
{
    int32_t n = 1;
    while (n < INT32_MAX / 2 && exact_counts_fit(2 * n, 0, 0)) n *= 2;
    return n;
}

static bool parse_count(int32_t *out, const char *key, const char *value, error_text *error)
{
    int32_t max = max_exact_count();
    if (parse_whole_number(out, value, max)) return true;
    char expected[VALUE_MAX];
    snprintf(expected, sizeof expected, "give a count of tokens from 0 to %d", (int)max);
    return fail(error, key, value, expected);
}

static bool parse_sinks(tq_ggml_options *options, const char *value, error_text *error)
{
    options->has_n_sink = true;
    return parse_count(&options->n_sink, "sinks", value, error);
}

static bool parse_recent(tq_ggml_options *options, const char *value, error_text *error)
{
    options->has_n_recent = true;
    return parse_count(&options->n_recent, "recent", value, error);
}

static bool parse_sequences(tq_ggml_options *options, const char *value, error_text *error)
{
    options->has_n_sequences = true;
    if (parse_whole_number(&options->n_sequences, value, TQ_GGML_SEQUENCES_MAX)) return true;
    char expected[VALUE_MAX];
    snprintf(expected, sizeof expected, "give a count of sequences from 0 to %d", TQ_GGML_SEQUENCES_MAX);
    return fail(error, "sequences", value, expected);
}

/* The library knows which ones it takes. */
static bool ref_block_fits(int32_t ref_block)
{
    tq_store_params params = {.struct_size = sizeof params, .format = TQ_FORMAT_SQ4, .n_head_kv = 1};
    params.head_dim = 64;
    params.n_slots = 1;
    params.ref_block = ref_block;
    size_t bytes;
    return tq_store_bytes(&bytes, &params) == TQ_OK;
}

static bool parse_ref(tq_ggml_options *options, const char *value, error_text *error)
{
    options->has_ref_block = true;
    if (parse_whole_number(&options->ref_block, value, INT32_MAX) && ref_block_fits(options->ref_block)) return true;
    return fail(error, "ref", value, "give the number of cells that share a reference, 16 to 1024, or 0 for none");
}

static bool parse_factors(tq_ggml_options *options, const char *value, error_text *error)
{
    options->has_factors = true;
    options->factors = strcmp(value, "weights") == 0;
    return options->factors || strcmp(value, "off") == 0 || fail(error, "factors", value, "give weights or off");
}

/* LAYER[-LAYER], joined by +. */
static bool parse_exact(tq_ggml_options *options, const char *value, error_text *error)
{
    const char *p = value;
    for (;;) {
        int32_t first, last;
        p = parse_number(&first, p, TQ_GGML_LAYERS_MAX - 1);
        if (!p) break;
        last = first;
        if (*p == '-') p = parse_number(&last, p + 1, TQ_GGML_LAYERS_MAX - 1);
        if (!p || last < first) break;
        for (int32_t i = first; i <= last; i++) options->exact_layers[i / 8] |= (uint8_t)(1u << (i % 8));
        if (last > options->max_exact_layer) options->max_exact_layer = last;
        if (*p == '\0') return true;
        if (*p++ != '+') break;
    }
    return fail(error, "exact", value, "give layers counted from 0, as 0+1 or 0-3+31 (the last layers by their numbers)");
}

static bool parse_head_dim(tq_ggml_options *options, const char *value, error_text *error)
{
    int32_t n, number;
    const int32_t *list = tq_head_dim_list(&n);
    char expected[VALUE_MAX] = "give one of";
    bool is_number = parse_whole_number(&number, value, INT32_MAX);
    for (int32_t i = 0; i < n; i++) {
        if (is_number && list[i] == number) {
            options->head_dim = number;
            return true;
        }
        size_t used = strlen(expected);
        snprintf(expected + used, sizeof expected - used, "%s %d", i > 0 ? "," : "", (int)list[i]);
    }
    return fail(error, "head_dim", value, expected);
}

static bool parse_log(tq_ggml_options *options, const char *value, error_text *error)
{
    static const char *const names[] = {[TQ_LOG_ERROR] = "error", [TQ_LOG_WARNING] = "warning", [TQ_LOG_INFO] = "info"};
    for (int i = 0; i <= TQ_LOG_INFO; i++) {
        if (strcmp(value, names[i]) != 0) continue;
        options->log_level = (tq_log_level)i;
        return true;
    }
    return fail(error, "log", value, "give one of error, warning, info");
}

static bool parse_guard(tq_ggml_options *options, const char *value, error_text *error)
{
    static const char *const names[] = {[TQ_GGML_GUARD_RAISE] = "raise",
                                        [TQ_GGML_GUARD_WARN] = "warn",
                                        [TQ_GGML_GUARD_REFUSE] = "refuse",
                                        [TQ_GGML_GUARD_OFF] = "off"};
    for (int i = 0; i <= TQ_GGML_GUARD_OFF; i++) {
        if (strcmp(value, names[i]) != 0) continue;
        options->has_guard = true;
        options->guard = (tq_ggml_guard)i;
        return true;
    }
    return fail(error, "guard", value, "give one of raise, warn, refuse, off");
}

static bool parse_path(char out[TQ_GGML_PATH_MAX], const char *key, const char *value, error_text *error)
{
    size_t n = strlen(value);
    if (n == 0 || n >= TQ_GGML_PATH_MAX) return fail(error, key, value, "give a file's path");
    memcpy(out, value, n + 1);
    return true;
}

static bool parse_calibration(tq_ggml_options *options, const char *value, error_text *error)
{
    return parse_path(options->calibration, "calibration", value, error);
}

static bool parse_observe(tq_ggml_options *options, const char *value, error_text *error)
{
    return parse_path(options->observe, "observe", value, error);
}

static bool parse_capture(tq_ggml_options *options, const char *value, error_text *error)
{
    options->capture = strcmp(value, "on") == 0;
    return options->capture || strcmp(value, "off") == 0 || fail(error, "capture", value, "give on or off");
}

static bool parse_inner(tq_ggml_options *options, const char *value, error_text *error)
{
    size_t n = strlen(value);
    if (n == 0 || n >= sizeof options->inner) return fail(error, "inner", value, "give a device's name, as CUDA0");
    memcpy(options->inner, value, n + 1);
    return true;
}

static const option_key keys[] = {
    {"k", "FORMAT", parse_k},
    {"v", "FORMAT", parse_v},
    {"sinks", "N", parse_sinks},
    {"sequences", "N", parse_sequences},
    {"recent", "N", parse_recent},
    {"ref", "N", parse_ref},
    {"factors", "weights|off", parse_factors},
    {"calibration", "FILE", parse_calibration},
    {"exact", "LAYER[-LAYER][+...]", parse_exact},
    {"head_dim", "N", parse_head_dim},
    {"guard", "raise|warn|refuse|off", parse_guard},
    {"observe", "FILE", parse_observe},
    {"log", "LEVEL", parse_log},
    {"capture", "on|off", parse_capture},
    {"inner", "DEVICE", parse_inner},
};
enum { N_KEYS = sizeof keys / sizeof keys[0] };

static bool fail_key(error_text *error, const char *item)
{
    char list[VALUE_MAX] = "";
    for (int i = 0; i < N_KEYS; i++) {
        size_t n = strlen(list);
        snprintf(list + n, sizeof list - n, "%s %s=%s", i > 0 ? "," : "", keys[i].name, keys[i].value);
    }
    snprintf(error->text, error->bytes, "TQ_GGML: unknown option '%.64s'; the options are%s", item, list);
    return false;
}

/* What was asked for by these until factors came from the weights. */
static const struct {
    const char *before, *now;
} renamed[] = {{"balance=on", "factors=weights"},
               {"balance=off", "factors=off"},
               {"bias=on", "factors=weights"},
               {"bias=off", "factors=off"}};

static const char *current_name(const char *item)
{
    for (size_t i = 0; i < sizeof renamed / sizeof renamed[0]; i++) {
        if (strcmp(item, renamed[i].before) == 0) return renamed[i].now;
    }
    return item;
}

static bool parse_item(tq_ggml_options *options, const char *given, uint32_t *seen, error_text *error)
{
    const char *item = current_name(given), *equals = strchr(item, '=');
    for (int i = 0; i < N_KEYS && equals; i++) {
        size_t n = strlen(keys[i].name);
        if ((size_t)(equals - item) != n || strncmp(item, keys[i].name, n) != 0) continue;
        if (*seen >> i & 1 && item == given) return fail(error, keys[i].name, equals + 1, "the option is given twice");
        *seen |= 1u << i;
        return keys[i].parse(options, equals + 1, error);
    }
    return fail_key(error, item);
}

/* ---- options without effect ---- */

static bool is_exact_format(tq_format format)
{
    return format == TQ_FORMAT_F16 || format == TQ_FORMAT_BF16;
}

static bool has_prod_keys(const tq_ggml_options *options)
{
    return options->has_k_format && (options->k_format == TQ_FORMAT_SQ4_PROD || options->k_format == TQ_FORMAT_SQ3_PROD ||
                                     options->k_format == TQ_FORMAT_SQ2_PROD);
}

static bool has_exact_keys(const tq_ggml_options *options)
{
    return options->has_k_format && is_exact_format(options->k_format);
}

static bool has_no_ring(const tq_ggml_options *options)
{
    return options->has_n_recent && options->n_recent == 0;
}

/* Options that others leave without effect. Only a user can ask for such a pair: no preset does. */
static bool check_effects(const tq_ggml_options *o, error_text *error)
{
    bool exact_keys = has_exact_keys(o), all_exact = exact_keys && o->has_v_format && is_exact_format(o->v_format);
    const char *is_exact = "keys of the format that k= gives are kept as they are";
    const char *are_exact = "the formats that k= and v= give keep all as it is";
    const struct {
        const char *option;
        bool is_wanted, is_idle;
        const char *why;
    } pairs[] = {
        {"ref", o->ref_block > 0, exact_keys, is_exact},
        {"ref", o->ref_block > 0, has_prod_keys(o), "keys of the format that k= gives have no references"},
        {"ref", o->ref_block > 0, has_no_ring(o), "with recent=0 there are no tokens to make a reference from"},
        {"factors", o->has_factors && o->factors, exact_keys, is_exact},
        {"guard", o->has_guard && o->guard != TQ_GGML_GUARD_OFF, exact_keys, is_exact},
        {"guard", o->has_guard && o->guard != TQ_GGML_GUARD_OFF, !o->factors, "with factors=off the weights are not looked at"},
        {"factors", o->has_factors && o->factors, o->calibration[0] != '\0', "a calibration takes their place"},
        {"calibration", o->calibration[0] != '\0', exact_keys, is_exact},
        {"sinks", o->n_sink > 0, all_exact, are_exact},
        {"recent", o->n_recent > 0, all_exact, are_exact},
        {"sequences", o->has_n_sequences && o->n_sequences > 0, all_exact, are_exact},
        {"sequences", o->has_n_sequences && o->n_sequences > 0, o->has_n_sink && o->n_sink == 0,
         "with sinks=0 no first tokens are kept"},
        {"exact", o->max_exact_layer >= 0, all_exact && o->k_format == o->v_format && o->k_format == TQ_FORMAT_F16, are_exact},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        if (!pairs[i].is_wanted || !pairs[i].is_idle) continue;
        snprintf(error->text, error->bytes, "TQ_GGML: %s= has no effect: %s. Leave one of the two out", pairs[i].option,
                 pairs[i].why);
        return false;
    }
    return true;
}

int32_t tq_ggml_options_n_keep(const tq_ggml_options *options, int32_t n_sink, int32_t n_recent)
{
    int32_t n = options->n_sequences;
    while (n > 0 && !exact_counts_fit(n_sink, n_recent, n * n_sink)) n--;
    return n * n_sink;
}

/* Is there room for all sequences, whatever the preset? */
static bool sequences_fit(const tq_ggml_options *options)
{
    bool fit = true;
    for (int32_t i = 0; tq_preset_get(i); i++) {
        const tq_preset *preset = tq_preset_get(i);
        int32_t n_sink = options->has_n_sink ? options->n_sink : preset->n_sink;
        int32_t n_recent = options->has_n_recent ? options->n_recent : preset->n_recent;
        fit &= tq_ggml_options_n_keep(options, n_sink, n_recent) == options->n_sequences * n_sink;
    }
    return fit;
}

/*
 * The item that *text begins with, up to a comma or the end, without the backslash that stands before a comma or a backslash of
 * its own; *text goes behind it. False: it is too long.
 */
static bool take_item(char item[ITEM_MAX], const char **text)
{
    size_t n = 0;
    const char *p = *text;
    for (; *p && *p != ',' && n < ITEM_MAX - 1; p++) {
        if (*p == '\\' && (p[1] == ',' || p[1] == '\\')) p++;
        item[n++] = *p;
    }
    item[n] = '\0';
    *text = p;
    return *p == '\0' || *p == ',';
}

bool tq_ggml_options_parse(tq_ggml_options *out, const char *text, char *error, size_t error_bytes)
{
    error_text to = {error, error_bytes};
    tq_ggml_options options = {
        .factors = true, .capture = true, .log_level = TQ_LOG_INFO, .max_exact_layer = -1, .n_sequences = SEQUENCES_DEFAULT};
    uint32_t seen = 0;
    const char *p = text ? text : "";
    while (*p) {
        char item[ITEM_MAX];
        if (!take_item(item, &p)) return fail_key(&to, item);
        /* A comma at the end announces another option, so it counts as an empty one. */
        if (p[0] == ',' && p[1] == '\0') return fail_key(&to, "");
        if (!parse_item(&options, item, &seen, &to)) return false;
        p += *p == ',';
    }
    if (!exact_counts_fit(options.n_sink, options.n_recent, 0)) {
        snprintf(error, error_bytes, "TQ_GGML: sinks=%d and recent=%d are too many; give up to %d together",
                 (int)options.n_sink, (int)options.n_recent, (int)max_exact_count());
        return false;
    }
    if (!check_effects(&options, &to)) return false;
    if (options.has_n_sequences && !sequences_fit(&options)) {
        snprintf(error, error_bytes,
                 "TQ_GGML: sequences=%d: their first tokens and what else is exact are too many; at most %d "
                 "tokens can be exact",
                 (int)options.n_sequences, (int)max_exact_count());
        return false;
    }
    *out = options;
    return true;
}
