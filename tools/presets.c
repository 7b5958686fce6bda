/* SPDX-License-Identifier: MIT */
/* tq presets: what each preset stores, and what that costs with everything counted. */
#include <getopt.h>
#include <stdio.h>

#include "tq.h"

static const char help[] =
    "usage: tq presets [--head-dim D] [--n-head-kv N] [--context N] [--json]\n\n"
    "List the presets. bits per value counts keys and values with their norms, the tokens kept exact at the start and\n"
    "the end of the context, and the bookkeeping, for one layer of a model of this shape.\n\n"
    "  --head-dim D   (128)\n"
    "  --n-head-kv N  KV heads of a layer (8)\n"
    "  --context N    tokens that the cache has room for (8192)\n"
    "  --json         an array of objects: name, k_format, v_format, n_sink, n_recent, bits_per_value, ratio_to_f16,\n"
    "                 head_dim, n_head_kv, context, description\n";

typedef struct shape {
    int32_t head_dim;
    int64_t n_head_kv, context;
} shape;

static void add_preset(cJSON *array, const tq_preset *preset, const char *k, const char *v, double bits, shape s)
{
    cJSON *object = cJSON_CreateObject();
    cJSON_AddStringToObject(object, "name", preset->name);
    cJSON_AddStringToObject(object, "k_format", k);
    cJSON_AddStringToObject(object, "v_format", v);
    cJSON_AddNumberToObject(object, "n_sink", preset->n_sink);
    cJSON_AddNumberToObject(object, "n_recent", preset->n_recent);
    cJSON_AddNumberToObject(object, "bits_per_value", bits);
    cJSON_AddNumberToObject(object, "ratio_to_f16", 16 / bits);
    cJSON_AddNumberToObject(object, "head_dim", s.head_dim);
    cJSON_AddNumberToObject(object, "n_head_kv", (double)s.n_head_kv);
    cJSON_AddNumberToObject(object, "context", (double)s.context);
    cJSON_AddStringToObject(object, "description", preset->description);
    cJSON_AddItemToArray(array, object);
}

static int print_presets(shape s, bool json)
{
    cJSON *array = json ? cJSON_CreateArray() : NULL;
    if (!json) printf("%-8s %14s %14s\n", "preset", "bits per value", "ratio to F16");
    for (int32_t i = 0; tq_preset_get(i); i++) {
        const tq_preset *preset = tq_preset_get(i);
        tq_format_info k, v;
        double bits = 0;
        tq_status status = tq_format_describe(&k, preset->k_format, s.head_dim);
        if (status == TQ_OK) status = tq_format_describe(&v, preset->v_format, s.head_dim);
        if (status == TQ_OK) status = tq_preset_bits_per_value(&bits, preset, s.head_dim, (int32_t)s.n_head_kv, s.context);
        if (status != TQ_OK) {
            cJSON_Delete(array);
            return tool_error(1, "preset %s: %s", preset->name, tq_status_string(status));
        }
        if (json) {
            add_preset(array, preset, k.name, v.name, bits, s);
        } else {
            printf("%-8s %14.3f %14.2f  %s\n", preset->name, bits, 16 / bits, preset->description);
        }
    }
    return json ? tool_print_json(array) : 0;
}

int cmd_presets(int argc, char **argv)
{
    static const struct option options[] = {
        {"head-dim", required_argument, NULL, 'd'}, {"n-head-kv", required_argument, NULL, 'n'},
        {"context", required_argument, NULL, 'c'},  {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},           {0}};
    shape s = {128, 8, 8192};
    bool json = false;
    int option;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case 'd':
            if (!tool_parse_head_dim(&s.head_dim, optarg)) return 1;
            break;
        case 'n':
            if (!tool_parse_int(&s.n_head_kv, "--n-head-kv", optarg, 1, 1 << 16)) return EXIT_USAGE;
            break;
        case 'c':
            if (!tool_parse_int(&s.context, "--context", optarg, 1, 1 << 28)) return EXIT_USAGE;
            break;
        case 'j':
            json = true;
            break;
        case 'h':
            fputs(help, stdout);
            return 0;
        default:
            return EXIT_USAGE;
        }
    }
    if (optind < argc) return tool_error(EXIT_USAGE, "unexpected argument '%s'; see 'tq presets --help'", argv[optind]);
    return print_presets(s, json);
}
