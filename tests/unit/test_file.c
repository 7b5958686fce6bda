/* SPDX-License-Identifier: MIT */
/* Files: what is not a file is neither read nor replaced, links stay, and programs that the host starts get none of them. */
#define _GNU_SOURCE /* mkdtemp, mkfifo */

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "kv_test.h"
#include "last_message.h"

enum { SECONDS = 60 };

static char folder[200], path[256], other[256];

static int make_folder(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "%s/turboquant-file-XXXXXX", kv_temporary_folder());
    KV_CHECK(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/path", folder);
    snprintf(other, sizeof other, "%s/other", folder);
    tq_log_set(keep_message, NULL);
    alarm(SECONDS); /* what hangs fails */
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    alarm(0);
    tq_log_set(NULL, NULL);
    unlink(path);
    unlink(other);
    return rmdir(folder); /* nothing else was left behind */
}

static mode_t kind_of(const char *name)
{
    struct stat info;
    return lstat(name, &info) == 0 ? info.st_mode & S_IFMT : 0;
}

static tq_status write_text(const char *name, const char *text)
{
    tq_file_writer writer;
    tq_status status = tq_file_begin(&writer, name);
    return status == TQ_OK ? tq_file_end(&writer, tq_file_write(&writer, text, strlen(text))) : status;
}

static void assert_holds(const char *name, const char *text)
{
    const uint8_t *data;
    size_t bytes;
    assert_int_equal(tq_file_map(name, &data, &bytes), TQ_OK);
    assert_int_equal(bytes, strlen(text));
    assert_memory_equal(data, text, bytes);
    tq_file_unmap(data, bytes);
}

static void test_a_fifo_is_refused(void **state)
{
    (void)state;
    const uint8_t *data;
    size_t bytes;
    tq_calibration *calibration;
    tq_snapshot_info info;
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(tq_file_map(path, &data, &bytes), TQ_ERR_IO);
    assert_non_null(strstr(last_message, "not a regular file"));
    assert_int_equal(tq_calibration_load(&calibration, path), TQ_ERR_IO);
    assert_int_equal(tq_snapshot_describe(&info, path, false, NULL, 0), TQ_ERR_IO);
    last_message[0] = '\0';
    assert_int_equal(write_text(path, "text"), TQ_ERR_IO);
    assert_non_null(strstr(last_message, "not a regular file"));
    assert_int_equal(kind_of(path), S_IFIFO);
    assert_int_equal(write_text(folder, "text"), TQ_ERR_IO);
}

static void test_links_are_followed(void **state)
{
    (void)state;
    assert_int_equal(write_text(other, "first"), TQ_OK);
    assert_int_equal(symlink("other", path), 0);
    assert_int_equal(write_text(path, "second"), TQ_OK);
    assert_int_equal(kind_of(path), S_IFLNK);
    assert_int_equal(kind_of(other), S_IFREG);
    assert_holds(other, "second");
    assert_int_equal(unlink(other), 0);
    assert_int_equal(write_text(path, "third"), TQ_ERR_IO); /* it leads nowhere */
    assert_int_equal(mkfifo(other, 0600), 0);
    assert_int_equal(write_text(path, "third"), TQ_ERR_IO);
    assert_int_equal(kind_of(path), S_IFLNK);
    assert_int_equal(kind_of(other), S_IFIFO);
}

static void test_files_are_replaced_whole(void **state)
{
    (void)state;
    tq_file_writer writer;
    assert_int_equal(write_text(path, "first"), TQ_OK);
    assert_int_equal(tq_file_begin(&writer, path), TQ_OK);
    assert_int_equal(tq_file_end(&writer, TQ_ERR_FULL), TQ_ERR_FULL);
    assert_holds(path, "first");
    assert_int_equal(write_text(path, "second"), TQ_OK);
    assert_holds(path, "second");
}

static void test_no_file_outlives_exec(void **state)
{
    (void)state;
    tq_file_writer writer;
    const uint8_t *data;
    int descriptor;
    assert_int_equal(tq_file_begin(&writer, path), TQ_OK);
    assert_true(fcntl(writer.descriptor, F_GETFD) & FD_CLOEXEC);
    assert_int_equal(tq_file_end(&writer, TQ_OK), TQ_OK);
    assert_int_equal(tq_file_scratch(folder, 4096, &descriptor, &data), TQ_OK);
    assert_true(fcntl(descriptor, F_GETFD) & FD_CLOEXEC);
    tq_file_unmap(data, 4096);
    tq_file_close(descriptor);
}

int main(void)
{
#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, make_folder, remove_folder)
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_a_fifo_is_refused),
        IN_FOLDER(test_links_are_followed),
        IN_FOLDER(test_files_are_replaced_whole),
        IN_FOLDER(test_no_file_outlives_exec),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
