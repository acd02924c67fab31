//! Where a PCI function is: domain, bus, device, function.
//!
//! **Invariant:** an address is made of numbers, so its text can be part of a path whatever a user wrote.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The address of a PCI function, shown as the kernel does: `0000:01:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Usually 0; behind a volume management device 0x10000 and more.
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// 0 to 31.
    pub device: u8,
    /// 0 to 7.
    pub function: u8,
}

/// What is no address; the beginning of it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a PCI address; write it as 0000:01:00.0 (`ringmillctl pci list` shows them)")]
pub struct PciAddressError(pub String);

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciAddress { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

impl FromStr for PciAddress {
    type Err = PciAddressError;

    fn from_str(text: &str) -> Result<PciAddress, PciAddressError> {
        parse(text).ok_or_else(|| PciAddressError(text.chars().take(64).collect()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (place, function) = text.split_once('.')?;
    let mut parts = place.rsplit(':');
    let device = hex(parts.next()?, 2)?;
    let bus = hex(parts.next()?, 2)?;
    // Domains of VMD and of hypervisors have more than four digits.
    let domain = parts.next().map_or(Some(0), |domain| hex(domain, 8))?;
    let function = hex(function, 1)?;
    if parts.next().is_some() || device > 31 || function > 7 {
        return None;
    }
    Some(PciAddress {
        domain,
        bus: u8::try_from(bus).ok()?,
        device: u8::try_from(device).ok()?,
        function: u8::try_from(function).ok()?,
    })
}

/// Digits only: `from_str_radix` would take a sign.
fn hex(digits: &str, len_max: usize) -> Option<u32> {
    let fits = (1..=len_max).contains(&digits.len());
    let are_digits = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    (fits && are_digits).then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown_as_the_kernel_does() {
        for (text, shown) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("01:00.0", "0000:01:00.0"),
            ("00:1F.7", "0000:00:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
            ("1:0.0", "0000:01:00.0"),
            ("ffffffff:ff:1f.7", "ffffffff:ff:1f.7"),
        ] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            ".",
            "01:00",
            "01:00.",
            ":01:00.0",
            ":00.0",
            "01:00.0.0",
            "01:00.8",
            "01:20.0",
            "001:00.0",
            "100:00.0",
            "0000:0000:01:00.0",
            "+1:00.0",
            "01:+1.0",
            "/dev/nvme0n1",
            "01:00.0 ",
            "../01:00.0",
            "0000:01:00.0/..",
            "123456789:01:00.0",
            "é1:00.0",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text:?}");
        }
    }
}
