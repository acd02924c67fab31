//! What PCI classes and the vendors of disks are called.
//!
//! A handful of names, no database: a class says what a function is, and the kernel's driver knows the model.

/// What a class code (24 bits: class, subclass, interface) is, in a few words.
pub(super) fn class_name(class: u32) -> &'static str {
    match (class >> 8, class & 0xff) {
        (0x0108, _) => "NVMe controller",
        (0x0106, 0x01) => "AHCI controller",
        (0x0106, _) => "SATA controller",
        (0x0100, _) => "SCSI controller",
        (0x0101, _) => "IDE controller",
        (0x0104, _) => "RAID controller",
        (0x0107, _) => "SAS controller",
        (0x0200, _) => "Ethernet controller",
        (0x0207, _) => "InfiniBand controller",
        (0x0300..=0x03ff, _) => "display controller",
        (0x0403, _) => "audio device",
        (0x0500, _) => "RAM controller",
        (0x0502, _) => "CXL memory",
        (0x0600, _) => "host bridge",
        (0x0601, _) => "ISA bridge",
        (0x0604, _) => "PCI bridge",
        (0x0806, _) => "IOMMU",
        (0x0c03, _) => "USB controller",
        (0x0c05, _) => "SMBus",
        (0x1200..=0x12ff, _) => "accelerator",
        (family, _) => match family >> 8 {
            0x01 => "storage controller",
            0x02 => "network controller",
            0x04 => "multimedia controller",
            0x05 => "memory controller",
            0x06 => "bridge",
            0x07 => "communication controller",
            0x08 => "system peripheral",
            0x09 => "input device",
            0x0c => "serial bus controller",
            0x10 => "encryption controller",
            0x11 => "signal processing controller",
            _ => "PCI function",
        },
    }
}

/// Who makes storage controllers; `None` for everybody else.
pub(super) fn vendor_name(vendor: u16) -> Option<&'static str> {
    Some(match vendor {
        0x025e => "Solidigm",
        0x1000 => "Broadcom",
        0x1022 => "AMD",
        0x10de => "NVIDIA",
        0x10ec => "Realtek",
        0x1179 => "Toshiba",
        0x126f => "Silicon Motion",
        0x1344 => "Micron",
        0x1414 => "Microsoft",
        0x144d => "Samsung",
        0x14a4 => "Lite-On",
        0x15b3 => "Mellanox",
        0x15b7 => "SanDisk",
        0x1987 => "Phison",
        0x1ae0 => "Google",
        0x1af4 | 0x1b36 => "Red Hat",
        0x1b21 => "ASMedia",
        0x1b4b => "Marvell",
        0x1b96 => "Western Digital",
        0x1bb1 => "Seagate",
        0x1c58 => "HGST",
        0x1c5c => "SK hynix",
        0x1cc1 => "ADATA",
        0x1d0f => "Amazon",
        0x1e0f => "KIOXIA",
        0x2646 => "Kingston",
        0x8086 => "Intel",
        0xc0a9 => "Crucial",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_told_from_the_rest() {
        let names = [0x01_0802, 0x01_0601, 0x01_0600, 0x02_0000, 0x06_0400, 0x01_ff00, 0xff_0000];
        assert_eq!(
            names.map(class_name),
            [
                "NVMe controller",
                "AHCI controller",
                "SATA controller",
                "Ethernet controller",
                "PCI bridge",
                "storage controller",
                "PCI function"
            ]
        );
    }
}
