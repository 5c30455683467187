/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loader's information, copied out of low memory before anything is written there.
 * Source: Xen, include/public/arch-x86/hvm/start_info.h.
 */
#include "guest.h"

struct hvm_start_info {
    u32 magic, version, flags, nr_modules;
    u64 modlist_paddr, cmdline_paddr, rsdp_paddr;
    u64 memmap_paddr; /* from version 1 on */
    u32 memmap_entries, reserved;
};

struct hvm_memmap_table_entry {
    u64 addr, size;
    u32 type, reserved;
};

#define START_MAGIC 0x336ec578

extern u64 start_info_address;

struct memory_range memory_map[64];
unsigned memory_ranges;
char command_line[512];
u64 rsdp_address;

void boot_init(void)
{
    const struct hvm_start_info *info = (const void *)start_info_address;
    if (info->magic != START_MAGIC)
        return;
    rsdp_address = info->rsdp_paddr;
    if (info->cmdline_paddr) {
        const char *s = (const char *)info->cmdline_paddr;
        for (size_t i = 0; i < sizeof(command_line) - 1 && s[i]; i++)
            command_line[i] = s[i];
    }
    if (info->version >= 1 && info->memmap_paddr) {
        const struct hvm_memmap_table_entry *entry = (const void *)info->memmap_paddr;
        for (u32 i = 0; i < info->memmap_entries && memory_ranges < ARRAY_SIZE(memory_map); i++, entry++)
            memory_map[memory_ranges++] = (struct memory_range){entry->addr, entry->size, entry->type};
    }
}

const char *boot_option(const char *name, char *buffer, size_t size)
{
    size_t length = strlen(name);
    for (const char *s = command_line; *s;) {
        while (*s == ' ')
            s++;
        if (!strncmp(s, name, length) && s[length] == '=') {
            s += length + 1;
            char end = ' ';
            if (*s == '"')
                end = *s++;
            size_t i = 0;
            while (*s && *s != end && i < size - 1)
                buffer[i++] = *s++;
            buffer[i] = 0;
            return buffer;
        }
        while (*s && *s != ' ') {
            if (*s == '"')
                for (s++; *s && *s != '"'; s++)
                    ;
            if (*s)
                s++;
        }
    }
    return 0;
}

u64 parse_number(const char *s, u64 otherwise)
{
    u64 value = 0;
    if (!s || *s < '0' || *s > '9')
        return otherwise;
    for (; *s >= '0' && *s <= '9'; s++)
        value = value * 10 + (u64)(*s - '0');
    return value;
}
