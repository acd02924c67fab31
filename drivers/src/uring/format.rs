//! Recognizes image formats that must not be served as raw disks by mistake.
//!
//! Flow: the image's first bytes → the format's name. Magic numbers from QEMU's `block/{qcow2,vmdk,vhdx,vdi,vpc,qed}.c`.

/// Bytes that [`detect`] wants to see.
pub(super) const HEAD_BYTES: usize = 512;

const MAGICS: [(usize, &[u8], &str); 8] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    // 0xbeda107f, little-endian.
    (0x40, &[0x7f, 0x10, 0xda, 0xbe], "VDI"),
];

/// The format whose magic the image starts with.
pub(super) fn detect(head: &[u8]) -> Option<&'static str> {
    MAGICS
        .iter()
        .find(|(at, magic, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)))
        .map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_from_raw_disks() {
        assert_eq!(detect(b"QFI\xfb\0\0\0\x03"), Some("qcow2"));
        assert_eq!(detect(b"# Disk DescriptorFile\nversion=1"), Some("VMDK"));
        let mut vdi = b"<<< Oracle VM VirtualBox Disk Image >>>\n".to_vec();
        vdi.resize(0x40, 0);
        assert_eq!(detect(&vdi), None);
        vdi.extend(0xbeda_107f_u32.to_le_bytes());
        assert_eq!(detect(&vdi), Some("VDI"));
        assert_eq!(detect(&[0; 512]), None);
        assert_eq!(detect(b"QF"), None);
        assert_eq!(detect(b""), None);
    }
}
