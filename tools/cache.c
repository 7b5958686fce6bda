/* SPDX-License-Identifier: MIT */
/* tq cache: what a snapshot file holds, and whether it is whole. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tq.h"

static const char help[] =
    "usage: tq cache inspect FILE [--json]\n"
    "       tq cache verify FILE... \n"
    "       tq cache bench [OPTIONS]\n"
    "       tq cache simulate [OPTIONS]\n\n"
    "  inspect   what a snapshot (of tq_cache_save) says of itself; its header is checked\n"
    "  verify    check every hash of snapshots; the exit code is 1 if one is damaged\n"
    "  bench     time attention on paged sequences; see 'tq cache bench --help'\n"
    "  simulate  how many requests a memory budget serves; see 'tq cache simulate --help'\n\n"
    "  --json    an object: version, n_layer, n_head_kv, head_dim, head_dim_v, page_size, n_sink, n_recent, n_take_back,\n"
    "            k_ref_block, n_sequences, n_pages, n_prefixes, page_bytes, exact_bytes, file_bytes, k_formats, v_formats\n";

static const char *format_name(tq_format format, int32_t head_dim)
{
    tq_format_info info;
    return tq_format_describe(&info, format, head_dim) == TQ_OK ? info.name : "unknown";
}

/* Of a file that has none for values, which its cache reads from the keys, the keys'. */
static int32_t value_dim(const tq_snapshot_info *info)
{
    return info->head_dim_v > 0 ? info->head_dim_v : info->head_dim;
}

static int print_json(const tq_snapshot_info *info, const tq_format *formats)
{
    cJSON *object = cJSON_CreateObject(), *k = cJSON_CreateArray(), *v = cJSON_CreateArray();
    const struct {
        const char *name;
        double value;
    } numbers[] = {{"version", info->version},
                   {"n_layer", info->n_layer},
                   {"n_head_kv", info->n_head_kv},
                   {"head_dim", info->head_dim},
                   {"head_dim_v", info->head_dim_v},
                   {"page_size", info->page_size},
                   {"n_sink", info->n_sink},
                   {"n_recent", info->n_recent},
                   {"n_take_back", info->n_take_back},
                   {"k_ref_block", info->k_ref_block},
                   {"n_sequences", info->n_sequences},
                   {"n_pages", info->n_pages},
                   {"n_prefixes", info->n_prefixes},
                   {"page_bytes", (double)info->page_bytes},
                   {"exact_bytes", (double)info->exact_bytes},
                   {"file_bytes", (double)info->file_bytes}};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        cJSON_AddNumberToObject(object, numbers[i].name, numbers[i].value);
    for (int32_t i = 0; i < info->n_layer; i++) {
        cJSON_AddItemToArray(k, cJSON_CreateString(format_name(formats[2 * i], info->head_dim)));
        cJSON_AddItemToArray(v, cJSON_CreateString(format_name(formats[2 * i + 1], value_dim(info))));
    }
    cJSON_AddItemToObject(object, "k_formats", k);
    cJSON_AddItemToObject(object, "v_formats", v);
    return tool_print_json(object);
}

static void print_text(const tq_snapshot_info *info, const tq_format *formats)
{
    printf("snapshot of version %d, %.1f MiB\n", info->version, (double)info->file_bytes / 1048576);
    printf("  shape      %d layers, %d KV heads, head_dim %d and %d%s\n", info->n_layer, info->n_head_kv, info->head_dim,
           value_dim(info), info->head_dim_v > 0 ? "" : "; values are read from the keys");
    printf("  exact      %d sinks, %d recent tokens; %.1f KiB a sequence\n", info->n_sink, info->n_recent,
           (double)info->exact_bytes / 1024);
    printf("  pages      %d of %d tokens, %.1f KiB each\n", info->n_pages, info->page_size, (double)info->page_bytes / 1024);
    printf("  sequences  %d\n  prefixes   %d published pages\n", info->n_sequences, info->n_prefixes);
    for (int32_t i = 0, end; i < info->n_layer; i = end) {
        for (end = i; end < info->n_layer && memcmp(formats + 2 * i, formats + 2 * end, 2 * sizeof *formats) == 0;) end++;
        printf("  layers     %d to %d: keys %s, values %s\n", i, end - 1, format_name(formats[2 * i], info->head_dim),
               format_name(formats[2 * i + 1], value_dim(info)));
    }
}

static int inspect(const char *path, bool json)
{
    tq_snapshot_info info;
    tq_status status = tq_snapshot_describe(&info, path, false, NULL, 0);
    if (status != TQ_OK) return tool_error(1, "%s: %s", path, tq_status_string(status));
    tq_format *formats = calloc(2 * (size_t)info.n_layer, sizeof *formats);
    if (!formats) return tool_error(1, "out of memory");
    int code = 0;
    status = tq_snapshot_describe(&info, path, false, formats, 2 * info.n_layer);
    if (status != TQ_OK)
        code = tool_error(1, "%s: %s", path, tq_status_string(status));
    else if (json)
        code = print_json(&info, formats);
    else
        print_text(&info, formats);
    free(formats);
    return code;
}

static int verify(int n, char **paths)
{
    int code = 0;
    for (int i = 0; i < n; i++) {
        tq_snapshot_info info;
        tq_status status = tq_snapshot_describe(&info, paths[i], true, NULL, 0);
        printf("%s: %s\n", paths[i], status == TQ_OK ? "whole" : tq_status_string(status));
        if (status != TQ_OK) code = 1;
    }
    return code;
}

int cmd_cache(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "bench") == 0) return cmd_cache_bench(argc - 1, argv + 1);
    if (argc > 1 && strcmp(argv[1], "simulate") == 0) return cmd_cache_simulate(argc - 1, argv + 1);
    static const struct option options[] = {{"json", no_argument, NULL, 'j'}, {"help", no_argument, NULL, 'h'}, {0}};
    bool json = false;
    int option;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (option == 'j') {
            json = true;
        } else if (option == 'h') {
            fputs(help, stdout);
            return 0;
        } else {
            return EXIT_USAGE;
        }
    }
    int n = argc - optind - 1;
    char **paths = argv + optind + 1;
    if (n == 1 && strcmp(argv[optind], "inspect") == 0) return inspect(paths[0], json);
    if (n >= 1 && strcmp(argv[optind], "verify") == 0) return verify(n, paths);
    return tool_error(EXIT_USAGE, "give 'inspect FILE', 'verify FILE...', 'bench' or 'simulate'; see 'tq cache --help'");
}
