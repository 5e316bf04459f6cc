# From the loader to Rust, on the first processor and on the others.
#
# The loader enters at `boot_start` in 32-bit protected mode without paging; ebx holds the address of what it has to say.
# The others begin in real mode at `ap_trampoline`, which the first one copies to 0x8000, each with a number and a stack
# of its own. All run on one page table that maps the first 4 GiB to themselves by leaves of 2 MiB.

.section .note.pvh,"a",@note
.align 4
.long 4, 4, 18
.asciz "Xen"
.long boot_start

.section .boot,"awx"
.if MULTIBOOT
.align 4
.long 0x1BADB002, 0, -0x1BADB002   # magic, flags, checksum
.endif

.code32
.globl boot_start
boot_start:
    cli
    movl $boot_stacks + BOOT_STACK, %esp
    movl %ebx, boot_info
    movl $boot_pdpt + 7, boot_pml4
    movl $boot_pd + 7, %eax
    movl $0, %edi
1:  movl %eax, boot_pdpt(,%edi,8)
    addl $0x1000, %eax
    incl %edi
    cmpl $4, %edi
    jne 1b
    movl $0x87, %eax               # present, writable, user, large
    movl $0, %edi
2:  movl %eax, boot_pd(,%edi,8)
    addl $0x200000, %eax
    incl %edi
    cmpl $2048, %edi
    jne 2b
    movl $first_long, %ebx
go_long:                           # ebx: 64-bit entry, esp: stack, edi: kept
    movl %cr4, %eax
    orl $0x620, %eax               # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx         # EFER: LME, NXE
    rdmsr
    orl $0x900, %eax
    wrmsr
    movl $0x80010033, %eax         # PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    lgdt boot_gdt_pointer
    ljmp $8, $long_mode
.code64
long_mode:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl %ebx, %ebx
    jmp *%rbx
first_long:
    movl boot_info, %edi
    call machine_first
3:  hlt
    jmp 3b
ap_long:
    movl %edi, %edi
    call machine_other
4:  hlt
    jmp 4b

.align 8
boot_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
.globl boot_gdt_pointer
boot_gdt_pointer:
    .word 31
    .long boot_gdt

.code16
.globl ap_trampoline, ap_trampoline_end
ap_trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl 0x8000 + (ap_gdt_pointer - ap_trampoline)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $24, $ap_protected
ap_gdt_pointer:
    .word 31
    .long boot_gdt
ap_trampoline_end:

.code32
ap_protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $1, %edi
    lock xaddl %edi, ap_next       # edi: this processor's number
    cmpl $MAX_PROCESSORS, %edi
    jae 5f
    movl %edi, %esp
    incl %esp
    imull $BOOT_STACK, %esp
    addl $boot_stacks, %esp
    movl $ap_long, %ebx
    jmp go_long
5:  hlt
    jmp 5b

.code64
# Every exception: its number, its error code (0 where there is none), then the frame that the processor pushed.
.macro exception number, has_code
    .align 16
    .if \has_code == 0
    pushq $0
    .endif
    pushq $\number
    jmp any_exception
.endm
.text
.align 16
.globl exception_stubs
exception_stubs:
.set vector, 0
.rept 32
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30
    exception vector, 1
    .else
    exception vector, 0
    .endif
    .set vector, vector + 1
.endr
any_exception:
    movq (%rsp), %rdi
    movq 8(%rsp), %rsi
    movq 16(%rsp), %rdx
    movq %cr2, %rcx
    andq $-16, %rsp
    call machine_exception
# Another processor wants this one's attention, and has it: only the interrupt controller is told.
.align 16
.globl kick_stub
kick_stub:
    pushq %rax
    movl $0xfee000b0, %eax
    movl $0, (%rax)
    popq %rax
    iretq
.align 16
.globl spurious_stub
spurious_stub:
    iretq

.section .data
.globl ap_next
ap_next: .long 1
.section .bss
.align 4096
.globl boot_pml4
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pd: .skip 16384
.globl boot_stacks
boot_stacks: .skip BOOT_STACK * MAX_PROCESSORS
boot_info: .skip 8
