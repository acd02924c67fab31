//! A boot sector that exercises a disk through the firmware's own driver and reports on the first serial port.
//!
//! SeaBIOS loads it to 0000:7c00 and jumps to it with the drive's number in DL. It reads the payload by cylinder, head
//! and sector (INT 13h AH=02h) and by LBA, many sectors at once (AH=42h), checks a checksum over it, reads the disk's
//! last sector, writes one sector (AH=43h), reads it back and compares. Then it prints [`TOKEN_OK`] or [`TOKEN_FAILED`]
//! with the letter of the step. Assembled here, byte by byte, so that no assembler is needed.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::LabError;

/// Bytes per sector, for BIOS and virtio alike.
pub const SECTOR_BYTES: usize = 512;

/// Sectors from LBA 1 on that the loader reads in one request.
pub const PAYLOAD_SECTORS: u16 = 32;

/// The sector that the loader writes: a copy of the payload's second sector.
pub const SCRATCH_LBA: u64 = 40;

/// The start of the last sector.
pub const LAST_SECTOR_TEXT: &str = "ringmill: the last sector";

/// Printed when everything was as expected.
pub const TOKEN_OK: &str = "RINGMILL BOOT OK";

/// Printed otherwise, with the letter of the step: C(HS read), M(ulti-sector read), S(ame data by both), D(ata's
/// checksum), L(ast sector), W(rite), R(ead back).
pub const TOKEN_FAILED: &str = "RINGMILL BOOT FAILED AT ";

/// Where the BIOS loads the sector.
const ORIGIN: u16 = 0x7c00;
/// Where one sector goes: by CHS, the last one, the one read back.
const CHS_BUFFER: u16 = 0x8000;
const LAST_BUFFER: u16 = 0x8200;
const BACK_BUFFER: u16 = 0x8400;
/// The payload's segment; ES points there after the first read.
const PAYLOAD_SEGMENT: u16 = 0x1000;

/// The payload: what `seq 1 100000 | head -c 16384` prints, so that a guest can make it too.
#[must_use]
pub fn payload() -> Vec<u8> {
    let len = usize::from(PAYLOAD_SECTORS) * SECTOR_BYTES;
    let mut bytes: Vec<u8> =
        (1..100_000_u32).flat_map(|number| format!("{number}\n").into_bytes()).take(len).collect();
    bytes.resize(len, 0);
    bytes
}

/// Puts boot sector, payload and last sector on a disk image of `size_bytes`.
///
/// # Errors
/// The image cannot be written.
pub fn install(image: &Path, size_bytes: u64) -> Result<(), LabError> {
    let sectors_count = size_bytes / SECTOR_BYTES as u64;
    let what = format!("writing the boot sector to {}", image.display());
    let write = || {
        let file = OpenOptions::new().write(true).open(image)?;
        file.write_all_at(&boot_sector(sectors_count), 0)?;
        file.write_all_at(&payload(), SECTOR_BYTES as u64)?;
        file.write_all_at(LAST_SECTOR_TEXT.as_bytes(), (sectors_count - 1) * SECTOR_BYTES as u64)
    };
    write().map_err(LabError::io(what))
}

