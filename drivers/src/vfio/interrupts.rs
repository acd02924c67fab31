//! A device's interrupts: MSI-X, MSI or INTx, whichever it and the kernel have, each vector signalling an eventfd or nobody.
//!
//! In: vectors and eventfds, from any thread. Out: VFIO_DEVICE_SET_IRQS. **Invariant:** message vectors are set up once, when
//! the device is opened and all with nobody to signal: kernels before 6.5 cannot add one later, and a vector without an
//! eventfd is masked. INTx is set up while it is bound.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
};

use super::sys;

/// Words of a `vfio_irq_set` without data.
const HEADER_WORDS: usize = 5;

/// "Nobody" in the place of a descriptor.
const NOBODY: u32 = u32::MAX;

/// Which kind a device got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Msix,
    Msi,
    Intx,
    None,
}

impl Kind {
    fn index(self) -> u32 {
        match self {
            Kind::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
            Kind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Kind::Intx | Kind::None => VFIO_PCI_INTX_IRQ_INDEX,
        }
    }
}

/// What a device has of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Interrupts {
    pub(super) kind: Kind,
    pub(super) vectors_count: u16,
}

/// A `vfio_irq_set` of no or one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct IrqSet {
    words: [u32; HEADER_WORDS + 1],
    len: usize,
}

impl IrqSet {
    fn new(flags: u32, index: u32, start: u32, count: u32) -> IrqSet {
        let bytes = u32::try_from(HEADER_WORDS * 4).unwrap_or(0);
        IrqSet { words: [bytes, flags, index, start, count, 0], len: HEADER_WORDS }
    }

    /// `vector` signals `fd` from now on.
    fn trigger(index: u32, vector: u32, fd: u32) -> IrqSet {
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        let mut set = IrqSet::new(flags, index, vector, 1);
        set.words[0] += 4;
        set.words[HEADER_WORDS] = fd;
        set.len += 1;
        set
    }

    /// The whole kind is switched off.
    fn disable(index: u32) -> IrqSet {
        IrqSet::new(VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, index, 0, 0)
    }

    fn unmask(index: u32) -> IrqSet {
        IrqSet::new(VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK, index, 0, 1)
    }

    fn send(&self, device: BorrowedFd<'_>) -> io::Result<()> {
        sys::set_irqs(device, &self.words[..self.len]).map(drop)
    }
}

fn descriptor(eventfd: Option<BorrowedFd<'_>>) -> u32 {
    eventfd.map_or(NOBODY, |fd| u32::from_ne_bytes(fd.as_raw_fd().to_ne_bytes()))
}

/// A set of `count` vectors with nobody to signal.
fn nobody(index: u32, count: u32) -> Vec<u32> {
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    let bytes = count.saturating_mul(4).saturating_add(4 * 5);
    let mut words = vec![bytes, flags, index, 0, count];
    words.resize(HEADER_WORDS + usize::try_from(count).unwrap_or(0), NOBODY);
    words
}

/// Asks for `count` vectors, and for as many as the kernel says it has where those are too many.
fn allocate(
    index: u32,
    count: u32,
    mut set: impl FnMut(&[u32]) -> io::Result<i32>,
) -> io::Result<u32> {
    let mut count = count;
    while count > 0 {
        match u32::try_from(set(&nobody(index, count))?).unwrap_or(0) {
            0 => return Ok(count),
            possible => count = possible.min(count - 1),
        }
    }
    Err(io::ErrorKind::OutOfMemory.into())
}

