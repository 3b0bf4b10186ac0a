/* The clock of this machine, moved: preloaded into a process, whose time of day is then that of
   the kernel and the milliseconds that the file named by CLOCK_OFFSET holds. What measures how
   long something takes is left alone, as when an administrator sets the clock. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offset;

static int64_t moved(void)
{
    static int is_open;
    if (!is_open) {
        const char *path = getenv("CLOCK_OFFSET");
        int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        is_open = 1;
        if (file >= 0) {
            void *found = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
            if (found != MAP_FAILED)
                offset = found;
            close(file);
        }
    }
    return offset ? *offset : 0;
}

static void add(struct timespec *at)
{
    int64_t milliseconds = moved();
    int64_t all = at->tv_nsec + (milliseconds % 1000) * 1000000;
    at->tv_sec += milliseconds / 1000;
    if (all < 0) {
        all += 1000000000;
        at->tv_sec -= 1;
    } else if (all >= 1000000000) {
        all -= 1000000000;
        at->tv_sec += 1;
    }
    at->tv_nsec = all;
}

int clock_gettime(clockid_t clock, struct timespec *at)
{
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, at);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        add(at);
    return result;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone)
{
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at)
        *at = now.tv_sec;
    return now.tv_sec;
}