/// The boot sector for a disk of that many sectors.
#[must_use]
pub fn boot_sector(sectors_count: u64) -> [u8; SECTOR_BYTES] {
    let mut code = Assembler::default();
    // Interrupts off while the stack moves; all segments 0; stack below us; strings go upwards.
    code.emit(&[0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]); // cli; xor ax,ax; mov ds,ax; es; ss
    code.emit(&[0xbc]).word(ORIGIN).emit(&[0xfb, 0xfc]); // mov sp,7c00; sti; cld
    code.emit(&[0x88, 0x16]).address("drive"); // mov [drive],dl

    code.step(b'C');
    code.emit(&[0xb8, 0x01, 0x02]); // mov ax,0201: read one sector
    code.emit(&[0xb9, 0x02, 0x00, 0xb6, 0x00]); // mov cx,0002: cylinder 0, sector 2; mov dh,0: head 0
    code.emit(&[0xbb]).word(CHS_BUFFER); // mov bx,buffer
    code.int13_or_fail();

    code.step(b'M');
    code.disk_packet(0x42, "packet_payload");

    code.step(b'S');
    code.emit(&[0xb8]).word(PAYLOAD_SEGMENT).emit(&[0x8e, 0xc0]); // mov ax,segment; mov es,ax
    code.compare_sector(CHS_BUFFER, 0);

    code.step(b'D');
    code.emit(&[0xb9]).word(PAYLOAD_SECTORS * 256); // mov cx,words
    code.emit(&[0x31, 0xff, 0x31, 0xdb]); // xor di,di; xor bx,bx
    code.emit(&[0xd1, 0xc3]); // again: rol bx,1
    code.emit(&[0x26, 0x03, 0x1d]); // add bx,es:[di]
    code.emit(&[0x83, 0xc7, 0x02]); // add di,2
    code.emit(&[0xe2, 0xf6]); // loop again
    code.emit(&[0x81, 0xfb]).word(checksum(&payload())); // cmp bx,checksum
    code.fail_if_not_equal();

    code.step(b'L');
    code.disk_packet(0x42, "packet_last");
    for (index, pair) in LAST_SECTOR_TEXT.as_bytes().chunks_exact(2).enumerate().take(4) {
        let offset = u16::try_from(2 * index).unwrap_or(0);
        code.emit(&[0x81, 0x3e]).word(LAST_BUFFER + offset).emit(pair); // cmp word [buffer + offset],text
        code.fail_if_not_equal();
    }

    code.step(b'W');
    code.emit(&[0xb0, 0x00]); // mov al,0: no verify
    code.disk_packet(0x43, "packet_write");

    code.step(b'R');
    code.disk_packet(0x42, "packet_back");
    code.compare_sector(BACK_BUFFER, 0x200);

    code.emit(&[0xbe]).address("text_ok"); // mov si,text
    code.label("report");
    code.emit(&[0xac, 0x84, 0xc0]); // lodsb; test al,al
    code.emit(&[0x74, 0x11]); // jz halt
    code.emit(&[0x88, 0xc4, 0xba, 0xfd, 0x03]); // mov ah,al; mov dx,3fd: the line status
    code.emit(&[0xec, 0xa8, 0x20, 0x74, 0xfb]); // wait: in al,dx; test al,20: transmitter empty; jz wait
    code.emit(&[0xb2, 0xf8, 0x88, 0xe0, 0xee]); // mov dl,f8: the data port; mov al,ah; out dx,al
    code.emit(&[0xeb, 0xea]); // jmp report
    code.emit(&[0xf4, 0xeb, 0xfd]); // halt: hlt; jmp halt

    code.label("fail");
    code.emit(&[0xbe]).address("text_failed"); // mov si,text
    code.emit(&[0xe9]).relative("report"); // jmp report

    // Disk address packets: size, count, buffer (offset, segment), LBA.
    code.packet("packet_payload", PAYLOAD_SECTORS, 0, PAYLOAD_SEGMENT, 1);
    code.packet("packet_last", 1, LAST_BUFFER, 0, sectors_count.saturating_sub(1));
    code.packet("packet_write", 1, 0x200, PAYLOAD_SEGMENT, SCRATCH_LBA);
    code.packet("packet_back", 1, BACK_BUFFER, 0, SCRATCH_LBA);
    code.label("drive");
    code.emit(&[0]);
    code.label("text_ok");
    code.emit(TOKEN_OK.as_bytes()).emit(b"\r\n\0");
    code.label("text_failed");
    code.emit(TOKEN_FAILED.as_bytes());
    code.label("step");
    code.emit(b"?\r\n\0");
    code.finish()
}

/// As the loader computes it: rotate, then add each little-endian word.
fn checksum(bytes: &[u8]) -> u16 {
    bytes.chunks_exact(2).fold(0_u16, |sum, pair| {
        sum.rotate_left(1).wrapping_add(u16::from_le_bytes([pair[0], pair[1]]))
    })
}

