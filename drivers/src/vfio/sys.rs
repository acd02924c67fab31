//! VFIO's system calls that `vfio-ioctls` does not offer, or whose errors it keeps to itself, and the wish to use its
//! container from safe code.
//!
//! In: borrowed descriptors. Out: what the kernel wrote, as bytes that others parse, and its errors as they are.
//! **Invariant:** the kernel is told the true size of every buffer.
#![expect(unsafe_code)] // UNSAFETY: ioctls with pointers to buffers of this file, and the crate's unsafe mapping call.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use ringmill_core::mem::Mapping;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, VFIO_TYPE1v2_IOMMU, vfio_device_info, vfio_group_status,
    vfio_iommu_type1_info, vfio_irq_info, vfio_irq_set, vfio_region_info,
};
use vfio_ioctls::{VfioContainer, VfioError};

/// What the kernel may say about a region or an IOMMU: some hundred ranges.
const INFO_BYTES_MAX: usize = 64 << 10;

/// Calls of `linux/vfio.h`, counted from VFIO_BASE.
#[derive(Clone, Copy)]
enum Call {
    SetIommu = 2,
    GroupGetStatus = 3,
    GroupSetContainer = 4,
    GroupUnsetContainer = 5,
    GroupGetDeviceFd = 6,
    DeviceGetInfo = 7,
    DeviceGetRegionInfo = 8,
    DeviceGetIrqInfo = 9,
    DeviceSetIrqs = 10,
    DeviceReset = 11,
    IommuGetInfo = 12,
}

impl Call {
    /// `_IO(';', VFIO_BASE + n)`.
    fn request(self) -> libc::c_ulong {
        libc::c_ulong::from(VFIO_TYPE) << 8
            | (libc::c_ulong::from(VFIO_BASE) + self as libc::c_ulong)
    }
}

fn size_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

