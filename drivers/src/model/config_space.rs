//! The PCI configuration space of the model: enough for a driver that looks at ids, class and capabilities.

use super::options::{ModelOptions, Vectors};

/// Conventional configuration space.
pub(super) const CONFIG_BYTES: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CAPABILITIES: usize = 0x34;
const PCI_EXPRESS: usize = 0x40;
const MSIX: usize = 0x80;
const MSI: usize = 0x90;

/// Command: memory space, bus master.
const MEMORY_SPACE: u8 = 1 << 1;
const BUS_MASTER: u8 = 1 << 2;

/// The space as it reads now.
pub(super) fn config_space(o: &ModelOptions, is_master: bool) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &o.pci_id.0.to_le_bytes());
    put(2, &o.pci_id.1.to_le_bytes());
    put(COMMAND, &[MEMORY_SPACE | if is_master { BUS_MASTER } else { 0 }]);
    // There is a list of capabilities.
    put(STATUS, &[1 << 4]);
    // Revision; NVM Express (02), non-volatile memory controller (08), mass storage (01).
    put(0x08, &[1, 0x02, 0x08, 0x01]);
    // BAR 0 and 1: 64 bits of memory.
    put(0x10, &0xf000_0004u32.to_le_bytes());
    put(0x2c, &o.pci_id.0.to_le_bytes());
    put(CAPABILITIES, &[u8::try_from(PCI_EXPRESS).unwrap_or(0)]);
    let interrupts = match o.vectors {
        Vectors::MsiX(_) => MSIX,
        Vectors::Msi => MSI,
        Vectors::None | Vectors::Intx => 0,
    };
    // PCI Express endpoint; device capabilities: role-based errors, function level reset.
    put(PCI_EXPRESS, &[0x10, u8::try_from(interrupts).unwrap_or(0), 2, 0]);
    put(PCI_EXPRESS + 4, &(1u32 << 28 | 1 << 15).to_le_bytes());
    match o.vectors {
        Vectors::MsiX(count) => {
            put(MSIX, &[0x11, 0]);
            put(MSIX + 2, &(count.max(1) - 1).to_le_bytes());
            // Table and pending bits in BAR 4.
            put(MSIX + 4, &4u32.to_le_bytes());
            put(MSIX + 8, &0x1004u32.to_le_bytes());
        }
        Vectors::Msi => put(MSI, &[0x05, 0, 0x80, 0]),
        Vectors::Intx => put(0x3d, &[1]),
        Vectors::None => {}
    }
    space
}
