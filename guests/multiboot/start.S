/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Entry of a Multiboot image, the trampoline of application processors, and the ways back to real mode.
 * Source: Multiboot specification 0.6.96; Intel SDM vol. 3, sections 9.8 (protected mode), 9.9.2 (back to real mode).
 */
#define MAGIC 0x1badb002
#define TRAMPOLINE 0x2000
#define RESUME 0x3000

    .section .multiboot, "a"
    .align 4
    .long MAGIC, 0, -MAGIC

    .section .text
    .code32
    .globl start
start:
    mov $stack_top, %esp
    lgdt gdt_pointer
    ljmp $8, $1f
1:  mov $16, %dx
    mov %dx, %ds
    mov %dx, %es
    mov %dx, %ss
    push %ebx
    push %eax
    call main
    push %eax
    call quit

/* Copied to TRAMPOLINE: where a start-up IPI lets a processor begin. */
    .globl trampoline, trampoline_end
    .code16
trampoline:
    cli
    lgdtl %cs:gdt_pointer_copy - trampoline
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $8, $processor
gdt_pointer_copy:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:
    .code32
processor:
    mov $16, %ax
    mov %ax, %ds
    mov $1, %eax
    lock xadd %eax, processors_up
1:  hlt
    jmp 1b

/* Copied to RESUME: goes on after S3, in real mode, with the word at 0x4F0 as the exit status. */
    .globl resume, resume_end
    .code16
resume:
    xor %ax, %ax
    mov %ax, %ds
    mov 0x4f0, %eax
    mov $0xf4, %dx
    outl %eax, %dx
1:  hlt
    jmp 1b
resume_end:

/* Copied to RESUME: back to real mode, wait for one tick of the firmware's timer, exit with 0. */
    .globl real, real_end
    .code16
real:
    mov $32, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov %cr0, %eax
    and $~1, %eax
    mov %eax, %cr0
    ljmp $0, $(RESUME + 1f - real)
1:  xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $0x7000, %sp
    mov 0x46c, %ebx
    sti
2:  hlt
    cmp %ebx, 0x46c
    je 2b
    cli
    int $0x42
    xor %eax, %eax
    mov $0xf4, %dx
    outl %eax, %dx
real_end:

    .code32
    .globl go_real
go_real:
    lidt real_idt
    ljmp $24, $RESUME

    .globl triple_fault
triple_fault:
    lidt no_idt
    int3

    .section .rodata
    .align 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff  /* 8: 32-bit code */
    .quad 0x00cf93000000ffff  /* 16: data */
    .quad 0x00009b000000ffff  /* 24: 16-bit code */
    .quad 0x000093000000ffff  /* 32: 16-bit data */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
real_idt:
    .word 0x3ff
    .long 0
no_idt:
    .word 0
    .long 0

    .section .bss
    .align 16
    .skip 8192
stack_top:
    .globl processors_up
processors_up:
    .skip 4
    .section .note.GNU-stack, "", @progbits
