/* SPDX-License-Identifier: MIT */
/* What tq cache simulate says: a table, JSON, CSV, and plots by the Python package tools/simulate. */
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "simulate.h"

cJSON *simulate_row(const char *cache, double budget_gib, const simulate_result *r)
{
    double seconds = r->seconds > 0 ? r->seconds : 1;
    const struct {
        const char *name;
        double value;
    } numbers[] = {
        {"budget_gib", budget_gib},
        {"n_pages", (double)r->n_pages},
        {"page_bytes", (double)r->page_bytes},
        {"sequence_bytes", (double)r->sequence_bytes},
        {"n_served", (double)r->n_served},
        {"n_refused", (double)r->n_refused},
        {"seconds", r->seconds},
        {"running_peak", (double)r->running_peak},
        {"running_mean", r->running_mean},
        {"requests_per_s", (double)r->n_served / seconds},
        {"output_tok_per_s", (double)r->output_tok / seconds},
        {"wait_median_s", r->wait_median},
        {"wait_p99_s", r->wait_p99},
        {"first_token_median_s", r->first_median},
        {"first_token_p99_s", r->first_p99},
        {"n_prompt_tok", (double)r->prompt_tok},
        {"n_matched_tok", (double)r->matched_tok},
        {"hit_rate", r->prompt_tok > 0 ? (double)r->matched_tok / (double)r->prompt_tok : 0},
        {"n_evicted_pages", (double)r->n_evicted},
        {"n_copied_pages", (double)r->n_copied},
        {"pages_peak", (double)r->pages_peak},
        {"bytes_peak", (double)r->bytes_peak},
    };
    cJSON *row = cJSON_CreateObject();
    bool good = cJSON_AddStringToObject(row, "cache", cache) != NULL;
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        good = good && cJSON_AddNumberToObject(row, numbers[i].name, numbers[i].value);
    if (good) return row;
    cJSON_Delete(row);
    return NULL;
}

static double number(const cJSON *row, const char *name)
{
    return cJSON_GetObjectItemCaseSensitive(row, name)->valuedouble;
}

void simulate_print_table(const cJSON *rows)
{
    printf("| %-10s | %6s | %7s | %7s | %8s | %9s | %9s | %9s | %5s | %8s | %15s | %7s |\n", "cache", "GiB", "at once", "mean",
           "req/s", "tok/s", "wait s", "99 %", "hit %", "evicted", "pages used", "refused");
    printf("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    const cJSON *row;
    cJSON_ArrayForEach(row, rows)
    {
        char pages[48];
        snprintf(pages, sizeof pages, "%.0f of %.0f", number(row, "pages_peak"), number(row, "n_pages"));
        printf("| %-10s | %6g | %7.0f | %7.1f | %8.2f | %9.1f | %9.2f | %9.2f | %5.1f | %8.0f | %15s | %7.0f |\n",
               cJSON_GetObjectItemCaseSensitive(row, "cache")->valuestring, number(row, "budget_gib"),
               number(row, "running_peak"), number(row, "running_mean"), number(row, "requests_per_s"),
               number(row, "output_tok_per_s"), number(row, "wait_median_s"), number(row, "wait_p99_s"),
               100 * number(row, "hit_rate"), number(row, "n_evicted_pages"), pages, number(row, "n_refused"));
    }
}

static bool write_csv(FILE *file, const cJSON *report)
{
    const cJSON *rows = cJSON_GetObjectItemCaseSensitive(report, "rows"), *row, *item;
    fprintf(file, "# %s\n", cJSON_GetObjectItemCaseSensitive(report, "command")->valuestring);
    cJSON_ArrayForEach(item, rows->child) fprintf(file, "%s%s", item == rows->child->child ? "" : ",", item->string);
    fputc('\n', file);
    cJSON_ArrayForEach(row, rows)
    {
        cJSON_ArrayForEach(item, row)
        {
            if (item != row->child) fputc(',', file);
            if (cJSON_IsString(item))
                fputs(item->valuestring, file);
            else
                fprintf(file, "%.10g", item->valuedouble);
        }
        fputc('\n', file);
    }
    return !ferror(file);
}

static bool write_json(FILE *file, const cJSON *report)
{
    char *text = cJSON_Print(report);
    bool good = text && fprintf(file, "%s\n", text) > 0;
    cJSON_free(text);
    return good;
}

static void folder_of(char out[PATH_MAX], const char *path)
{
    snprintf(out, PATH_MAX, "%s", path);
    char *slash = strrchr(out, '/');
    if (!slash) snprintf(out, PATH_MAX, ".");
    if (slash) slash[slash == out] = '\0';
}

static bool check_file(const char *path)
{
    char folder[PATH_MAX];
    struct stat info;
    if (!path || strcmp(path, "-") == 0) return true;
    if (strlen(path) >= PATH_MAX) return tool_error(1, "cannot write %s: the path is too long", path) == 0;
    bool exists = stat(path, &info) == 0;
    folder_of(folder, path);
    if (exists && S_ISDIR(info.st_mode)) return tool_error(1, "cannot write %s: it is a folder; name a file", path) == 0;
    if (access(exists ? path : folder, W_OK) == 0) return true;
    tool_error(1, "cannot write %s: %s; name another file", exists ? path : folder, strerror(errno));
    return false;
}

bool simulate_check_output(const simulate_output *output)
{
    const char *const paths[] = {output->json, output->csv, output->html, output->plot};
    for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++) {
        if (!check_file(paths[i])) return false;
        for (size_t j = 0; j < i && paths[i]; j++) {
            if (!paths[j] || strcmp(paths[i], paths[j]) != 0 || strcmp(paths[i], "/dev/null") == 0) continue;
            tool_error(1, "two outputs are to be written to %s; give each a file of its own", paths[i]);
            return false;
        }
    }
    return true;
}

