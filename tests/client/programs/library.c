// SPDX-License-Identifier: Apache-2.0
// A program that knows nothing of KVM: the client is a library, loaded as it runs, as libkrun may be.
#include <dlfcn.h>
#include <stdio.h>

int main(int argc, char **argv) {
    void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : NULL;
    int (*client)(int, char **) = library ? (int (*)(int, char **))dlsym(library, "client") : NULL;
    if (!client) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    return client(argc - 1, argv + 1);
}
