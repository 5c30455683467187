// SPDX-License-Identifier: Apache-2.0
// Uses the files of the current directory in every way that a shared directory has to take: prints "ok NAME" for each,
// or "failed NAME" with what was wrong.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define EXPECT(what) do { if (!(what)) return fail(#what, __LINE__); } while (0)

static int fail(const char *what, int line) {
    printf("  line %d: %s: %s\n", line, what, strerror(errno));
    return 1;
}

static uint32_t seed = 1;
static uint32_t random_below(uint32_t limit) {
    seed = seed * 1664525 + 1013904223;
    return (seed >> 8) % limit;
}

static int put(const char *name, const char *text) {
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text)) return 1;
    return close(fd);
}

static int tree(void) {
    char name[64], text[64];
    EXPECT(!mkdir("tree", 0755));
    for (int d = 0; d < 10; d++) {
        sprintf(name, "tree/%d", d);
        EXPECT(!mkdir(name, 0755));
        for (int f = 0; f < 40; f++) {
            sprintf(name, "tree/%d/%d", d, f);
            EXPECT(!put(name, name));
        }
    }
    int found = 0;
    for (int d = 0; d < 10; d++) {
        sprintf(name, "tree/%d", d);
        DIR *directory = opendir(name);
        EXPECT(directory);
        for (struct dirent *entry; (entry = readdir(directory));) {
            if (entry->d_name[0] == '.') continue;
            sprintf(name, "tree/%d/%.20s", d, entry->d_name);
            struct stat status;
            EXPECT(!stat(name, &status) && status.st_size == (off_t)strlen(name) && S_ISREG(status.st_mode));
            int fd = open(name, O_RDONLY);
            memset(text, 0, sizeof text);
            EXPECT(read(fd, text, sizeof text) == status.st_size && !strcmp(text, name));
            close(fd);
            found++;
        }
        closedir(directory);
    }
    EXPECT(found == 400);
    return 0;
}

static int big(void) {
    static char buffer[1 << 17];
    int from = open("big", O_RDONLY), to = open("copy", O_WRONLY | O_CREAT | O_TRUNC, 0644);
    EXPECT(from >= 0 && to >= 0);
    for (ssize_t size; (size = read(from, buffer, sizeof buffer));) {
        EXPECT(size > 0);
        EXPECT(write(to, buffer, size) == size);
    }
    EXPECT(!fsync(to) && !close(to));
    return 0;
}

static int names(void) {
    char name[300];
    memset(name, 'n', sizeof name);
    name[255] = 0;
    EXPECT(!put(name, "x") && !access(name, R_OK) && !unlink(name));
    name[255] = 'n';
    name[256] = 0;
    EXPECT(open(name, O_WRONLY | O_CREAT, 0644) < 0 && errno == ENAMETOOLONG);
    EXPECT(mkdir(name, 0755) < 0 && errno == ENAMETOOLONG);
    int here = open(".", O_RDONLY | O_DIRECTORY);
    // deeper than any path that a system call takes
    name[200] = 0;
    for (int depth = 0; depth < 60; depth++) {
        EXPECT(!mkdir(name, 0755));
        EXPECT(!chdir(name));
    }
    EXPECT(!put("bottom", "deep") && !access("bottom", R_OK) && !rename("bottom", "Boden \xc3\xb6"));
    struct stat status;
    EXPECT(!stat("Boden \xc3\xb6", &status) && status.st_size == 4);
    EXPECT(!fchdir(here));
    char target[PATH_MAX], read_back[PATH_MAX];
    memset(target, 't', sizeof target);
    for (int at = 100; at < PATH_MAX; at += 100) target[at] = '/';
    target[4000] = 0;
    EXPECT(!symlink(target, "long link"));
    EXPECT(readlink("long link", read_back, sizeof read_back) == 4000 && !memcmp(target, read_back, 4000));
    EXPECT(!symlink("../../../../../../../../etc/hostname", "up") && !access("up", R_OK)); // the guest's own
    return 0;
}

static int mapping(void) {
    size_t size = 5 * 4096;
    int fd = open("mapped", O_RDWR | O_CREAT, 0644);
    EXPECT(fd >= 0 && !ftruncate(fd, size));
    char *map = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    EXPECT(map != MAP_FAILED);
    for (size_t at = 0; at < size; at++) map[at] = at * 7;
    EXPECT(!msync(map, size, MS_SYNC));
    char *back = malloc(size);
    EXPECT(pread(fd, back, size, 0) == (ssize_t)size && !memcmp(map, back, size));
    EXPECT(!munmap(map, size) && !close(fd));
    return 0;
}

