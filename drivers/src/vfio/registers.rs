//! A BAR: windows where the kernel lets it be mapped, reads and writes of the device's descriptor elsewhere.
//!
//! Flow: the control thread makes it; reactors ring doorbells through it. Owner: shared; retired by the device's close.
//! **Invariant:** after [`VfioRegisters::retire`] nothing reaches the device, and nothing of the kernel's is held.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ringmill_core::mem::DeviceWindow;
use ringmill_core::units::{bytes_u64, usize_of};

use super::DeviceFile;
use super::capability::{Area, Region};
use crate::pci::Registers;

/// Registers of a BAR of a VFIO device.
#[derive(Debug)]
pub struct VfioRegisters {
    windows: Vec<Window>,
    len_bytes: usize,
    file: Arc<DeviceFile>,
    /// Where the BAR starts in the file.
    offset_bytes: u64,
}

#[derive(Debug)]
struct Window {
    first: usize,
    window: DeviceWindow,
}

/// What of the first `len_bytes` to map: areas that begin in it, as far as they are needed.
fn wanted(areas: &[Area], len_bytes: u64) -> Vec<Area> {
    areas
        .iter()
        .filter(|area| area.offset_bytes < len_bytes)
        .map(|area| {
            let need = (len_bytes - area.offset_bytes).next_multiple_of(4096);
            Area { len_bytes: area.len_bytes.min(need), ..*area }
        })
        .collect()
}

impl VfioRegisters {
    /// `len_bytes` of a region, which is no shorter.
    pub(super) fn new(file: &Arc<DeviceFile>, region: &Region, len_bytes: usize) -> VfioRegisters {
        let areas = wanted(&region.mappable, bytes_u64(len_bytes));
        let map = |area: &Area| {
            let offset_bytes = region.offset_bytes + area.offset_bytes;
            let len_bytes = usize_of(area.len_bytes);
            let window = file
                .with(|file| DeviceWindow::map(file, offset_bytes, len_bytes))
                .ok()?
                .inspect_err(|error| tracing::warn!("registers that cannot be mapped: {error}"))
                .ok()?;
            Some(Window { first: usize_of(area.offset_bytes), window })
        };
        VfioRegisters {
            windows: areas.iter().filter_map(map).collect(),
            len_bytes,
            file: Arc::clone(file),
            offset_bytes: region.offset_bytes,
        }
    }

    /// Bytes that are reached without a system call.
    #[must_use]
    pub fn mapped_bytes(&self) -> usize {
        self.windows
            .iter()
            .map(|window| window.window.len_bytes())
            .sum::<usize>()
            .min(self.len_bytes)
    }

    /// Lets go of the device; whoever still holds this sees ones.
    pub(super) fn retire(&self) {
        for window in &self.windows {
            window.window.retire();
        }
    }

    /// The window of an access, and its place there.
    #[inline]
    fn window(&self, offset_bytes: usize, size_bytes: usize) -> Option<(&DeviceWindow, usize)> {
        self.windows.iter().find_map(|Window { first, window }| {
            let at = offset_bytes.checked_sub(*first)?;
            (at < window.len_bytes() && size_bytes <= window.len_bytes() - at)
                .then_some((window, at))
        })
    }

    fn is_inside(&self, offset_bytes: usize, size_bytes: usize) -> bool {
        offset_bytes <= self.len_bytes
            && size_bytes <= self.len_bytes - offset_bytes
            && offset_bytes.is_multiple_of(size_bytes)
    }

    #[cold]
    #[inline(never)]
    fn read_call(&self, offset_bytes: usize) -> u32 {
        let mut bytes = [0xff; 4];
        let at = self.offset_bytes + bytes_u64(offset_bytes);
        match self.file.with_file(|file| file.read_exact_at(&mut bytes, at)) {
            Ok(Ok(())) => u32::from_le_bytes(bytes),
            _ => u32::MAX,
        }
    }

    #[cold]
    #[inline(never)]
    fn write_call(&self, offset_bytes: usize, value: u32) {
        let at = self.offset_bytes + bytes_u64(offset_bytes);
        // A device that is gone does not answer; whoever reads next sees that.
        let _ = self.file.with_file(|file| file.write_all_at(&value.to_le_bytes(), at));
    }
}

