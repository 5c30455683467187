/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Entry of a guest: PVH (32-bit protected mode, paging off, EBX = hvm_start_info), long mode with 4 GiB mapped one to
 * one, and the way other processors take from their start-up IPI to the same place.
 *
 * Source: Xen, docs/misc/pvh.pandoc (start of day) and include/public/elfnote.h (XEN_ELFNOTE_PHYS32_ENTRY = 18);
 * AMD APM vol. 2, section 14.6 (enabling long mode), 15.27.8 (INIT and start-up).
 */

    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad _start

    .set CODE64, 0x08
    .set DATA, 0x10
    .set CODE32, 0x18
    .set TRAMPOLINE, 0x8000
    .set STACK, 16384
    .set CPUS_MAX, 64

    .section .text.start, "ax"
    .code32
    .globl _start
_start:
    cli
    cld
    movl %ebx, start_info_address
    movl $boot_stack + STACK, %esp

    /* Page tables: 2048 leaves of 2 MiB; the last GiB, where devices are, uncached. */
    movl $page_directories, %edi
    movl $0x83, %eax
    xorl %edx, %edx
1:  cmpl $0xc0000000, %eax
    jb 2f
    orl $0x18, %eax
2:  movl %eax, (%edi)
    movl %edx, 4(%edi)
    addl $8, %edi
    addl $0x200000, %eax
    jnc 1b
    movl $page_directories + 0x03, %eax
    movl $page_pointers, %edi
    movl $4, %ecx
3:  movl %eax, (%edi)
    addl $0x1000, %eax
    addl $8, %edi
    loop 3b
    movl $page_pointers + 0x03, page_root

    call enter_long_mode
    ljmp $CODE64, $start64

/* Paging on, long mode active, still in 32-bit code. Clobbers EAX, ECX, EDX. */
enter_long_mode:
    movl %cr4, %eax
    orl $0x20, %eax                 /* PAE */
    movl %eax, %cr4
    movl $page_root, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          /* EFER.LME */
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    andl $0x9fffffff, %eax          /* caches on */
    orl $0x80010021, %eax           /* PG WP NE PE */
    movl %eax, %cr0
    lgdt gdt_pointer
    ret

    .code64
start64:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movq $boot_stack + STACK, %rsp
    xorl %ebp, %ebp
    call guest_main
4:  cli
    hlt
    jmp 4b

/* Where a start-up IPI with vector 8 begins: copied to TRAMPOLINE, CS = TRAMPOLINE >> 4. */
    .code16
    .globl ap_trampoline, ap_trampoline_end
ap_trampoline:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdt_pointer - ap_trampoline
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $CODE32, $ap32
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_trampoline_end:

    .code32
ap32:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $ap_early_stack + 64, %esp /* for one return address that all share: the same for all */
    call enter_long_mode
    ljmp $CODE64, $ap64

    .code64
ap64:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl $1, %edi
    lock xaddl %edi, ap_next
    cmpl $CPUS_MAX, %edi
    jae 5f
    movl %edi, %eax
    shll $14, %eax
    leaq ap_stacks(%rax), %rsp      /* number 1's stack ends where number 1 << 14 does */
    xorl %ebp, %ebp
    call ap_main
5:  cli
    hlt
    jmp 5b

/* One stub for each vector, then one way for all: the frame is struct trap_frame of guest.h. */
    .balign 16
    .globl trap_stubs
trap_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    pushq $0
    .endif
    pushq $vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rbx
    pushq %rbp
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    movq %rsp, %rdi
    movq %rsp, %rbx
    andq $-16, %rsp
    call trap
    movq %rbx, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rbp
    popq %rbx
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq

    .data
    .balign 8
    .globl start_info_address, ap_next
start_info_address:
    .quad 0
ap_next:
    .long 1
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        /* 64-bit code */
    .quad 0x00cf93000000ffff        /* data */
    .quad 0x00cf9b000000ffff        /* 32-bit code */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .long 0

    .bss
    .balign 4096
    .globl page_root
page_root:
    .skip 4096
page_pointers:
    .skip 4096
page_directories:
    .skip 4 * 4096
boot_stack:
    .skip STACK
ap_early_stack:
    .skip 64
    .balign 16
ap_stacks:
    .skip STACK * CPUS_MAX

    .section .note.GNU-stack, "", @progbits