/// # Safety
/// `argument` is what the call expects: a number, or the address of memory of the size that it says in its first word.
unsafe fn ioctl(fd: BorrowedFd<'_>, call: Call, argument: libc::c_ulong) -> io::Result<i32> {
    loop {
        // SAFETY: the caller's promise.
        let got = unsafe { libc::ioctl(fd.as_raw_fd(), call.request(), argument) };
        if got >= 0 {
            return Ok(got);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn ioctl_number(fd: BorrowedFd<'_>, call: Call, number: u32) -> io::Result<i32> {
    // SAFETY: used for calls whose argument is a number, or none.
    unsafe { ioctl(fd, call, libc::c_ulong::from(number)) }
}

/// `T` begins with its own size.
fn ioctl_struct<T>(fd: BorrowedFd<'_>, call: Call, value: &mut T) -> io::Result<i32> {
    // SAFETY: a live, exclusively borrowed struct of `linux/vfio.h` whose argsz its maker set to its size.
    unsafe { ioctl(fd, call, std::ptr::from_mut(value) as libc::c_ulong) }
}

/// VFIO_GROUP_GET_STATUS: flags.
pub(super) fn group_status(group: BorrowedFd<'_>) -> io::Result<u32> {
    let mut status = vfio_group_status { argsz: size_u32::<vfio_group_status>(), flags: 0 };
    ioctl_struct(group, Call::GroupGetStatus, &mut status)?;
    Ok(status.flags)
}

/// VFIO_GROUP_SET_CONTAINER.
pub(super) fn group_set_container(
    group: BorrowedFd<'_>,
    container: &VfioContainer,
) -> io::Result<()> {
    let mut fd: i32 = container.as_raw_fd();
    ioctl_struct(group, Call::GroupSetContainer, &mut fd).map(drop)
}

/// VFIO_GROUP_UNSET_CONTAINER.
pub(super) fn group_unset_container(group: BorrowedFd<'_>) -> io::Result<()> {
    ioctl_number(group, Call::GroupUnsetContainer, 0).map(drop)
}

/// VFIO_SET_IOMMU with type 1 version 2.
pub(super) fn set_iommu(container: &VfioContainer) -> io::Result<()> {
    ioctl_number(borrow(container), Call::SetIommu, VFIO_TYPE1v2_IOMMU).map(drop)
}

/// VFIO_GROUP_GET_DEVICE_FD.
pub(super) fn group_device(group: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: a string that ends with a zero byte and lives through the call.
    let fd = unsafe { ioctl(group, Call::GroupGetDeviceFd, name.as_ptr() as libc::c_ulong) }?;
    // SAFETY: the kernel made this descriptor for us just now.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// VFIO_DEVICE_GET_INFO.
pub(super) fn device_info(device: BorrowedFd<'_>) -> io::Result<vfio_device_info> {
    let mut info = vfio_device_info { argsz: size_u32::<vfio_device_info>(), ..Default::default() };
    ioctl_struct(device, Call::DeviceGetInfo, &mut info)?;
    Ok(info)
}

/// VFIO_DEVICE_GET_IRQ_INFO.
pub(super) fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<vfio_irq_info> {
    let mut info =
        vfio_irq_info { argsz: size_u32::<vfio_irq_info>(), index, ..Default::default() };
    ioctl_struct(device, Call::DeviceGetIrqInfo, &mut info)?;
    Ok(info)
}

/// VFIO_DEVICE_GET_REGION_INFO: a `vfio_region_info` with the capabilities that follow it.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u8>> {
    info_bytes(device, Call::DeviceGetRegionInfo, size_of::<vfio_region_info>(), index)
}

/// VFIO_IOMMU_GET_INFO: a `vfio_iommu_type1_info` with the capabilities that follow it.
pub(super) fn iommu_info(container: &VfioContainer) -> io::Result<Vec<u8>> {
    info_bytes(borrow(container), Call::IommuGetInfo, size_of::<vfio_iommu_type1_info>(), 0)
}

/// Asks for a struct that begins with argsz, flags and (for regions) an index; once more with the size that the kernel
/// wants where that is larger.
fn info_bytes(
    fd: BorrowedFd<'_>,
    call: Call,
    header_bytes: usize,
    index: u32,
) -> io::Result<Vec<u8>> {
    let mut len_bytes = header_bytes;
    for _ in 0..4 {
        // Words of 64 bits, because the structs want their alignment.
        let mut words = vec![0_u64; len_bytes.div_ceil(8)];
        let argsz = u32::try_from(words.len() * 8).map_err(io::Error::other)?;
        words[0] = u64::from(argsz);
        words[1] = u64::from(index);
        // SAFETY: a live buffer of the size in its first word, aligned for the structs.
        unsafe { ioctl(fd, call, words.as_mut_ptr() as libc::c_ulong) }?;
        let wanted = usize::try_from(words[0] & 0xffff_ffff).map_err(io::Error::other)?;
        if wanted <= words.len() * 8 {
            return Ok(words.into_iter().flat_map(u64::to_ne_bytes).collect());
        }
        if wanted > INFO_BYTES_MAX {
            break;
        }
        len_bytes = wanted;
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer never fits"))
}

/// VFIO_DEVICE_SET_IRQS with a `vfio_irq_set` and its data in words; positive: how many vectors there could be.
pub(super) fn set_irqs(device: BorrowedFd<'_>, set: &[u32]) -> io::Result<i32> {
    let told = set.first().map_or(0, |bytes| *bytes);
    if size_of_val(set) < size_of::<vfio_irq_set>()
        || u32::try_from(size_of_val(set)).ok() != Some(told)
    {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: a live buffer of the size in its first word; the kernel only reads it.
    unsafe { ioctl(device, Call::DeviceSetIrqs, set.as_ptr() as libc::c_ulong) }
}

/// VFIO_DEVICE_RESET.
pub(super) fn device_reset(device: BorrowedFd<'_>) -> io::Result<()> {
    ioctl_number(device, Call::DeviceReset, 0).map(drop)
}

/// The container's descriptor.
pub(super) fn borrow(container: &VfioContainer) -> BorrowedFd<'_> {
    // SAFETY: the container owns it and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(container.as_raw_fd()) }
}

/// VFIO_IOMMU_MAP_DMA for the whole pages of a mapping.
///
/// Maps `len_bytes` of the memory's pages from `at` on.
pub(super) fn map_dma(
    container: &VfioContainer,
    iova: u64,
    memory: &Mapping,
    at: usize,
    len_bytes: usize,
) -> io::Result<()> {
    let (host, all_bytes) = memory.pages();
    if at.checked_add(len_bytes).is_none_or(|end| end > all_bytes) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: nobody makes references into a `Mapping`, its users copy or access it by atomics, as the callee wants; should
    // it be unmapped before the device lets go of it, its pages stay pinned and belong to nobody else.
    unsafe { container.vfio_dma_map(iova, len_bytes, (host.0 + at) as *mut u8) }.map_err(errno)
}

/// VFIO_IOMMU_UNMAP_DMA.
pub(super) fn unmap_dma(container: &VfioContainer, iova: u64, len_bytes: usize) -> io::Result<()> {
    container.vfio_dma_unmap(iova, len_bytes).map_err(errno)
}

fn errno(error: VfioError) -> io::Error {
    match error {
        VfioError::IommuDmaMap(error) | VfioError::IommuDmaUnmap(error) => {
            io::Error::from_raw_os_error(error.errno())
        }
        other => io::Error::other(other),
    }
}

/// Processors of this machine, whatever this thread may use.
pub(super) fn processors_count() -> usize {
    // SAFETY: no preconditions.
    let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(count).unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn requests_have_the_kernels_numbers() {
        // linux/vfio.h: _IO(';', 100 + n).
        assert_eq!(Call::SetIommu.request(), 0x3b66);
        assert_eq!(Call::DeviceSetIrqs.request(), 0x3b6e);
        assert_eq!(Call::IommuGetInfo.request(), 0x3b70);
    }

    #[test]
    fn an_irq_set_that_lies_about_its_size_never_reaches_the_kernel() {
        let file = std::fs::File::open("/dev/null").unwrap();
        for set in [&[][..], &[0], &[24, 0, 0, 0, 0], &[16, 0, 0, 0, 0]] {
            let error = set_irqs(file.as_fd(), set).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        // A true one does, and this is no device.
        let error = set_irqs(file.as_fd(), &[20, 0, 0, 0, 0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn what_is_no_device_is_an_error_and_no_more() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let fd = file.as_fd();
        let errors = [
            group_status(fd).map(drop),
            group_device(fd, "0000:00:00.0").map(drop),
            device_info(fd).map(drop),
            irq_info(fd, 0).map(drop),
            region_info(fd, 0).map(drop),
            device_reset(fd),
        ];
        for error in errors {
            assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        }
        assert!(group_device(fd, "a\0b").is_err());
    }
}
