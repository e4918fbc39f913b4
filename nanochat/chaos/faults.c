/* A disk that fails on demand: preloaded into a training process, it strikes at the k-th call below one folder.
 *
 *   FAULT_FOLDER  real path; only files below it count       FAULT_LOG  where the strike (or the totals) is told
 *   FAULT_CALLS   write, sync, rename, or any: which calls count; any adds making folders, cutting and
 *                                                             deleting files
 *   FAULT_AT      strike at the k-th of them; 0: never, only count
 *   FAULT_DOES    full    no space left, from this call on             (the disk stays full)
 *                 short   half of the bytes, then no space left        (the disk fills up in the middle of a call)
 *                 part    half of the bytes, once, then all is well    (allowed; the caller has to write the rest)
 *                 error   input/output error, once                     (a bad block; fsync tells of it only once)
 *                 kill    SIGKILL before the call is made              (power is cut between two calls)
 *
 * A process sees its own disk only through these calls, so what it does after each of them is what is tested here.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

enum kind { WRITE, SYNC, RENAME, OTHER };
static const char *const KIND_NAMES[] = {"write", "sync", "rename", "other"};
enum verdict { PASS, HALF, FAIL };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long counts[4], counted;
static int is_full;

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

static int lies_below(const char *path) {
    const char *folder = setting("FAULT_FOLDER");
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int handle_is_ours(int handle, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return lies_below(path);
}

/* Paths are given whole, or relative to an open folder, as when a tree is deleted. */
static int path_is_ours(int folder, const char *path, char *whole) {
    if (path[0] == '/' || folder == AT_FDCWD) {
        snprintf(whole, PATH_MAX, "%s", path);
        return lies_below(whole);
    }
    return handle_is_ours(folder, whole);
}

static void tell(const char *format, const char *word, long number, const char *path) {
    char line[PATH_MAX + 128];
    int length = snprintf(line, sizeof line, format, word, number, path);
    int log = REAL(open)(setting("FAULT_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (log >= 0 && length > 0) {
        ssize_t ignored = REAL(write)(log, line, (size_t)length);
        (void)ignored;
        close(log);
    }
}

/* Count one call and say what becomes of it; errno is set where it fails. */
static enum verdict judge(enum kind kind, const char *path) {
    const char *calls = setting("FAULT_CALLS"), *does = setting("FAULT_DOES");
    enum verdict verdict = PASS;
    pthread_mutex_lock(&lock);
    counts[kind]++;
    if (is_full && kind == WRITE) {
        errno = ENOSPC;
        verdict = FAIL;
    } else if (!strcmp(calls, "any") || !strcmp(calls, KIND_NAMES[kind])) {
        long at = atol(setting("FAULT_AT"));
        if (++counted == at) {
            tell("struck %s %ld %s\n", KIND_NAMES[kind], at, path);
            if (!strcmp(does, "kill")) kill(getpid(), SIGKILL);
            is_full = !strcmp(does, "full") || !strcmp(does, "short");
            verdict = !strcmp(does, "short") || !strcmp(does, "part") ? HALF : FAIL;
            errno = !strcmp(does, "full") ? ENOSPC : EIO;
        }
    }
    pthread_mutex_unlock(&lock);
    return verdict;
}

__attribute__((destructor)) static void tell_totals(void) {
    if (atol(setting("FAULT_AT")) == 0 && counts[WRITE])
        for (int kind = WRITE; kind <= OTHER; kind++) tell("count %s %ld%s\n", KIND_NAMES[kind], counts[kind], "");
}

/* Writing ------------------------------------------------------------------------------------------------------ */

static size_t half(size_t size) { return size > 1 ? size / 2 : size; }

ssize_t write(int handle, const void *bytes, size_t size) {
    char path[PATH_MAX];
    enum verdict verdict = handle_is_ours(handle, path) ? judge(WRITE, path) : PASS;
    return verdict == FAIL ? -1 : REAL(write)(handle, bytes, verdict == HALF ? half(size) : size);
}

ssize_t pwrite(int handle, const void *bytes, size_t size, off_t at) {
    char path[PATH_MAX];
    enum verdict verdict = handle_is_ours(handle, path) ? judge(WRITE, path) : PASS;
    return verdict == FAIL ? -1 : REAL(pwrite)(handle, bytes, verdict == HALF ? half(size) : size, at);
}

ssize_t pwrite64(int handle, const void *bytes, size_t size, off64_t at) { return pwrite(handle, bytes, size, at); }

ssize_t writev(int handle, const struct iovec *parts, int number) {
    char path[PATH_MAX];
    enum verdict verdict = handle_is_ours(handle, path) ? judge(WRITE, path) : PASS;
    if (verdict == HALF) return REAL(write)(handle, parts[0].iov_base, half(parts[0].iov_len));
    return verdict == FAIL ? -1 : REAL(writev)(handle, parts, number);
}

/* Making room for a file needs space as a write does. */
int ftruncate(int handle, off_t size) {
    char path[PATH_MAX];
    return handle_is_ours(handle, path) && judge(size ? WRITE : OTHER, path) == FAIL ? -1 : REAL(ftruncate)(handle, size);
}

int ftruncate64(int handle, off64_t size) { return ftruncate(handle, size); }

/* Syncing, renaming, making and deleting ------------------------------------------------------------------------ */

int fsync(int handle) {
    char path[PATH_MAX];
    return handle_is_ours(handle, path) && judge(SYNC, path) != PASS ? -1 : REAL(fsync)(handle);
}

int fdatasync(int handle) { return fsync(handle); }

int rename(const char *from, const char *to) {
    char path[PATH_MAX];
    return path_is_ours(AT_FDCWD, to, path) && judge(RENAME, path) != PASS ? -1 : REAL(rename)(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    char path[PATH_MAX];
    if (path_is_ours(to_folder, to, path) && judge(RENAME, path) != PASS) return -1;
    return REAL(renameat)(from_folder, from, to_folder, to);
}

int mkdir(const char *name, mode_t mode) {
    char path[PATH_MAX];
    return path_is_ours(AT_FDCWD, name, path) && judge(OTHER, path) != PASS ? -1 : REAL(mkdir)(name, mode);
}

int unlink(const char *name) {
    char path[PATH_MAX];
    return path_is_ours(AT_FDCWD, name, path) && judge(OTHER, path) != PASS ? -1 : REAL(unlink)(name);
}

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    return path_is_ours(folder, name, path) && judge(OTHER, path) != PASS ? -1 : REAL(unlinkat)(folder, name, flags);
}

int rmdir(const char *name) {
    char path[PATH_MAX];
    return path_is_ours(AT_FDCWD, name, path) && judge(OTHER, path) != PASS ? -1 : REAL(rmdir)(name);
}
