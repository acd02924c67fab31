//! Addresses of PCI functions.
//!
//! **Invariant:** an address is made of numbers, so its text can be part of a path whatever a user wrote.

use std::fmt;

/// Domain, bus, device and function, as sysfs writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl PciAddress {
    /// Parses `0000:01:00.0` or `01:00.0`.
    pub fn parse(text: &str) -> Option<PciAddress> {
        let hex = |text: &str, len_max: usize| {
            let is_hex = (1..=len_max).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            is_hex.then(|| u32::from_str_radix(text, 16).ok()).flatten()
        };
        let (slot, function) = text.split_once('.')?;
        let mut parts = slot.rsplit(':');
        let (device, bus) = (hex(parts.next()?, 2)?, hex(parts.next()?, 2)?);
        // Domains of VMD and of hypervisors have more than four digits.
        let domain = parts.next().map_or(Some(0), |text| hex(text, 8))?;
        if parts.next().is_some() {
            return None;
        }
        let function = u8::try_from(hex(function, 1)?).ok().filter(|function| *function < 8)?;
        let device = u8::try_from(device).ok().filter(|device| *device < 32)?;
        Some(PciAddress { domain, bus: u8::try_from(bus).ok()?, device, function })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hexadecimal_digits_and_nothing_else() {
        for (text, shown) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("3B:1f.7", "0000:3b:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
        ] {
            let address = PciAddress::parse(text).map(|address| address.to_string());
            assert_eq!(address.as_deref(), Some(shown));
        }
        for text in [
            "",
            "01:00",
            "0000:01:00.8",
            "0000:01:20.0",
            "0000:100:00.0",
            "0000:01:+1.0",
            "../../x:01.0",
            "0000:00:01:00.0",
            "0000:01:00.0.0",
            "0000:01:00.",
            ":01:00.0",
            "/dev/nvme0n1",
        ] {
            assert_eq!(PciAddress::parse(text), None, "{text}");
        }
    }
}
