/* SPDX-License-Identifier: Apache-2.0 */
/* Ordinary compiled code: quicksort, CRC-32 by table, a hash table; 4096 words a round. */
#include "bench.h"

enum { COUNT = 4096, SLOTS = 8192 };

static u32 words[COUNT], crc_table[256], slots[SLOTS];

static __attribute__((noinline)) void sort(u32 *a, long low, long high)
{
    while (low < high) {
        u32 pivot = a[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (a[i] < pivot)
                i++;
            while (a[j] > pivot)
                j--;
            if (i <= j) {
                u32 t = a[i];
                a[i++] = a[j];
                a[j--] = t;
            }
        }
        /* The smaller part by recursion: the stack stays shallow. */
        if (j - low < high - i) {
            sort(a, low, j);
            low = i;
        } else {
            sort(a, i, high);
            high = j;
        }
    }
}

static __attribute__((noinline)) u32 crc32(const u8 *p, size_t count)
{
    u32 crc = ~0u;
    while (count--)
        crc = crc >> 8 ^ crc_table[(crc ^ *p++) & 0xff];
    return ~crc;
}

static __attribute__((noinline)) u32 fill_table(void)
{
    u32 collisions = 0;
    memset(slots, 0, sizeof(slots));
    for (u32 i = 0; i < COUNT; i++) {
        u64 hash = 0xcbf29ce484222325;
        for (u32 shift = 0; shift < 32; shift += 8)
            hash = (hash ^ (words[i] >> shift & 0xff)) * 0x100000001b3;
        u32 at = (u32)(hash >> 32) % SLOTS;
        while (slots[at] && slots[at] != words[i]) {
            at = (at + 1) % SLOTS;
            collisions++;
        }
        slots[at] = words[i];
    }
    return collisions;
}

u64 compiled_mix(u64 iterations)
{
    u64 checksum = 0;
    u32 state = 12345;
    for (u32 i = 0; i < 256; i++) {
        u32 value = i;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xedb88320 : 0);
        crc_table[i] = value;
    }
    while (iterations--) {
        for (u32 i = 0; i < COUNT; i++) {
            state = state * 1664525 + 1013904223;
            words[i] = state | 1;
        }
        checksum = checksum * 31 + fill_table();
        sort(words, 0, COUNT - 1);
        checksum = checksum * 31 + crc32((const u8 *)words, sizeof(words));
    }
    return checksum;
}
