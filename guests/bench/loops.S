/* SPDX-License-Identifier: Apache-2.0 */
/* Loops whose instructions per round are known. RDI = rounds (not 0); RAX = checksum. */

    .text

/* 10 instructions a round, registers only. */
    .balign 64
    .globl loop_registers
loop_registers:
    movl $1, %eax
    movl $2, %ecx
    movl $3, %edx
    .balign 16
1:  addq %rcx, %rax
    xorq %rax, %rdx
    rolq $7, %rcx
    leaq 1(%rax, %rdx, 2), %rsi
    subq %rsi, %rcx
    andq %rdx, %rsi
    shrq $3, %rsi
    orq %rsi, %rdx
    decq %rdi
    jnz 1b
    ret

/* 9 instructions a round: two loads, two stores within 16 KiB. */
    .balign 64
    .globl loop_load_store
loop_load_store:
    xorl %eax, %eax
    xorl %ecx, %ecx
    .balign 16
1:  movq buffer(%rcx), %rdx
    addq %rdi, %rdx
    movq %rdx, buffer(%rcx)
    addl buffer(%rcx), %eax
    movl %eax, buffer + 12(%rcx)
    addl $16, %ecx
    andl $0x3fff, %ecx
    decq %rdi
    jnz 1b
    ret

/* 9 instructions a round: three calls, three returns. */
    .balign 64
    .globl loop_call_return
loop_call_return:
    xorl %eax, %eax
    .balign 16
1:  call 2f
    decq %rdi
    jnz 1b
    ret
    .balign 16
2:  call 3f
    ret
    .balign 16
3:  addq %rdi, %rax
    call 4f
    ret
    .balign 16
4:  ret

/* 65536 + 5 instructions a round: one read-modify-write on each 4 KiB page of 64 MiB. */
    .balign 64
    .globl loop_pages
loop_pages:
    xorl %eax, %eax
    .balign 16
1:  movabsq $0x100000000, %rsi
    movl $16384, %ecx
    .balign 16
2:  addq %rdi, (%rsi)
    addq $4096, %rsi
    decl %ecx
    jnz 2b
    addq -4096(%rsi), %rax
    decq %rdi
    jnz 1b
    ret

    .bss
    .balign 4096
buffer:
    .skip 16384 + 16

    .section .note.GNU-stack, "", @progbits
