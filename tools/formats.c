/* SPDX-License-Identifier: MIT */
/* tq formats: what each format costs at a head_dim. */
#include <getopt.h>
#include <stdio.h>

#include "tq.h"

static const char help[] =
    "usage: tq formats [--head-dim D] [--json]\n\n"
    "List the formats: how many bytes one head vector of D values takes, norm included.\n\n"
    "  --head-dim D   one head_dim; without it the table shows 128, and JSON has all that are supported\n"
    "  --json         an array of objects: name, bits, head_dim, bytes_per_vector, bits_per_value, ratio_to_f16,\n"
    "                 description\n";

static void add_format(cJSON *array, const tq_format_info *info)
{
    cJSON *object = cJSON_CreateObject();
    cJSON_AddStringToObject(object, "name", info->name);
    cJSON_AddNumberToObject(object, "bits", info->bits);
    cJSON_AddNumberToObject(object, "head_dim", info->head_dim);
    cJSON_AddNumberToObject(object, "bytes_per_vector", (double)info->bytes_per_vector);
    cJSON_AddNumberToObject(object, "bits_per_value", info->bits_per_value);
    cJSON_AddNumberToObject(object, "ratio_to_f16", info->ratio_to_f16);
    cJSON_AddStringToObject(object, "description", info->description);
    cJSON_AddItemToArray(array, object);
}

static int print_formats(const int32_t *head_dims, int32_t n_head_dims, bool json)
{
    cJSON *array = json ? cJSON_CreateArray() : NULL;
    if (!json) printf("%-10s %8s %10s %14s %14s\n", "format", "head_dim", "bytes", "bits per value", "ratio to F16");
    for (int32_t i = 0; i < n_head_dims; i++) {
        for (int format = 0; format < TQ_FORMAT_COUNT; format++) {
            tq_format_info info;
            tq_status status = tq_format_describe(&info, (tq_format)format, head_dims[i]);
            if (status != TQ_OK) {
                cJSON_Delete(array);
                return tool_error(1, "format %d at head_dim %d: %s", format, head_dims[i], tq_status_string(status));
            }
            if (json) {
                add_format(array, &info);
            } else {
                printf("%-10s %8d %10zu %14.3f %14.2f  %s\n", info.name, info.head_dim, info.bytes_per_vector,
                       info.bits_per_value, info.ratio_to_f16, info.description);
            }
        }
    }
    return json ? tool_print_json(array) : 0;
}

int cmd_formats(int argc, char **argv)
{
    static const struct option options[] = {
        {"head-dim", required_argument, NULL, 'd'}, {"json", no_argument, NULL, 'j'}, {"help", no_argument, NULL, 'h'}, {0}};
    bool json = false;
    int32_t head_dim = 0;
    int option;
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (option) {
        case 'd':
            if (!tool_parse_head_dim(&head_dim, optarg)) return 1;
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
    if (optind < argc) return tool_error(EXIT_USAGE, "unexpected argument '%s'; see 'tq formats --help'", argv[optind]);
    if (head_dim == 0 && json) {
        int32_t n;
        const int32_t *list = tq_head_dim_list(&n);
        return print_formats(list, n, true);
    }
    if (head_dim == 0) head_dim = 128;
    return print_formats(&head_dim, 1, json);
}
