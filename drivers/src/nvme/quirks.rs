//! What known controllers do wrong, by PCI vendor and device.
//!
//! Only what a public document explains is here, and every quirk is applied somewhere. The usual documents are the tables of
//! Linux (`drivers/nvme/host/pci.c`, and the messages of the commits that added the lines) and of SPDK
//! (`lib/nvme/nvme_quirks.c` and the comments on the flags in `nvme_internal.h`).

use std::time::Duration;

/// Workarounds in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Quirks(u16);

impl Quirks {
    pub(super) const NONE: Quirks = Quirks(0);
    /// CSTS must not be looked at for a while after CC.EN was cleared.
    pub(super) const DELAY_BEFORE_READY: Quirks = Quirks(1);
    /// Attaching starts with a pause: it is not ready after the reset by VFIO.
    pub(super) const DELAY_BEFORE_INIT: Quirks = Quirks(1 << 1);
    /// Write zeroes is announced, but does not work, or stalls everything.
    pub(super) const NO_WRITE_ZEROES: Quirks = Quirks(1 << 2);
    /// Commands that cross a multiple of a vendor specific size are slow; NOIOB does not tell.
    pub(super) const STRIPES: Quirks = Quirks(1 << 3);
    /// Identify knows CNS 0 and 1 only.
    pub(super) const IDENTIFY_0_AND_1: Quirks = Quirks(1 << 4);
    /// Identifiers of namespaces are not unique.
    pub(super) const BOGUS_IDENTITY: Quirks = Quirks(1 << 5);
    /// Scatter-gather lists are announced, but do not work.
    pub(super) const NO_SGL: Quirks = Quirks(1 << 6);
    /// A queue is not usable at once after it was created.
    pub(super) const DELAY_AFTER_QUEUES: Quirks = Quirks(1 << 7);
    /// Shutdown never reports that it is complete.
    pub(super) const SHUTDOWN_SILENT: Quirks = Quirks(1 << 8);

    /// It must not be asked for the descriptors of a namespace.
    pub(super) const NO_DESCRIPTORS: Quirks = Quirks(1 << 9);

    const WORDS: [(Quirks, &'static str); 10] = [
        (Quirks::DELAY_BEFORE_READY, "pause before the ready bit is read"),
        (Quirks::DELAY_BEFORE_INIT, "pause before it is set up"),
        (Quirks::NO_WRITE_ZEROES, "no write zeroes"),
        (Quirks::STRIPES, "commands are cut at stripes"),
        (Quirks::IDENTIFY_0_AND_1, "only the first two identify structures"),
        (Quirks::BOGUS_IDENTITY, "identities of namespaces are made up"),
        (Quirks::NO_SGL, "no scatter-gather lists"),
        (Quirks::DELAY_AFTER_QUEUES, "pause after queues are made"),
        (Quirks::NO_DESCRIPTORS, "no descriptors of namespaces"),
        (Quirks::SHUTDOWN_SILENT, "its shutdown is not waited for"),
    ];

    const fn and(self, other: Quirks) -> Quirks {
        Quirks(self.0 | other.0)
    }

    /// True when `quirk` is in force.
    pub(super) const fn has(self, quirk: Quirks) -> bool {
        self.0 & quirk.0 != 0
    }

    /// For status output.
    pub(super) fn words(self) -> Vec<&'static str> {
        Self::WORDS.iter().filter(|(quirk, _)| self.has(*quirk)).map(|(_, words)| *words).collect()
    }

    /// Those of a controller.
    pub(super) fn of(vendor: u16, device: u16) -> Quirks {
        let matches = |line: &&Line| line.vendor == vendor && line.devices.contains(&device);
        let by_device = TABLE.iter().filter(matches).fold(Quirks::NONE, |all, l| all.and(l.quirks));
        let whole = VENDORS.iter().filter(|(of, _)| *of == vendor);
        whole.fold(by_device, |all, (_, quirks)| all.and(*quirks))
    }
}

/// QUIRK: Linux, `NVME_QUIRK_DELAY_AMOUNT`: 2.3 s.
pub(super) const READY_DELAY: Duration = Duration::from_millis(2300);
/// QUIRK: SPDK, on NVME_QUIRK_DELAY_BEFORE_INIT: 2 s.
pub(super) const INIT_DELAY: Duration = Duration::from_secs(2);
/// QUIRK: SPDK, on NVME_QUIRK_DELAY_AFTER_QUEUE_ALLOC: 100 ms.
pub(super) const QUEUES_DELAY: Duration = Duration::from_millis(100);

struct Line {
    vendor: u16,
    devices: &'static [u16],
    quirks: Quirks,
}

const fn line(vendor: u16, devices: &'static [u16], quirks: Quirks) -> Line {
    Line { vendor, devices, quirks }
}

const INTEL: u16 = 0x8086;
const SAMSUNG: u16 = 0x144d;
const SK_HYNIX: u16 = 0x1c5c;