static bool write_file(const char *path, const cJSON *report, bool (*write)(FILE *, const cJSON *))
{
    if (!path) return true;
    bool is_stdout = strcmp(path, "-") == 0;
    FILE *file = is_stdout ? stdout : fopen(path, "we");
    bool good = file && write(file, report);
    if (file && !is_stdout && fclose(file) != 0) good = false;
    if (!good) tool_error(1, "cannot write %s", path);
    return good;
}

/* In the child: the package, with the report on its standard input. */
static void draw(const simulate_output *output, int from_parent)
{
    char name[] = "simulate", html_option[] = "--html", plot_option[] = "--plot", *words[6] = {name};
    int n = 1;
    if (dup2(from_parent, STDIN_FILENO) < 0) _exit(tool_error(1, "cannot pass the report on"));
    if (output->html) {
        words[n++] = html_option;
        words[n++] = (char *)output->html;
    }
    if (output->plot) {
        words[n++] = plot_option;
        words[n++] = (char *)output->plot;
    }
    _exit(tool_become_python("simulate", n, words));
}

static bool write_plots(const cJSON *report, const simulate_output *output)
{
    int ends[2];
    if (!output->html && !output->plot) return true;
    fflush(stdout);
    if (pipe(ends) != 0) return tool_error(1, "cannot make a pipe") == 0;
    pid_t child = fork();
    if (child == 0) {
        close(ends[1]);
        draw(output, ends[0]);
    }
    close(ends[0]);
    if (child < 0) close(ends[1]);
    if (child < 0) return tool_error(1, "cannot start a process") == 0;
    /* If the child ends early it has said why; that must not be the end of this process before it is waited for. */
    signal(SIGPIPE, SIG_IGN);
    FILE *file = fdopen(ends[1], "w");
    bool good = file && write_json(file, report);
    if (!file) close(ends[1]);
    if (file && fclose(file) != 0) good = false;
    int status;
    return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0 && good;
}

bool simulate_write(const cJSON *report, const simulate_output *output)
{
    return write_file(output->json, report, write_json) && write_file(output->csv, report, write_csv) &&
           write_plots(report, output);
}