impl Interrupts {
    /// Sets up the best kind that works, with at most `count_max` vectors.
    pub(super) fn set_up(device: BorrowedFd<'_>, name: &str, count_max: u16) -> Interrupts {
        for kind in [Kind::Msix, Kind::Msi] {
            let has = sys::irq_info(device, kind.index()).map_or(0, |info| info.count);
            let count = has.min(u32::from(count_max));
            if count == 0 {
                continue;
            }
            match allocate(kind.index(), count, |words| sys::set_irqs(device, words)) {
                Ok(count) => {
                    let vectors_count = u16::try_from(count).unwrap_or(u16::MAX);
                    return Interrupts { kind, vectors_count };
                }
                Err(error) => tracing::warn!("{name}: {kind:?} interrupts: {error}"),
            }
        }
        match sys::irq_info(device, Kind::Intx.index()) {
            Ok(info) if info.count > 0 => Interrupts { kind: Kind::Intx, vectors_count: 1 },
            _ => Interrupts { kind: Kind::None, vectors_count: 0 },
        }
    }

    /// Lets `vector` signal `eventfd`, or nobody.
    pub(super) fn bind(
        self,
        device: BorrowedFd<'_>,
        vector: u16,
        eventfd: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        if vector >= self.vectors_count {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let index = self.kind.index();
        if self.kind == Kind::Intx && eventfd.is_none() {
            return IrqSet::disable(index).send(device);
        }
        IrqSet::trigger(index, u32::from(vector), descriptor(eventfd)).send(device)
    }

    /// After INTx: the kernel masked it when it came.
    pub(super) fn unmask(self, device: BorrowedFd<'_>) -> io::Result<()> {
        if self.kind == Kind::Intx {
            IrqSet::unmask(self.kind.index()).send(device)
        } else {
            Ok(())
        }
    }

    /// Switches all of them off.
    pub(super) fn tear_down(self, device: BorrowedFd<'_>) -> io::Result<()> {
        IrqSet::disable(self.kind.index()).send(device)
    }
}

/// Lets one of the kernel's own events (VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ERR_IRQ_INDEX) signal `eventfd`; `None` ends that.
pub(super) fn bind_event(
    device: BorrowedFd<'_>,
    index: u32,
    eventfd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    IrqSet::trigger(index, 0, descriptor(eventfd)).send(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_what_the_kernel_reads() {
        // linux/vfio.h: argsz, flags, index, start, count, then descriptors.
        let set = IrqSet::trigger(2, 7, 33);
        assert_eq!(set.words[..set.len], [24, 4 | 32, 2, 7, 1, 33]);
        let set = IrqSet::trigger(2, 7, descriptor(None));
        assert_eq!(set.words[HEADER_WORDS], u32::MAX);
        let set = IrqSet::disable(1);
        assert_eq!(set.words[..set.len], [20, 1 | 32, 1, 0, 0]);
        let set = IrqSet::unmask(0);
        assert_eq!(set.words[..set.len], [20, 1 | 16, 0, 0, 1]);
        assert_eq!(nobody(2, 3), [32, 4 | 32, 2, 0, 3, u32::MAX, u32::MAX, u32::MAX]);
    }

    #[test]
    fn fewer_vectors_are_taken_where_the_kernel_has_fewer() {
        let offers = |have: u32| {
            let mut asked = Vec::new();
            let got = allocate(2, 9, |words| {
                asked.push(words[4]);
                Ok(if words[4] > have { i32::try_from(have).unwrap() } else { 0 })
            });
            (got.ok(), asked)
        };
        assert_eq!(offers(9), (Some(9), vec![9]));
        assert_eq!(offers(4), (Some(4), vec![9, 4]));
        // A kernel that always wants another number ends, too.
        let mut calls = 0;
        let got = allocate(2, 9, |_| {
            calls += 1;
            Ok(100)
        });
        assert!(got.is_err() && calls == 9);
        assert!(allocate(2, 9, |_| Err(io::ErrorKind::PermissionDenied.into())).is_err());
    }

    #[test]
    fn vectors_that_do_not_exist_never_reach_the_kernel() {
        use std::os::fd::AsFd;
        let file = std::fs::File::open("/dev/null").unwrap();
        let two = Interrupts { kind: Kind::Msix, vectors_count: 2 };
        let error = two.bind(file.as_fd(), 2, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(two.bind(file.as_fd(), 1, None).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert!(two.unmask(file.as_fd()).is_ok(), "messages need no unmasking");
    }
}