const TABLE: &[Line] = &[
    // QUIRK: Linux and SPDK, NVME_QUIRK_DELAY_BEFORE_CHK_RDY: they must not be asked too early after a reset. Seagate Nytro,
    // HGST SN100 and SN200, Memblaze PBlaze4; Samsung X5, PM1725, PM1725a and a relative.
    line(0x1bb1, &[0x0100], Quirks::DELAY_BEFORE_READY),
    line(0x1c58, &[0x0003, 0x0023], Quirks::DELAY_BEFORE_READY),
    line(0x1c5f, &[0x0540], Quirks::DELAY_BEFORE_READY),
    line(SAMSUNG, &[0xa808, 0xa821, 0xa822, 0xa826], Quirks::DELAY_BEFORE_READY),
    // QUIRK: SPDK, NVME_QUIRK_DELAY_BEFORE_INIT: "not ready after VFIO reset". Intel P3500 to P3700, P3520, P4500, P4600.
    line(INTEL, &[0x0953, 0x0a53, 0x0a54], Quirks::DELAY_BEFORE_INIT),
    // QUIRK: Linux commits 106198edb74c and 99466e708ddc (NVME_QUIRK_STRIPE_SIZE), SPDK NVME_INTEL_QUIRK_STRIPING: byte 3 of
    // the vendor specific part of identify controller is the stripe, 2^n pages.
    line(INTEL, &[0x0953, 0x0a53, 0x0a54, 0x0a55], Quirks::STRIPES),
    // QUIRK: Linux, NVME_QUIRK_DISABLE_WRITE_ZEROES: Intel 600P, SK hynix PC400 (commit 5611ec2b9814: "operation not supported"
    // for what it offers) and BC901 (a wipe takes 20 minutes), SanDisk Skyhawk (commit 02ca079c9931).
    line(INTEL, &[0xf1a5], Quirks::NO_WRITE_ZEROES),
    line(SK_HYNIX, &[0x1504, 0x1d59], Quirks::NO_WRITE_ZEROES),
    line(0x15b7, &[0x2001], Quirks::NO_WRITE_ZEROES),
    // QUIRK: Linux, NVME_QUIRK_BOGUS_NID: several disks of the same make have the same identity. Intel P4500 and P4600 (commit
    // 5c3f4066462a), ADATA SX6000PNP, SK hynix P31 (commit c4f01a776b28).
    line(INTEL, &[0x0a54], Quirks::BOGUS_IDENTITY),
    line(0x10ec, &[0x5763], Quirks::BOGUS_IDENTITY),
    line(SK_HYNIX, &[0x174a], Quirks::BOGUS_IDENTITY),
    // QUIRK: Linux, NVME_QUIRK_NO_NS_DESC_LIST: a Silicon Motion controller.
    line(0x126f, &[0x2263], Quirks::NO_DESCRIPTORS),
    // QUIRK: Linux, NVME_QUIRK_IDENTIFY_CNS and others: QEMU's controller under Intel's id, as it was once.
    line(
        INTEL,
        &[0x5845],
        Quirks::IDENTIFY_0_AND_1.and(Quirks::NO_WRITE_ZEROES).and(Quirks::BOGUS_IDENTITY),
    ),
    // QUIRK: SPDK, NVME_QUIRK_IDENTIFY_CNS: CNEX's open-channel devices.
    line(0x1d1d, &[0x1f1f], Quirks::IDENTIFY_0_AND_1),
    // QUIRK: SPDK, NVME_QUIRK_DELAY_AFTER_QUEUE_ALLOC: VirtualBox.
    line(0x80ee, &[0x4e56], Quirks::DELAY_AFTER_QUEUES),
    // QUIRK: SPDK, NVME_QUIRK_SHST_COMPLETE: VMware's controller does not set it in reasonable time.
    line(0x15ad, &[0x07f0], Quirks::SHUTDOWN_SILENT),
];

/// QUIRK: SPDK, NVME_QUIRK_NOT_USE_SGL: Huawei, all devices.
const VENDORS: &[(u16, Quirks)] = &[(0x19e5, Quirks::NO_SGL)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_one_device_add_up_and_others_have_none() {
        let p3700 = Quirks::of(0x8086, 0x0953);
        assert!(p3700.has(Quirks::STRIPES) && p3700.has(Quirks::DELAY_BEFORE_INIT));
        assert!(!p3700.has(Quirks::NO_WRITE_ZEROES));
        assert_eq!(p3700.words().len(), 2);
        assert!(Quirks::of(0x19e5, 0x1234).has(Quirks::NO_SGL));
        assert_eq!(Quirks::of(0x144d, 0xa80a), Quirks::NONE);
        assert_eq!(Quirks::of(0xffff, 0xffff), Quirks::NONE);
    }

    #[test]
    fn every_quirk_is_somebodys_and_has_words() {
        let all = TABLE.iter().map(|l| l.quirks).chain(VENDORS.iter().map(|(_, q)| *q));
        let all = all.fold(Quirks::NONE, Quirks::and);
        assert_eq!(all.words().len(), Quirks::WORDS.len());
        let flags = Quirks::WORDS.iter().fold(Quirks::NONE, |sum, (quirk, _)| sum.and(*quirk));
        assert_eq!(all, flags);
        assert!(TABLE.iter().all(|line| line.quirks != Quirks::NONE));
    }
}
