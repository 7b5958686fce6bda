/* SPDX-License-Identifier: MIT */
/* Fuzz target: the plug-in's environment variable TQ_GGML. Any text is understood in full or refused with a reason. */
#include "standalone.h"

#include <stdlib.h>
#include <string.h>

#include "cache/cells.h"
#include "options.h"

#define ENSURE(condition) \
    if (!(condition)) abort()

static void check_options(const tq_ggml_options *options)
{
    tq_format_info info;
    ENSURE(!options->has_k_format || tq_format_describe(&info, options->k_format, 128) == TQ_OK);
    ENSURE(!options->has_v_format || tq_format_describe(&info, options->v_format, 128) == TQ_OK);
    ENSURE(options->n_sink >= 0 && options->n_recent >= 0);
    tq_store_params params = {.struct_size = sizeof params, .format = TQ_FORMAT_SQ4, .n_head_kv = 1};
    params.head_dim = options->head_dim ? options->head_dim : 64;
    params.n_slots = 1;
    params.n_sink = options->n_sink;
    params.n_recent = options->n_recent;
    params.n_keep = tq_ggml_options_n_keep(options, options->n_sink, options->n_recent);
    ENSURE(params.n_keep <= options->n_sequences * options->n_sink);
    size_t bytes;
    ENSURE(tq_store_bytes(&bytes, &params) == TQ_OK);
    ENSURE(options->log_level >= TQ_LOG_ERROR && options->log_level <= TQ_LOG_INFO);
    int32_t last = -1;
    for (int32_t i = 0; i < TQ_GGML_LAYERS_MAX; i++) {
        if (tq_ggml_options_is_exact(options, i)) last = i;
    }
    ENSURE(last == options->max_exact_layer);
}

static void parse(const char *text)
{
    /* Bytes around the error text show whether it stays inside. */
    char error[64];
    tq_ggml_options options, untouched;
    memset(error, 'x', sizeof error);
    memset(&options, 0x5a, sizeof options);
    untouched = options;
    if (tq_ggml_options_parse(&options, text, error, sizeof error - 1)) {
        check_options(&options);
        return;
    }
    ENSURE(memcmp(&options, &untouched, sizeof options) == 0);
    ENSURE(memchr(error, '\0', sizeof error - 1) && strncmp(error, "TQ_GGML: ", 9) == 0);
    ENSURE(error[sizeof error - 1] == 'x');
}

/* Random bytes rarely spell an option: the first byte chooses between them as they are and words of the language. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const words[] = {
        "k=",          "v=",    "sinks=", "sequences=", "recent=", "exact=", "head_dim=", "log=", "sq4",  "sq8",
        "f16",         "error", "info",   "128",        "64",      "0",      "1",         "7",    "1023", "1024",
        "99999999999", "+",     "-",      ",",          ",",       ",",      "=",         "x"};
    char text[1024];
    size_t n = 0;
    if (size == 0) return 0;
    if (data[0] & 1) {
        n = size - 1 < sizeof text - 1 ? size - 1 : sizeof text - 1;
        memcpy(text, data + 1, n);
    } else {
        for (size_t i = 1; i < size; i++) {
            const char *word = words[data[i] % (sizeof words / sizeof words[0])];
            if (n + strlen(word) >= sizeof text) break;
            memcpy(text + n, word, strlen(word));
            n += strlen(word);
        }
    }
    text[n] = '\0';
    parse(text);
    return 0;
}
