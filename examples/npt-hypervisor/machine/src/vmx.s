# Into the guest and back. rdi: 0 for the first entry of a control structure, rsi: the guest's registers: rax, rsi, rdi.
# The host's stack pointer goes into the structure, its entry point `vmx_exit` is there. Returns 0 after an exit of the
# guest, 1 if it was not entered.
.text
.globl vmx_run, vmx_exit
vmx_run:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    push %rsi
    mov $0x6c14, %eax              # the field of the host's rsp
    vmwrite %rsp, %rax
    test %rdi, %rdi
    mov 0(%rsi), %rax
    mov 16(%rsi), %rdi
    mov 8(%rsi), %rsi
    jnz 1f
    vmlaunch
    jmp 2f
1:  vmresume
2:  pop %rsi
    mov $1, %eax
    jmp 3f
vmx_exit:
    xchg %rsi, (%rsp)
    mov %rax, 0(%rsi)
    mov %rdi, 16(%rsi)
    pop %rax
    mov %rax, 8(%rsi)
    xor %eax, %eax
3:  pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret
