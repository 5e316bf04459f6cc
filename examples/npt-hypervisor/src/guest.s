# The guest: writes pages of its memory and checks every word that it reads. It uses no stack and no floating point, and
# runs at whatever address it is copied to.
#
# A page holds one word in each cache line. With the version v of the page and the address a of the word it is
# (a | 1) * v * K, K odd: a page that was never written is zero, and no two words of the guest are alike. The versions lie
# in an array of their own, so that a page which lost its last write, or took one that was not meant for it, is seen.
#
# In: rdi first byte of the pages, rsi the array of versions, r8 pages of this guest processor, r9 a random number other
# than 0, r10 step from one of its pages to the next and r11 the first one, both in pages, r12 visits, r13 mode: 0 visits
# pages at random, every other time one of its first 32, and writes every other one, 1 checks one page after another. Calls the host with rax = 1 after so many
# visits and with rax = 2 if a word is wrong: rbx its address, rcx what it should be, rdx what it is.
# Uses rax, rbx, rcx, rdx, rbp, r12, r14, r15.
.section .rodata
.balign 16
.globl guest_start, guest_end
guest_start:
visit:
    mov %r9, %rax                  # the next random number
    shl $13, %rax
    xor %rax, %r9
    mov %r9, %rax
    shr $7, %rax
    xor %rax, %r9
    mov %r9, %rax
    shl $17, %rax
    xor %rax, %r9
    mov %r9, %rax
    mul %r8                        # rdx: one of the pages
    bt $41, %r9
    jnc 0f
    and $31, %rdx                  # one of the first
0:  test %r13, %r13
    jz 1f
    lea -1(%r12), %rdx
1:  imul %r10, %rdx
    add %r11, %rdx
    lea (%rsi,%rdx,8), %r14        # r14: its version
    shl $12, %rdx
    lea (%rdi,%rdx), %r15          # r15: its first byte
    movabs $0x9e3779b97f4a7c15, %rbp
    imul (%r14), %rbp
    lea 4096(%r15), %rbx
2:  sub $64, %rbx
    mov %rbx, %rcx
    or $1, %rcx
    imul %rbp, %rcx
    mov (%rbx), %rdx
    cmp %rcx, %rdx
    jne wrong
3:  cmp %r15, %rbx
    jne 2b
    test %r13, %r13
    jnz 5f
    bt $40, %r9
    jnc 5f
    movabs $0x9e3779b97f4a7c15, %rbp
    mov (%r14), %rax
    inc %rax
    imul %rax, %rbp
    lea 4096(%r15), %rbx
4:  sub $64, %rbx
    mov %rbx, %rcx
    or $1, %rcx
    imul %rbp, %rcx
    mov %rcx, (%rbx)
    cmp %r15, %rbx
    jne 4b
    mov %rax, (%r14)
5:  dec %r12
    jnz visit
    mov $1, %eax
    vmmcall
    jmp visit
wrong:
    mov $2, %eax
    vmmcall
    jmp 3b
guest_end:
