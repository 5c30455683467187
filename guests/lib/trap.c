/* SPDX-License-Identifier: Apache-2.0 */
/* Exceptions end the guest with a report; interrupts go to their handlers. */
#include "guest.h"

struct gate { u16 offset_low, selector; u8 ist, type; u16 offset_middle; u32 offset_high, reserved; };

extern const u8 trap_stubs[];

static struct gate idt[256] __attribute__((aligned(16)));
static trap_handler handlers[256];

static const char *const exceptions[32] = {
    "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP", "#PF", "15",
    "#MF", "#AC", "#MC", "#XF", "20", "#CP", "22", "23", "24", "25", "26", "27", "#HV", "#VC", "#SX", "31",
};

void trap_init(void)
{
    for (u32 i = 0; i < 256; i++) {
        u64 stub = (u64)trap_stubs + 16 * i;
        idt[i] = (struct gate){
            .offset_low = (u16)stub,
            .selector = 0x08,
            .type = 0x8e,
            .offset_middle = (u16)(stub >> 16),
            .offset_high = (u32)(stub >> 32),
        };
    }
}

void trap_init_cpu(void)
{
    struct { u16 limit; u64 base; } __attribute__((packed)) pointer = {sizeof(idt) - 1, (u64)idt};
    asm volatile("lidt %0" : : "m"(pointer));
}

void trap_set(u8 vector, trap_handler handler) { handlers[vector] = handler; }

void trap(struct trap_frame *frame)
{
    if (frame->vector >= 32) {
        if (handlers[frame->vector])
            handlers[frame->vector](frame);
        if (frame->vector != VECTOR_SPURIOUS)
            lapic_eoi();
        return;
    }
    u64 cr2;
    asm volatile("mov %%cr2, %0" : "=r"(cr2));
    print("\nunexpected exception %s, error code %lx, rip %lx, rsp %lx, cr2 %lx\n", exceptions[frame->vector],
          frame->error, frame->rip, frame->rsp, cr2);
    power_off();
}