/// Bytes, labels and the places that want a label's address.
#[derive(Default)]
struct Assembler {
    bytes: Vec<u8>,
    labels: Vec<(&'static str, u16)>,
    fixups: Vec<Fixup>,
}

struct Fixup {
    at: usize,
    label: &'static str,
    is_relative: bool,
}

impl Assembler {
    fn emit(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn word(&mut self, value: u16) -> &mut Self {
        self.emit(&value.to_le_bytes())
    }

    fn label(&mut self, name: &'static str) {
        let here = ORIGIN + self.offset(self.bytes.len());
        self.labels.push((name, here));
    }

    /// A word that becomes the label's address.
    fn address(&mut self, label: &'static str) -> &mut Self {
        self.fixups.push(Fixup { at: self.bytes.len(), label, is_relative: false });
        self.word(0)
    }

    /// A word that becomes the distance from its end to the label.
    fn relative(&mut self, label: &'static str) -> &mut Self {
        self.fixups.push(Fixup { at: self.bytes.len(), label, is_relative: true });
        self.word(0)
    }

    fn step(&mut self, letter: u8) {
        self.emit(&[0xc6, 0x06]).address("step").emit(&[letter]); // mov byte [step],letter
    }

    fn int13_or_fail(&mut self) {
        self.emit(&[0xcd, 0x13]); // int 13
        self.emit(&[0x0f, 0x82]).relative("fail"); // jc fail
    }

    fn fail_if_not_equal(&mut self) {
        self.emit(&[0x0f, 0x85]).relative("fail"); // jne fail
    }

    fn disk_packet(&mut self, function: u8, packet: &'static str) {
        self.emit(&[0xbe]).address(packet); // mov si,packet
        self.emit(&[0xb4, function]); // mov ah,function
        self.emit(&[0x8a, 0x16]).address("drive"); // mov dl,[drive]
        self.int13_or_fail();
    }

    /// Compares a sector at 0000:`ours` with one at ES:`theirs`.
    fn compare_sector(&mut self, ours: u16, theirs: u16) {
        self.emit(&[0xbe]).word(ours); // mov si,ours
        self.emit(&[0xbf]).word(theirs); // mov di,theirs
        self.emit(&[0xb9]).word(256); // mov cx,256 words
        self.emit(&[0xf3, 0xa7]); // repe cmpsw
        self.fail_if_not_equal();
    }

    fn packet(&mut self, label: &'static str, sectors: u16, offset: u16, segment: u16, lba: u64) {
        self.label(label);
        self.emit(&[0x10, 0]).word(sectors).word(offset).word(segment).emit(&lba.to_le_bytes());
    }

    fn offset(&self, at: usize) -> u16 {
        assert!(at <= SECTOR_BYTES - 2, "the boot sector is full: {at} bytes");
        u16::try_from(at).unwrap_or(u16::MAX)
    }

    fn finish(mut self) -> [u8; SECTOR_BYTES] {
        for Fixup { at, label, is_relative } in std::mem::take(&mut self.fixups) {
            let target = self
                .labels
                .iter()
                .find(|(name, _)| *name == label)
                .map_or(0, |(_, address)| *address);
            assert!(target != 0, "no label {label}");
            let end = ORIGIN + self.offset(at + 2);
            let value = if is_relative { target.wrapping_sub(end) } else { target };
            self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        let mut sector = [0; SECTOR_BYTES];
        let len = usize::from(self.offset(self.bytes.len()));
        sector[..len].copy_from_slice(&self.bytes);
        // What the BIOS wants to see.
        sector[SECTOR_BYTES - 2..].copy_from_slice(&[0x55, 0xaa]);
        sector
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sector_is_bootable_and_knows_the_end_of_the_disk() {
        let sector = boot_sector(0x1_0000_0001);
        assert_eq!(sector[510..], [0x55, 0xaa]);
        let lba = 0x1_0000_0000_u64.to_le_bytes();
        assert!(sector.windows(8).any(|window| window == lba));
    }

    #[test]
    fn the_checksum_sees_swapped_sectors() {
        let good = payload();
        let mut swapped = good.clone();
        let (first, second) = swapped.split_at_mut(SECTOR_BYTES);
        first.swap_with_slice(&mut second[..SECTOR_BYTES]);
        assert_ne!(checksum(&good), checksum(&swapped));
    }

    #[test]
    fn the_payload_is_what_seq_prints() {
        assert!(payload().starts_with(b"1\n2\n3\n"));
        assert_eq!(payload().len(), usize::from(PAYLOAD_SECTORS) * SECTOR_BYTES);
    }
}
