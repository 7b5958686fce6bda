/* SPDX-License-Identifier: MIT */
/* See file.h. */
#define _GNU_SOURCE /* mkostemp, realpath, fsync */

#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/log.h"

static tq_status failed(const char *action, const char *path)
{
    tq_log(TQ_LOG_ERROR, "%s %s: %s", action, path, strerror(errno));
    return TQ_ERR_IO;
}

static tq_status not_regular(const char *path)
{
    tq_log(TQ_LOG_ERROR, "%s is not a regular file; give the path of a file, or a new one", path);
    return TQ_ERR_IO;
}

static tq_status copy_path(const char *path, char **out)
{
    size_t bytes = strlen(path) + 1;
    *out = tq_alloc(bytes);
    if (!*out) return TQ_ERR_MEMORY;
    memcpy(*out, path, bytes);
    return TQ_OK;
}

/* What renaming onto the path may replace: nothing yet, or a regular file, at the end of symbolic links, which stay. */
static tq_status find_target(const char *path, char **out)
{
    struct stat info;
    if (lstat(path, &info) != 0) return errno == ENOENT ? copy_path(path, out) : failed("cannot look at", path);
    if (S_ISREG(info.st_mode)) return copy_path(path, out);
    if (!S_ISLNK(info.st_mode)) return not_regular(path);
    char *resolved = realpath(path, NULL);
    if (!resolved) return failed("cannot follow the symbolic link", path);
    tq_status status = stat(resolved, &info) != 0 ? failed("cannot look at", resolved) : TQ_OK;
    if (status == TQ_OK) status = S_ISREG(info.st_mode) ? copy_path(resolved, out) : not_regular(path);
    free(resolved); /* not from tq_alloc */
    return status;
}

tq_status tq_file_begin(tq_file_writer *writer, const char *path)
{
    *writer = (tq_file_writer){.descriptor = -1};
    TQ_TRY(find_target(path, &writer->path));
    size_t bytes = strlen(writer->path) + sizeof ".XXXXXX";
    writer->temporary = tq_alloc(bytes);
    tq_status status = writer->temporary ? TQ_OK : TQ_ERR_MEMORY;
    if (status == TQ_OK) {
        snprintf(writer->temporary, bytes, "%s.XXXXXX", writer->path);
        writer->descriptor = mkostemp(writer->temporary, O_CLOEXEC);
        if (writer->descriptor >= 0) return TQ_OK;
        status = failed("cannot create", writer->temporary);
    }
    tq_free(writer->temporary);
    tq_free(writer->path);
    return status;
}

tq_status tq_file_write(tq_file_writer *writer, const void *data, size_t bytes)
{
    const uint8_t *at = data;
    while (bytes > 0) {
        ssize_t n = write(writer->descriptor, at, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return failed("cannot write", writer->temporary);
        at += n;
        bytes -= (size_t)n;
        writer->n_written += (size_t)n;
    }
    return TQ_OK;
}

/* So that the new name also survives a crash. */
static tq_status sync_folder(const char *path)
{
    const char *slash = strrchr(path, '/');
    size_t length = slash ? (size_t)(slash - path) + 1 : 1;
    char *folder = tq_alloc(length + 1);
    if (!folder) return TQ_ERR_MEMORY;
    memcpy(folder, slash ? path : ".", length);
    folder[length] = '\0';
    int descriptor = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    /* The file is in place already; a file system that cannot sync a folder is no reason to call that a failure. */
    if (descriptor >= 0) {
        if (fsync(descriptor) != 0) tq_log(TQ_LOG_WARNING, "cannot sync %s: %s", folder, strerror(errno));
        close(descriptor);
    }
    tq_free(folder);
    return TQ_OK;
}

tq_status tq_file_end(tq_file_writer *writer, tq_status status)
{
    if (status == TQ_OK && fsync(writer->descriptor) != 0) status = failed("cannot sync", writer->temporary);
    if (close(writer->descriptor) != 0 && status == TQ_OK) status = failed("cannot close", writer->temporary);
    if (status == TQ_OK && rename(writer->temporary, writer->path) != 0) status = failed("cannot replace", writer->path);
    if (status != TQ_OK) unlink(writer->temporary);
    if (status == TQ_OK && sync_folder(writer->path) != TQ_OK)
        tq_log(TQ_LOG_WARNING, "no memory to sync the folder of %s", writer->path);
    tq_free(writer->temporary);
    tq_free(writer->path);
    return status;
}

tq_status tq_file_map(const char *path, const uint8_t **data, size_t *bytes)
{
    /* Of a FIFO, opening would wait for a writer. */
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (descriptor < 0) return failed("cannot open", path);
    struct stat info;
    tq_status status = TQ_OK;
    void *mapped = NULL;
    if (fstat(descriptor, &info) != 0) {
        status = failed("cannot read", path);
    } else if (!S_ISREG(info.st_mode)) {
        status = not_regular(path);
    } else if (info.st_size > 0) {
        mapped = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0);
        if (mapped == MAP_FAILED) status = failed("cannot map", path);
    }
    close(descriptor);
    if (status != TQ_OK) return status;
    *data = mapped;
    *bytes = (size_t)info.st_size;
    return TQ_OK;
}

void tq_file_unmap(const uint8_t *data, size_t bytes)
{
    if (data) munmap((void *)(uintptr_t)data, bytes);
}

tq_status tq_file_scratch(const char *folder, size_t bytes, int *descriptor, const uint8_t **data)
{
    static const char name[] = "/turboquant-XXXXXX";
    size_t length = strlen(folder);
    char *path = tq_alloc(length + sizeof name);
    if (!path) return TQ_ERR_MEMORY;
    memcpy(path, folder, length);
    memcpy(path + length, name, sizeof name);
    tq_status status = TQ_OK;
    void *mapped = MAP_FAILED;
    *descriptor = mkostemp(path, O_CLOEXEC);
    if (*descriptor < 0) status = failed("cannot create", path);
    if (status == TQ_OK && unlink(path) != 0) status = failed("cannot unlink", path);
    if (status == TQ_OK && ftruncate(*descriptor, (off_t)bytes) != 0) status = failed("cannot lengthen", path);
    if (status == TQ_OK) mapped = mmap(NULL, bytes, PROT_READ, MAP_SHARED, *descriptor, 0);
    if (status == TQ_OK && mapped == MAP_FAILED) status = failed("cannot map", path);
    if (status == TQ_OK) *data = mapped;
    if (status != TQ_OK && *descriptor >= 0) close(*descriptor);
    tq_free(path);
    return status;
}

tq_status tq_file_write_at(int descriptor, const void *data, size_t bytes, size_t offset)
{
    const uint8_t *at = data;
    while (bytes > 0) {
        ssize_t n = pwrite(descriptor, at, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return failed("cannot write", "the file of offloaded pages");
        at += n;
        bytes -= (size_t)n;
        offset += (size_t)n;
    }
    return TQ_OK;
}

void tq_file_close(int descriptor)
{
    close(descriptor);
}
