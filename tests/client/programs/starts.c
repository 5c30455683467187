// SPDX-License-Identifier: Apache-2.0
// `starts WAY PROGRAM ARGUMENT…` executes a program by one of the functions for that; its status is the program's.
#include "client.h"
#include <spawn.h>

extern char **environ;

static int status_of_child(pid_t pid) {
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
    return WEXITSTATUS(status);
}

int main(int argc, char **argv) {
    CHECK(argc > 2);
    const char *way = argv[1], *path = argv[2];
    char **arguments = argv + 2;
    pid_t pid;
    if (!strcmp(way, "execve")) execve(path, arguments, environ);
    if (!strcmp(way, "execv")) execv(path, arguments);
    if (!strcmp(way, "execvp")) execvp(path, arguments);
    if (!strcmp(way, "execvpe")) execvpe(path, arguments, environ);
    if (!strcmp(way, "posix_spawn")) {
        CHECK(posix_spawn(&pid, path, NULL, NULL, arguments, environ) == 0);
        return status_of_child(pid);
    }
    if (!strcmp(way, "posix_spawnp")) {
        CHECK(posix_spawnp(&pid, path, NULL, NULL, arguments, environ) == 0);
        return status_of_child(pid);
    }
    if (!strcmp(way, "vfork")) {
        new_guest_works();
        for (int n = 0; n < 3; n++) {
            if (!(pid = vfork())) {
                execve(path, arguments, environ);
                _exit(1);
            }
            int status = status_of_child(pid);
            if (status) return status;
        }
        return 0;
    }
    // What cannot be executed, and lists that are none.
    if (!strcmp(way, "nothing")) {
        FAILS(execve("/nonexistent", arguments, environ), ENOENT);
        FAILS(execve((char *)8, arguments, environ), EFAULT);
        FAILS(execve("/etc/passwd", arguments, environ), EACCES);
        FAILS(execvp("a-program-that-nobody-has", arguments), ENOENT);
        FAILS(execvp("", arguments), ENOENT);
        CHECK(posix_spawn(&pid, "/nonexistent", NULL, NULL, arguments, environ) == ENOENT);
        return 0;
    }
    CHECK(!"started");
}
