// SPDX-License-Identifier: Apache-2.0
// `refusing CALL PROGRAM ARGUMENT…` executes a program that is refused a system call: EPERM.
#include "client.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>

static const struct {
    const char *name;
    uint32_t number;
} calls[] = {{"memfd_create", SYS_memfd_create}, {"process_vm_readv", SYS_process_vm_readv}};

int main(int argc, char **argv) {
    CHECK(argc > 2);
    for (unsigned n = 0; n < sizeof calls / sizeof *calls; n++) {
        if (strcmp(calls[n].name, argv[1])) continue;
        struct sock_filter filter[] = {
            BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, calls[n].number, 0, 1),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
        CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
        CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) == 0);
        execv(argv[2], argv + 2);
    }
    CHECK(!"executed");
}
