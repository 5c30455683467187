// SPDX-License-Identifier: Apache-2.0
// Ways in which a client's process ends by itself, with status 5, after it has used KVM.
#include "client.h"

static void *from_thread(void *how) {
    _exit(*(int *)how);
}

int main(int argc, char **argv) {
    const char *how = argc > 1 ? argv[1] : "";
    struct guest g = guest_open(OUTS, sizeof OUTS);
    CHECK(next_out(&g) == 0);
    int status = 5;
    if (!strcmp(how, "exit")) exit(status);
    if (!strcmp(how, "_exit")) _exit(status);
    if (!strcmp(how, "_Exit")) _Exit(status);
    if (!strcmp(how, "exit_group")) syscall(SYS_exit_group, status);
    if (!strcmp(how, "thread")) {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, from_thread, &status) == 0);
        pause();
    }
    if (!strcmp(how, "children")) {
        pid_t pid = vfork();
        if (!pid) _exit(0);
        CHECK(pid > 0 && waitpid(pid, NULL, 0) == pid);
        pid = fork();
        if (!pid) _exit(0);
        CHECK(pid > 0 && waitpid(pid, NULL, 0) == pid);
        pid = fork();
        if (!pid) {
            g = guest_open(OUTS, sizeof OUTS);
            for (int n = 0; n < 3; n++) CHECK(next_out(&g) == n);
            _exit(0);
        }
        CHECK(pid > 0 && waitpid(pid, NULL, 0) == pid);
        return status;
    }
    return 1;
}
