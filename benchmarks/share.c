// SPDX-License-Identifier: Apache-2.0
// Walks a tree of small files and reads a big one in a shared directory, and prints how long that took (share.py).
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static long count, bytes;
static int contents;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void walk(const char *path) {
    static char buffer[65536];
    char name[4096];
    DIR *directory = opendir(path);
    if (!directory) die(path);
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        struct stat status;
        if (lstat(name, &status)) die(name);
        if (S_ISDIR(status.st_mode)) {
            walk(name);
            continue;
        }
        count++;
        if (!contents) continue;
        int fd = open(name, O_RDONLY);
        if (fd < 0) die(name);
        for (ssize_t size; (size = read(fd, buffer, sizeof buffer)) > 0;) bytes += size;
        close(fd);
    }
    closedir(directory);
}

int main(int argc, char **argv) {
    if (argc < 2 || chdir(argv[1])) die("a directory");
    for (contents = 0; contents < 2; contents++) {
        count = bytes = 0;
        double start = now();
        walk("tree");
        printf("share %s %ld %ld %.6f\n", contents ? "cat" : "stat", count, bytes, now() - start);
    }
    size_t size = 1 << 20;
    char *buffer = malloc(size);
    int fd = open("big", O_RDONLY);
    if (fd < 0) die("big");
    double start = now();
    bytes = 0;
    for (ssize_t got; (got = read(fd, buffer, size)) > 0;) bytes += got;
    printf("share read 1 %ld %.6f\n", bytes, now() - start);
    return 0;
}
