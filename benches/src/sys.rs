//! What a measurement needs from the operating system: a thread's processor time, whether it was interrupted, where it
//! runs, and how much memory there is.

// UNSAFETY: system calls through libc.
#![allow(unsafe_code)]

use std::time::Duration;

/// Processor time that the calling thread has used so far.
///
/// # Panics
///
/// If the system is older than Linux 2.6.12, which brought this clock.
pub fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the result and outlives the call.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(failed, 0, "no processor clock of a thread");
    // The clock never runs below zero and its nanoseconds stay below a second.
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// How often the calling thread has been taken off its processor against its will.
///
/// # Panics
///
/// If the system is older than Linux 2.6.26, which brought this count.
pub fn preemptions() -> u64 {
    // SAFETY: an `rusage` is made of integers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a valid place for the result and outlives the call.
    let failed = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    assert_eq!(failed, 0, "no resource usage of a thread");
    usage.ru_nivcsw as u64
}

/// Ties the calling thread to processor `cpu`.
///
/// # Errors
///
/// What the operating system says, for instance if there is no such processor.
pub fn pin(cpu: usize) -> std::io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: a `cpu_set_t` is an array of integers, for which zero is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `cpu` is below `CPU_SETSIZE`, checked above.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: `set` is a valid set of the size given and outlives the call; 0 is the calling thread.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The processors that the calling thread may run on, in order; none if the system does not tell.
pub fn allowed() -> Vec<usize> {
    // SAFETY: a `cpu_set_t` is an array of integers, for which zero is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid place of the size given for the result and outlives the call; 0 is the calling thread.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) } != 0 {
        return Vec::new();
    }
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: the number is below `CPU_SETSIZE`.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect()
}

/// Has sleeps of the calling thread, and of threads that it starts from now on, end as soon as their time is over instead of
/// up to 50 microseconds later.
///
/// # Errors
///
/// What the operating system says.
pub fn wake_precisely() -> std::io::Result<()> {
    // 0 would mean the default.
    let slack: libc::c_ulong = 1;
    // SAFETY: this option takes one number and touches no memory.
    match unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, slack) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Bytes of memory that can be used without swapping, or `None` if the system does not tell.
pub fn available_memory() -> Option<u64> {
    memory_info("MemAvailable:")
}

/// Bytes of memory that the system has, or `None` if it does not tell.
pub fn total_memory() -> Option<u64> {
    memory_info("MemTotal:")
}

/// Bytes of the largest cache of the first processor, or `None` if the system does not tell.
pub fn largest_cache() -> Option<u64> {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    caches
        .filter_map(|cache| {
            let size = std::fs::read_to_string(cache.ok()?.path().join("size")).ok()?;
            let kib: u64 = size.trim().strip_suffix('K')?.parse().ok()?;
            kib.checked_mul(1024)
        })
        .max()
}

/// Bytes of the heap that are in use, or `None` if the C library does not tell.
pub fn heap() -> Option<u64> {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: the call takes nothing and returns numbers.
        let info = unsafe { libc::mallinfo2() };
        // Of the arena, and in mappings of their own.
        u64::try_from(info.uordblks + info.hblkhd).ok()
    }
    #[cfg(not(target_env = "gnu"))]
    None
}

fn memory_info(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_time_is_of_this_thread() {
        let before = thread_time();
        std::thread::sleep(Duration::from_millis(50));
        assert!(
            thread_time() - before < Duration::from_millis(40),
            "sleeping uses no processor time"
        );
        let spun = std::time::Instant::now();
        while spun.elapsed() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        assert!(thread_time() > before, "spinning does");
    }

    #[test]
    fn a_pinned_thread_may_run_there_only() {
        let allowed_at_first = allowed();
        let last = *allowed_at_first.last().expect("this runs somewhere");
        let pinned = std::thread::spawn(move || pin(last).map(|()| allowed()));
        let pinned = pinned.join().expect("no panic").expect("it may run there");
        assert_eq!(pinned, [last]);
        assert_eq!(allowed(), allowed_at_first, "others stay free");
    }

    #[test]
    fn pinning_to_nowhere_fails() {
        assert!(pin(usize::MAX).is_err());
        assert!(pin(libc::CPU_SETSIZE as usize - 1).is_err());
    }

    #[test]
    #[cfg(target_env = "gnu")]
    fn the_heap_has_what_is_on_it() {
        let before = heap().unwrap();
        let large = std::hint::black_box(vec![1_u8; 64 << 20]);
        assert!(heap().unwrap() >= before.saturating_sub(8 << 20) + large.len() as u64);
    }

    #[test]
    fn there_is_memory() {
        let total = total_memory().unwrap();
        assert!(available_memory().is_some_and(|bytes| bytes > 1 << 20 && bytes < total));
    }
}