impl Registers for VfioRegisters {
    fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    #[inline]
    fn read_u32(&self, offset_bytes: usize) -> u32 {
        if !self.is_inside(offset_bytes, 4) {
            return u32::MAX;
        }
        match self.window(offset_bytes, 4) {
            Some((window, at)) => window.read_u32(at),
            None => self.read_call(offset_bytes),
        }
    }

    #[inline]
    fn read_u64(&self, offset_bytes: usize) -> u64 {
        if !self.is_inside(offset_bytes, 8) {
            return u64::MAX;
        }
        match self.window(offset_bytes, 8) {
            Some((window, at)) => window.read_u64(at),
            None => {
                let low = self.read_call(offset_bytes);
                u64::from(low) | u64::from(self.read_call(offset_bytes + 4)) << 32
            }
        }
    }

    #[inline]
    fn write_u32(&self, offset_bytes: usize, value: u32) {
        if !self.is_inside(offset_bytes, 4) {
            return;
        }
        match self.window(offset_bytes, 4) {
            Some((window, at)) => window.write_u32(at, value),
            None => self.write_call(offset_bytes, value),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn region(mappable: &[(u64, u64)]) -> (File, Arc<DeviceFile>, Region) {
        ringmill_core::mem::install_sigbus_handler().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x8000).unwrap();
        let ours = Arc::new(DeviceFile::new(file.try_clone().unwrap().into()));
        let mappable = mappable
            .iter()
            .map(|&(offset_bytes, len_bytes)| Area { offset_bytes, len_bytes })
            .collect();
        (file, ours, Region { offset_bytes: 0x4000, len_bytes: 0x4000, mappable })
    }

    #[test]
    fn holes_are_reached_by_calls_and_the_rest_without() {
        for mappable in [&[(0, 0x4000)][..], &[(0x1000, 0x1000), (0x3000, 0x1000)], &[]] {
            let (file, ours, region) = region(mappable);
            let registers = VfioRegisters::new(&ours, &region, 0x3800);
            let mapped: u64 = mappable.iter().map(|(_, len)| *len).sum();
            assert_eq!(bytes_u64(registers.mapped_bytes()), mapped.min(0x3800));
            for offset in (0..0x3800).step_by(8) {
                registers.write_u64(offset, 0x0807_0605_0403_0201 ^ bytes_u64(offset));
            }
            let mut bytes = [0; 8];
            for offset in (0..0x3800).step_by(8) {
                file.read_exact_at(&mut bytes, 0x4000 + bytes_u64(offset)).unwrap();
                let value = 0x0807_0605_0403_0201 ^ bytes_u64(offset);
                assert_eq!(u64::from_le_bytes(bytes), value);
                assert_eq!(registers.read_u64(offset), value);
                assert_eq!(u64::from(registers.read_u32(offset + 4)), value >> 32);
            }
            // The window ends where it was asked to.
            registers.write_u32(0x3800, 7);
            registers.write_u32(2, 7);
            assert_eq!(registers.read_u32(0x3800), u32::MAX);
            assert_eq!(
                (registers.read_u64(0x37fc), registers.read_u64(usize::MAX)),
                (u64::MAX, u64::MAX)
            );
            file.read_exact_at(&mut bytes, 0x4000 + 0x3800).unwrap();
            assert_eq!(bytes, [0; 8]);
        }
    }

    #[test]
    fn retired_registers_answer_ones_wherever_they_are() {
        let (file, ours, region) = region(&[(0x1000, 0x1000)]);
        let registers = VfioRegisters::new(&ours, &region, 0x4000);
        ours.close();
        registers.retire();
        for offset in [0, 0x1000, 0x2000] {
            registers.write_u32(offset, 7);
            assert_eq!(registers.read_u32(offset), u32::MAX);
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, 0x4000 + bytes_u64(offset)).unwrap();
            assert_eq!(bytes, [0; 4]);
        }
    }

    #[test]
    fn only_what_is_needed_is_mapped() {
        let areas = [
            Area { offset_bytes: 0, len_bytes: 0x2000 },
            Area { offset_bytes: 0x3000, len_bytes: 0x10_0000 },
        ];
        let lens = |len| wanted(&areas, len).iter().map(|area| area.len_bytes).collect::<Vec<_>>();
        assert_eq!(lens(0x1001), [0x2000]);
        assert_eq!(lens(0x1000), [0x1000]);
        assert_eq!(lens(0x3001), [0x2000, 0x1000]);
    }
}
