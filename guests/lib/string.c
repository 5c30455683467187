/* SPDX-License-Identifier: Apache-2.0 */
#include "guest.h"

void *memset(void *to, int value, size_t count)
{
    void *start = to;
    asm volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(value) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, size_t count)
{
    void *start = to;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    return start;
}

int memcmp(const void *a, const void *b, size_t count)
{
    const u8 *x = a, *y = b;
    for (; count; count--, x++, y++)
        if (*x != *y)
            return *x - *y;
    return 0;
}

size_t strlen(const char *s)
{
    size_t n = 0;
    while (s[n])
        n++;
    return n;
}

int strncmp(const char *a, const char *b, size_t count)
{
    for (; count && *a && *a == *b; count--, a++, b++)
        ;
    return count ? (u8)*a - (u8)*b : 0;
}

int strcmp(const char *a, const char *b) { return strncmp(a, b, ~0ul); }
