// SPDX-License-Identifier: Apache-2.0
// Reads and writes a disk past the page cache: disk DEVICE CASE AMOUNT THREADS; prints "disk CASE AMOUNT SECONDS".
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SEQUENTIAL = 256 * 1024, RANDOM = 4096 };

static int fd;
static int is_write, is_sync;
static uint64_t blocks; // of the disk
static long rounds;     // of each thread

static void fail(const char *what)
{
    fprintf(stderr, "disk: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void *buffer(size_t size)
{
    void *data;
    if (posix_memalign(&data, 4096, size))
        fail("memory");
    memset(data, 0x5a, size);
    return data;
}

static void *at_random(void *seed)
{
    uint64_t state = 88172645463325252ull + (uintptr_t)seed;
    char *data = buffer(RANDOM);
    for (long n = 0; n < rounds; n++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        off_t at = (off_t)(state % blocks) * RANDOM;
        ssize_t done = is_write ? pwrite(fd, data, RANDOM, at) : pread(fd, data, RANDOM, at);
        if (done != RANDOM)
            fail("block");
        if (is_sync && fdatasync(fd))
            fail("fdatasync");
    }
    return NULL;
}

static void in_order(long mib)
{
    char *data = buffer(SEQUENTIAL);
    for (off_t at = 0; at < (off_t)mib << 20; at += SEQUENTIAL) {
        ssize_t done = is_write ? pwrite(fd, data, SEQUENTIAL, at) : pread(fd, data, SEQUENTIAL, at);
        if (done != SEQUENTIAL)
            fail("block");
    }
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    const char *kind = argv[2];
    long amount = atol(argv[3]), threads = atol(argv[4]);
    is_write = strstr(kind, "write") != NULL || strstr(kind, "sync") != NULL;
    is_sync = strstr(kind, "sync") != NULL;
    fd = open(argv[1], O_RDWR | O_DIRECT);
    if (fd < 0)
        fail(argv[1]);
    blocks = lseek(fd, 0, SEEK_END) / RANDOM;
    double start = now();
    if (strstr(kind, "sequential")) {
        in_order(amount);
    } else {
        pthread_t started[64];
        rounds = amount / threads;
        for (long n = 0; n < threads; n++)
            if (pthread_create(&started[n], NULL, at_random, (void *)(n * 7919)))
                fail("thread");
        for (long n = 0; n < threads; n++)
            pthread_join(started[n], NULL);
    }
    printf("disk %s %ld %f\n", kind, amount, now() - start);
    return 0;
}
