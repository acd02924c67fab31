//! Why the kernel would not lock memory: what this process has locked, what it may lock.
//!
//! In: `/proc/self/status` and the limit. Out: the numbers of the message. Read after a failure only.

use std::fs;

/// Whom the limit does not concern, as a bit of CapEff.
const CAP_IPC_LOCK: u32 = 14;

/// What the kernel counts for this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Locked {
    bytes: u64,
    is_exempt: bool,
}

fn parse(status: &str) -> Option<Locked> {
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    };
    let kib: u64 = field("VmLck")?.strip_suffix("kB")?.trim().parse().ok()?;
    let capabilities = u64::from_str_radix(field("CapEff")?, 16).ok()?;
    Some(Locked { bytes: kib.checked_mul(1024)?, is_exempt: capabilities >> CAP_IPC_LOCK & 1 == 1 })
}

/// When `len_bytes` more are too many for RLIMIT_MEMLOCK: the bytes needed in all, and the limit in words.
pub(super) fn exceeded(len_bytes: u64) -> Option<(u64, String)> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current?;
    let locked = parse(&fs::read_to_string("/proc/self/status").ok()?)?;
    need(locked, len_bytes, limit).map(|need| (need, words(limit)))
}

fn need(locked: Locked, len_bytes: u64, limit: u64) -> Option<u64> {
    let need = locked.bytes.saturating_add(len_bytes);
    (!locked.is_exempt && need > limit).then_some(need)
}

fn words(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_figures_are_read() {
        let status = "Name:\tx\nVmLck:\t      68 kB\nVmPin:\t 0 kB\nCapEff:\t00000000a80425fb\n";
        assert_eq!(parse(status), Some(Locked { bytes: 68 << 10, is_exempt: false }));
        let root = "VmLck:\t0 kB\nCapEff:\t000001ffffffffff\n";
        assert_eq!(parse(root), Some(Locked { bytes: 0, is_exempt: true }));
        for bad in ["", "VmLck:\t1 kB\n", "VmLck: x kB\nCapEff: 0\n", "VmLck: 1\nCapEff: 0\n"] {
            assert_eq!(parse(bad), None);
        }
        assert!(parse(&fs::read_to_string("/proc/self/status").unwrap()).is_some());
    }

    #[test]
    fn the_need_is_what_is_locked_and_what_is_to_come() {
        let locked = Locked { bytes: 1 << 20, is_exempt: false };
        assert_eq!(need(locked, 7 << 20, 8 << 20), None);
        assert_eq!(need(locked, (7 << 20) + 1, 8 << 20), Some((8 << 20) + 1));
        assert_eq!(need(Locked { is_exempt: true, ..locked }, u64::MAX, 8 << 20), None);
    }

    #[test]
    fn limits_are_said_in_words() {
        assert_eq!(words(65536), "64 KiB");
        assert_eq!(words(8 << 20), "8 MiB");
        assert_eq!(words(0), "0 bytes");
        assert_eq!(words(64 << 30), "64 GiB");
    }
}
