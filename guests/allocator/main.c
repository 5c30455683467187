/* SPDX-License-Identifier: Apache-2.0 */
/* A guest with a buddy allocator that tells its hypervisor of huge pages that have become free, if CPUID offers that.
   Commands on COM1: `a` allocates all memory in small pages and writes it, `f` frees it in an order that joins buddies
   late, `h` allocates it in huge pages and looks whether they are zeroes, `q` powers off. */
#include "guest.h"

#define PAGE_SHIFT 12
#define MAX_ORDER 9 /* 2 MiB */
#define HUGE_SIZE (1ul << (PAGE_SHIFT + MAX_ORDER))
#define KVM_FEATURE_UNUSED_PAGE_HINT (1u << 31)
#define KVM_HC_UNUSED_PAGE_HINT 0x736b0001

/* --- the hypercall --- */

static int offered;
static u64 hints, refusals;
static long last_refusal;

static void find_hypervisor(void)
{
    struct cpuid r = cpuid(0x40000000, 0);
    if (r.ebx == 0x4b4d564b && r.ecx == 0x564b4d56 && r.edx == 0x4d) /* KVMKVMKVM */
        offered = !!(cpuid(0x40000001, 0).eax & KVM_FEATURE_UNUSED_PAGE_HINT);
}

static long hint(u64 address)
{
    long result;
    asm volatile("vmmcall" : "=a"(result) : "a"(KVM_HC_UNUSED_PAGE_HINT), "b"(address), "c"(HUGE_SIZE) : "memory");
    return result;
}

/* --- the allocator: free blocks of each order in a list, which is not in the blocks: they are nobody's memory --- */

#define PAGES_MAX (1 << 18)
struct block { struct block *next, *previous; };
#define FREE 0x80
static struct block lists[MAX_ORDER + 1], blocks[PAGES_MAX]; /* by first page */
static u8 state[PAGES_MAX];                                  /* of a block's first page: FREE | order */
static u64 base, pages;

static void *address_of(u64 page) { return (void *)(base + (page << PAGE_SHIFT)); }

static void insert(u64 page, u32 order)
{
    struct block *b = &blocks[page], *list = &lists[order];
    b->next = list->next, b->previous = list;
    list->next->previous = b, list->next = b;
    state[page] = FREE | order;
}

static void remove(u64 page)
{
    struct block *b = &blocks[page];
    b->previous->next = b->next, b->next->previous = b->previous;
    state[page] = 0;
}

static void *allocate(u32 order)
{
    for (u32 from = order; from <= MAX_ORDER; from++) {
        struct block *b = lists[from].next;
        if (b == &lists[from])
            continue;
        u64 page = b - blocks;
        remove(page);
        while (from > order) {
            from--;
            insert(page + (1ul << from), from);
        }
        return address_of(page);
    }
    return 0;
}

static void release(u64 page, u32 order)
{
    for (; order < MAX_ORDER; order++) {
        u64 buddy = page ^ 1ul << order;
        if (state[buddy] != (FREE | order))
            break;
        remove(buddy);
        page &= ~(1ul << order);
    }
    if (order == MAX_ORDER && offered) {
        long result = hint((u64)address_of(page));
        if (result)
            refusals++, last_refusal = result;
        else
            hints++;
    }
    insert(page, order);
}

/* --- commands --- */

static u64 allocated;

static void fill(void)
{
    for (u64 *p; (p = allocate(0)); allocated++)
        for (u32 i = 0; i < 4096 / sizeof *p; i++)
            p[i] = (u64)p ^ i;
}

static void free_all(void)
{
    /* Every other page first: no two buddies meet until the second time. */
    for (u32 odd = 0; odd < 2; odd++)
        for (u64 page = odd; page < pages; page += 2)
            release(page, 0);
    allocated = 0;
}

static void check(void)
{
    u64 count = 0, other = 0;
    for (u64 *p; (p = allocate(MAX_ORDER)); count++)
        for (u64 i = 0; i < HUGE_SIZE / sizeof *p; i++)
            other += p[i] != 0;
    for (u64 page = 0; page < pages; page += 1ul << MAX_ORDER)
        release(page, MAX_ORDER);
    print("huge pages %lu not zero %lu\n", count, other);
}

void guest_main(void);
void guest_main(void)
{
    boot_init();
    serial_init();
    acpi_init();
    trap_init();
    find_hypervisor();
    for (u32 order = 0; order <= MAX_ORDER; order++)
        lists[order].next = lists[order].previous = &lists[order];
    for (unsigned i = 0; i < memory_ranges; i++) {
        struct memory_range *range = &memory_map[i];
        u64 start = (range->start + HUGE_SIZE - 1) & -HUGE_SIZE, end = (range->start + range->size) & -HUGE_SIZE;
        if (start < 16 << 20)
            start = 16 << 20; /* the guest itself is below */
        if (end > start + PAGES_MAX * 4096ul)
            end = start + PAGES_MAX * 4096ul;
        if (range->type == MEMORY_RAM && start < end) {
            base = start, pages = (end - start) >> PAGE_SHIFT;
            break;
        }
    }
    for (u64 page = 0; page < pages; page += 1ul << MAX_ORDER)
        insert(page, MAX_ORDER);
    print("allocator of %lu huge pages, hints %s\n", pages >> MAX_ORDER, offered ? "offered" : "not offered");
    for (;;) {
        serial_irq(); /* polled */
        int command = serial_read();
        if (command == 'a') {
            fill();
            print("allocated %lu\n", allocated);
        } else if (command == 'f') {
            hints = refusals = 0;
            free_all();
            print("freed, hints %lu refused %lu last %d\n", hints, refusals, (int)last_refusal);
        } else if (command == 'h') {
            check();
        } else if (command == 'q') {
            power_off();
        }
        cpu_pause();
    }
}
