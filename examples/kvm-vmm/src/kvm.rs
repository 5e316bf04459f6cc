//! A VM on `/dev/kvm`: long mode, one program at privilege level 3.
//!
//! Protocol. The first 2 MiB of guest memory, in a slot of their own, hold what the processor needs: page tables that map
//! guest-physical addresses to themselves, a descriptor table, the program. Guest memory proper lies above 4 GiB and is
//! somebody else's mapping, whose pages may be absent. Privilege level 3, because there the program runs on the processor
//! itself everywhere; at level 0 some hosts emulate it. It leaves the guest by an `out`, which its I/O privilege level allows.
//!
//! A vCPU that is to stop is sent a signal until it has, because one that arrives just before the entry is lost.
#![allow(unsafe_code)]
// UNSAFETY: guest memory is given to the kernel by address.

use crate::guest::{BASE, State, code};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use uffd_handler::memory::Memory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const LOW: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const GDT: u64 = 0x3000;
const CODE: u64 = 0x4000;
/// Page directories, one for each GiB from here on.
const DIRECTORIES: u64 = 0x1_0000;
/// Where the first GiB of guest memory is among them.
const MOST_GIB: u64 = 64;

/// Present, writable, for level 3; of a directory's entry besides: a page of 2 MiB.
const TABLE: u64 = 0b111;
const LARGE: u64 = 1 << 7;

const CODE_SELECTOR: u16 = 0x18 | 3;
const DATA_SELECTOR: u16 = 0x20 | 3;

/// The slot of guest memory proper.
const SLOT: u32 = 1;

/// A VM.
pub(crate) struct Machine {
    // Before its memory, in the order in which they are dropped.
    /// vCPUs that do not run. KVM makes each once.
    idle: Mutex<Vec<(u64, VcpuFd)>>,
    vm: VmFd,
    kvm: Kvm,
    _low: GuestMemoryMmap<()>,
    len: u64,
}

fn error(what: &str, error: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("{what}: {error}"))
}

/// Why `/dev/kvm` cannot be used here, if it cannot.
pub(crate) fn unavailable() -> Option<String> {
    let why = Kvm::new().and_then(|kvm| kvm.create_vm()).err()?;
    Some(format!("/dev/kvm cannot be used here: {why}"))
}

impl Machine {
    /// Makes a VM with `memory` from [`BASE`] on; its writes are logged if that is wished. The caller keeps the memory mapped.
    pub(crate) fn new(memory: &Memory, log: bool) -> io::Result<Self> {
        let kvm = Kvm::new().map_err(|why| error("/dev/kvm", why))?;
        let vm = kvm.create_vm().map_err(|why| error("a VM", why))?;
        // Where Intel's processors want three pages of the host's.
        vm.set_tss_address(0xfffb_d000)
            .map_err(|why| error("its task state", why))?;
        let low = low_memory(memory.len())?;
        let host = low
            .get_host_address(GuestAddress(0))
            .map_err(|why| error("low memory", why))?;
        let flags = if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for (slot, flags, guest, len, host) in [
            (0, 0, 0, LOW as u64, host as u64),
            (SLOT, flags, BASE, memory.len(), memory.address()),
        ] {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: guest,
                memory_size: len,
                userspace_addr: host,
            };
            // SAFETY: the first is owned by what is returned, and outlives the VM; the second is kept by the caller.
            unsafe { vm.set_user_memory_region(region) }.map_err(|why| error("a slot", why))?;
        }
        Ok(Self {
            idle: Mutex::default(),
            vm,
            kvm,
            _low: low,
            len: memory.len(),
        })
    }

    /// The vCPU of a number, going on from a state.
    pub(crate) fn vcpu(&self, number: u64, state: &State) -> io::Result<Vcpu> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let known = idle.iter().position(|(known, _)| *known == number);
        let fd = match known {
            Some(index) => idle.swap_remove(index).1,
            None => self.make(number)?,
        };
        fd.set_regs(&registers(state))
            .map_err(|why| error("its registers", why))?;
        Ok(Vcpu { number, fd })
    }

    /// Takes a vCPU back.
    pub(crate) fn rest(&self, vcpu: Vcpu) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push((vcpu.number, vcpu.fd));
    }

    fn make(&self, number: u64) -> io::Result<VcpuFd> {
        let refused = |why| error("a vCPU", why);
        let fd = self.vm.create_vcpu(number).map_err(refused)?;
        let cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused)?;
        fd.set_cpuid2(&cpuid).map_err(refused)?;
        let mut system = fd.get_sregs().map_err(refused)?;
        system.cr3 = PML4;
        // Physical-address extension; paging and protection with the bits that are always set; long mode, active.
        system.cr4 = 1 << 5;
        system.cr0 = 0x8000_0033;
        system.efer = (1 << 8) | (1 << 10);
        let segment = |selector, type_, l, db| kvm_segment {
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            dpl: 3,
            db,
            s: 1,
            l,
            g: 1,
            ..kvm_segment::default()
        };
        system.cs = segment(CODE_SELECTOR, 11, 1, 0);
        let data = segment(DATA_SELECTOR, 3, 0, 1);
        (system.ds, system.es, system.ss) = (data, data, data);
        (system.fs, system.gs) = (data, data);
        system.tr = kvm_segment {
            limit: 0x67,
            selector: 0x30,
            type_: 11,
            present: 1,
            ..kvm_segment::default()
        };
        (system.gdt.base, system.gdt.limit) = (GDT, 0x3f);
        fd.set_sregs(&system).map_err(refused)?;
        Ok(fd)
    }

    /// Calls `see` with the offset of every page that was written since the last time.
    pub(crate) fn dirty(&self, mut see: impl FnMut(u64)) -> io::Result<()> {
        let words = self
            .vm
            .get_dirty_log(SLOT, self.len as usize)
            .map_err(|why| error("the dirty log", why))?;
        for (word, mut bits) in words.into_iter().enumerate() {
            while bits != 0 {
                see((word as u64 * 64 + u64::from(bits.trailing_zeros())) * 4096);
                bits &= bits - 1;
            }
        }
        Ok(())
    }
}

