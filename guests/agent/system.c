// SPDX-License-Identifier: Apache-2.0
#include "system.h"

// The kernel leaves argc, argv and the environment on the stack (psABI, 3.4.1).
__asm__(".globl _start\n"
        "_start:\n"
        "    xor %ebp, %ebp\n"
        "    mov (%rsp), %rdi\n"
        "    lea 8(%rsp), %rsi\n"
        "    and $-16, %rsp\n"
        "    call main\n"
        "    mov %eax, %edi\n"
        "    mov $231, %eax\n" // exit_group
        "    syscall\n");

void *memcpy(void *to, const void *from, size_t size) {
    return memmove(to, from, size);
}

void *memmove(void *to, const void *from, size_t size) {
    char *target = to;
    const char *source = from;
    if (target <= source) {
        __asm__ volatile("rep movsb" : "+D"(target), "+S"(source), "+c"(size)::"memory");
    } else {
        while (size--)
            target[size] = source[size];
    }
    return to;
}

void *memset(void *to, int value, size_t size) {
    void *target = to;
    __asm__ volatile("rep stosb" : "+D"(target), "+c"(size) : "a"(value) : "memory");
    return to;
}

size_t strlen(const char *text) {
    size_t length = 0;
    while (text[length])
        length++;
    return length;
}