// random reads, writes, truncations and mappings, against a copy in memory
#define FSX_SIZE 200000
static int fsx(int rounds) {
    static unsigned char good[FSX_SIZE], buffer[FSX_SIZE];
    size_t length = 0;
    int fd = open("fsx", O_RDWR | O_CREAT | O_TRUNC, 0644);
    EXPECT(fd >= 0);
    for (int round = 0; round < rounds; round++) {
        size_t at = random_below(FSX_SIZE), size = random_below(30000) + 1;
        if (at + size > FSX_SIZE) size = FSX_SIZE - at;
        switch (random_below(7)) {
        case 0:
        case 1: // write
            for (size_t i = 0; i < size; i++) buffer[i] = random_below(256);
            EXPECT(pwrite(fd, buffer, size, at) == (ssize_t)size);
            memcpy(good + at, buffer, size);
            if (at + size > length) length = at + size;
            break;
        case 2: // truncate
            EXPECT(!ftruncate(fd, at));
            if (at < length) memset(good + at, 0, length - at);
            length = at;
            break;
        case 3: // mapped write
            if (at >= length) break;
            if (at + size > length) size = length - at;
            {
                size_t page = at & -4096;
                unsigned char *map = mmap(0, at + size - page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, page);
                EXPECT(map != MAP_FAILED);
                for (size_t i = 0; i < size; i++) good[at + i] = map[at - page + i] = random_below(256);
                EXPECT(!munmap(map, at + size - page));
            }
            break;
        case 4: // mapped read
            if (at >= length) break;
            if (at + size > length) size = length - at;
            {
                size_t page = at & -4096;
                unsigned char *map = mmap(0, at + size - page, PROT_READ, MAP_SHARED, fd, page);
                EXPECT(map != MAP_FAILED);
                EXPECT(!memcmp(map + at - page, good + at, size));
                EXPECT(!munmap(map, at + size - page));
            }
            break;
        case 5: // close, open
            EXPECT(!close(fd));
            fd = open("fsx", O_RDWR);
            EXPECT(fd >= 0);
            // fall through
        default: { // read
            ssize_t expected = at >= length ? 0 : (ssize_t)(at + size > length ? length - at : size);
            EXPECT(pread(fd, buffer, size, at) == expected);
            EXPECT(!memcmp(buffer, good + at, expected));
        }
        }
    }
    EXPECT(!ftruncate(fd, length) && !fsync(fd) && !close(fd));
    fd = open("fsx.good", O_WRONLY | O_CREAT | O_TRUNC, 0644);
    EXPECT(write(fd, good, length) == (ssize_t)length && !close(fd));
    return 0;
}

static int renames(void) {
    EXPECT(!mkdir("r", 0755) && !mkdir("r/a", 0755) && !put("r/a/file", "text"));
    pid_t child = fork();
    if (!child) {
        for (int i = 0; i < 150; i++) {
            if (rename("r/a", "r/b")) _exit(1);
            if (rename("r/b", "r/a")) _exit(2);
        }
        _exit(0);
    }
    int status = 0, seen = 0;
    while (!waitpid(child, &status, WNOHANG)) {
        const char *paths[] = {"r/a/file", "r/b/file"};
        for (int i = 0; i < 2; i++) {
            char text[8] = "";
            int fd = open(paths[i], O_RDONLY);
            if (fd < 0) {
                EXPECT(errno == ENOENT || errno == ESTALE);
                continue;
            }
            EXPECT(read(fd, text, sizeof text) == 4 && !strcmp(text, "text"));
            close(fd);
            seen++;
        }
    }
    EXPECT(status == 0);
    EXPECT(!access("r/a/file", R_OK));
    return 0;
}

static int unlinked(void) {
    char text[16] = "";
    int fd = open("gone", O_RDWR | O_CREAT, 0600);
    EXPECT(fd >= 0 && write(fd, "abc", 3) == 3 && !unlink("gone"));
    EXPECT(access("gone", F_OK) < 0 && errno == ENOENT);
    EXPECT(write(fd, "def", 3) == 3 && pread(fd, text, sizeof text, 0) == 6 && !strcmp(text, "abcdef"));
    EXPECT(!ftruncate(fd, 2));
    struct stat status;
    EXPECT(!fstat(fd, &status) && status.st_size == 2);
    EXPECT(!close(fd));
    return 0;
}

static int appending(void) {
    int first = open("log", O_WRONLY | O_CREAT | O_APPEND, 0644), second = open("log", O_WRONLY | O_APPEND);
    EXPECT(first >= 0 && second >= 0);
    for (int i = 0; i < 20; i++) EXPECT(write(i % 2 ? first : second, "line\n", 5) == 5);
    struct stat status;
    EXPECT(!fstat(first, &status) && status.st_size == 100);
    return close(first) || close(second);
}

static int locks(void) {
    int fd = open("locked", O_RDWR | O_CREAT, 0644);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 10};
    EXPECT(fd >= 0 && !fcntl(fd, F_SETLK, &lock));
    pid_t child = fork();
    if (!child) {
        struct flock other = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 15, .l_len = 1};
        if (!fcntl(fd, F_SETLK, &other) || (errno != EAGAIN && errno != EACCES)) _exit(1);
        other.l_start = 20;
        if (fcntl(fd, F_SETLK, &other)) _exit(2);
        _exit(0);
    }
    int status;
    EXPECT(waitpid(child, &status, 0) == child && status == 0);
    lock.l_type = F_UNLCK;
    EXPECT(!fcntl(fd, F_SETLK, &lock) && !close(fd));
    return 0;
}

static int directory_that_changes(void) {
    char name[64];
    EXPECT(!mkdir("many", 0755));
    for (int i = 0; i < 600; i++) {
        sprintf(name, "many/file number %d", i);
        EXPECT(!put(name, "x"));
    }
    DIR *directory = opendir("many");
    EXPECT(directory);
    int seen = 0, kept = 0;
    for (struct dirent *entry; (entry = readdir(directory)); seen++) {
        int number = -1;
        sscanf(entry->d_name, "file number %d", &number);
        if (number >= 0 && number % 2) {
            sprintf(name, "many/%.40s", entry->d_name);
            EXPECT(!unlink(name));
        } else if (number >= 0) {
            kept++;
        }
    }
    closedir(directory);
    EXPECT(kept == 300);
    int left = 0;
    directory = opendir("many");
    for (struct dirent *entry; (entry = readdir(directory));) left += entry->d_name[0] != '.';
    closedir(directory);
    EXPECT(left == 300);
    return 0;
}

static int attributes(void) {
    EXPECT(!put("attributes", "x") && !chmod("attributes", 0640));
    struct timespec times[2] = {{1000000000, 123456789}, {1100000000, 987654321}};
    EXPECT(!utimensat(AT_FDCWD, "attributes", times, 0));
    struct stat status;
    EXPECT(!stat("attributes", &status) && (status.st_mode & 07777) == 0640);
    EXPECT(status.st_mtim.tv_sec == 1100000000);
    EXPECT(status.st_mtim.tv_nsec == 987654321 || status.st_mtim.tv_nsec == 0); // Linux's 9p client has seconds only
    EXPECT(status.st_uid == 0 && status.st_gid == 0);
    EXPECT(!chown("attributes", 0, 0));
    EXPECT(!link("attributes", "attributes again") && !stat("attributes again", &status) && status.st_nlink == 2);
    EXPECT(!mkfifo("pipe", 0600) && !stat("pipe", &status) && S_ISFIFO(status.st_mode));
    EXPECT(mknod("device", S_IFCHR | 0666, 0x103) < 0 && errno == EPERM);
    return 0;
}

static int short_fsx(void) {
    return fsx(400);
}

static const struct {
    const char *name;
    int (*run)(void);
} PARTS[] = {
    {"tree", tree},         {"big", big},         {"names", names},
    {"mapping", mapping},   {"fsx", short_fsx},   {"renames", renames},
    {"unlinked", unlinked}, {"append", appending}, {"locks", locks},
    {"changing", directory_that_changes},          {"attributes", attributes},
};

int main(void) {
    setvbuf(stdout, 0, _IOLBF, 0);
    for (size_t part = 0; part < sizeof PARTS / sizeof *PARTS; part++)
        printf("%s %s\n", PARTS[part].run() ? "failed" : "ok", PARTS[part].name);
    sync();
    return 0;
}