/// The first 2 MiB, for a guest with so many bytes above 4 GiB.
fn low_memory(len: u64) -> io::Result<GuestMemoryMmap<()>> {
    let low = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), LOW)])
        .map_err(|why| error("low memory", why))?;
    let put = |at: u64, word: u64| {
        low.write_obj(word, GuestAddress(at))
            .map_err(|why| error("low memory", why))
    };
    let gib = (BASE + len).div_ceil(1 << 30);
    if gib > MOST_GIB {
        return Err(error("guest memory", "60 GiB at most"));
    }
    put(PML4, PDPT | TABLE)?;
    for gib in 0..gib {
        let directory = DIRECTORIES + gib * 4096;
        put(PDPT + gib * 8, directory | TABLE)?;
        for entry in 0..512 {
            put(
                directory + entry * 8,
                (gib << 30) | (entry << 21) | TABLE | LARGE,
            )?;
        }
    }
    // Level 3: code, data; the task state.
    put(GDT + 0x18, 0x00af_fb00_0000_ffff)?;
    put(GDT + 0x20, 0x00cf_f300_0000_ffff)?;
    put(GDT + 0x30, 0x0000_8b00_0000_0067)?;
    low.write_slice(code::bytes(), GuestAddress(CODE))
        .map_err(|why| error("the program", why))?;
    Ok(low)
}

/// The registers of a guest that begins, or goes on.
fn registers(state: &State) -> kvm_regs {
    let Some(all) = state.registers else {
        return kvm_regs {
            rip: CODE,
            // I/O privilege level 3, and the bit that is always set.
            rflags: 0x3002,
            rsp: 0x8000,
            rdi: BASE + state.first,
            rsi: state.pages,
            rbx: state.page,
            rbp: BASE,
            r8: state.pass,
            r9: state.passes,
            r10: state.wrong,
            r11: 0x9E37_79B9_7F4A_7C15,
            r13: 0xD6E8_FEB8_6659_FD93,
            r14: u64::from(state.writes),
            ..kvm_regs::default()
        };
    };
    let [
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        _,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    ] = all;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        // May have been raised since.
        r9: state.passes,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    }
}

/// A vCPU.
pub(crate) struct Vcpu {
    number: u64,
    fd: VcpuFd,
}

impl Vcpu {
    /// Runs until the program is done or is to stop, and notes where it stands. Counts in `left` how often it has left KVM.
    pub(crate) fn run(
        &mut self,
        state: &mut State,
        stop: &AtomicBool,
        left: &AtomicU64,
    ) -> io::Result<()> {
        let mut done = false;
        while !done && !stop.load(Ordering::Acquire) {
            let ran = self.fd.run();
            left.fetch_add(1, Ordering::Release);
            match ran {
                Ok(VcpuExit::IoOut(code::DONE, _)) => done = true,
                Ok(exit) => {
                    return Err(error(
                        "the guest left in a way of its own",
                        format!("{exit:?}"),
                    ));
                }
                Err(why) if matches!(why.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(why) => return Err(error("the guest could not run", why)),
            }
        }
        let now = self
            .fd
            .get_regs()
            .map_err(|why| error("its registers", why))?;
        (state.page, state.pass, state.wrong) = (now.rbx, now.r8, now.r10);
        state.registers = (!done).then_some([
            now.rax, now.rbx, now.rcx, now.rdx, now.rsi, now.rdi, now.rsp, now.rbp, now.r8, now.r9,
            now.r10, now.r11, now.r12, now.r13, now.r14, now.r15, now.rip, now.rflags,
        ]);
        Ok(())
    }
}
