//! Interrupts: messages where somebody listens, a level until it is handled.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use ringmill_core::spec::nvme::{Sqe, nvm, reg};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::super::*;
use super::rig::{Pair, Rig};
use crate::pci::{DeviceNews, PciBacking, Registers};

fn listener() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

/// Waits for a signal and takes it.
fn is_signalled(fd: &OwnedFd, within: Duration) -> bool {
    let within = Timespec::try_from(within).unwrap();
    let ready = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&within)).unwrap();
    ready > 0 && rustix::io::read(fd, &mut [0u8; 8]).is_ok()
}

const SOON: Duration = Duration::from_secs(10);
const NOT: Duration = Duration::from_millis(10);

fn flush(rig: &mut Rig, pair: &mut Pair) {
    rig.push(pair, Sqe::new(nvm::FLUSH, 1, 1));
    rig.ring(pair);
}

#[test]
fn a_message_goes_to_whoever_is_bound_and_to_nobody_else() {
    let mut rig = Rig::new(ModelOptions { vectors: Vectors::MsiX(3), ..ModelOptions::default() });
    rig.enable();
    assert_eq!(rig.backing.vectors_count(), 3);
    let (mut one, mut two) = (rig.pair(1, 8), rig.pair(2, 8));
    let (first, second) = (listener(), listener());
    rig.backing.bind_vector(1, Some(first.as_fd())).unwrap();
    rig.backing.bind_vector(2, Some(second.as_fd())).unwrap();
    assert!(rig.backing.bind_vector(3, Some(first.as_fd())).is_err());
    flush(&mut rig, &mut one);
    assert!(is_signalled(&first, SOON));
    assert!(!is_signalled(&second, NOT));
    rig.wait(&mut one);
    rig.backing.bind_vector(2, None).unwrap();
    flush(&mut rig, &mut two);
    rig.wait(&mut two);
    assert!(!is_signalled(&second, NOT));
    assert_eq!(rig.control.count(Count::Interrupts), 1);
    // Messages have no level: what was missed is missed.
    rig.backing.bind_vector(2, Some(second.as_fd())).unwrap();
    assert!(!is_signalled(&second, NOT));
    rig.expect_peace();
    rig.regs.write_u32(reg::INTMS, 1);
    rig.expect_errors(1);
}

#[test]
fn one_message_can_be_masked_and_is_not_lost() {
    let mut rig = Rig::new(ModelOptions { vectors: Vectors::Msi, ..ModelOptions::default() });
    rig.enable();
    let mut pair = rig.pair(1, 8);
    let fd = listener();
    rig.backing.bind_vector(0, Some(fd.as_fd())).unwrap();
    flush(&mut rig, &mut pair);
    assert!(is_signalled(&fd, SOON));
    rig.wait(&mut pair);
    rig.regs.write_u32(reg::INTMS, 1);
    assert_eq!((rig.regs.read_u32(reg::INTMS), rig.regs.read_u32(reg::INTMC)), (1, 1));
    flush(&mut rig, &mut pair);
    rig.wait(&mut pair);
    assert!(!is_signalled(&fd, NOT));
    rig.regs.write_u32(reg::INTMC, 1);
    assert!(is_signalled(&fd, SOON));
    assert_eq!(rig.regs.read_u32(reg::INTMS), 0);
    rig.expect_peace();
}

#[test]
fn a_level_stays_until_the_queue_is_empty() {
    let mut rig = Rig::new(ModelOptions { vectors: Vectors::Intx, ..ModelOptions::default() });
    rig.enable();
    let mut pair = rig.pair(1, 8);
    let fd = listener();
    flush(&mut rig, &mut pair);
    rig.eventually(|rig| rig.control.counters().io(nvm::FLUSH) == 1);
    // It was there before somebody listened.
    rig.backing.bind_vector(0, Some(fd.as_fd())).unwrap();
    assert!(is_signalled(&fd, SOON));
    assert!(!is_signalled(&fd, NOT));
    // Unmasked without having taken anything: again.
    rig.backing.unmask(0).unwrap();
    assert!(is_signalled(&fd, SOON));
    let seen = rig.control.count(Count::Doorbells);
    rig.wait(&mut pair);
    // Only then it knows that the queue is empty.
    rig.eventually(|rig| rig.control.count(Count::Doorbells) > seen);
    rig.backing.unmask(0).unwrap();
    assert!(!is_signalled(&fd, NOT));
    flush(&mut rig, &mut pair);
    assert!(is_signalled(&fd, SOON));
    rig.expect_peace();
}

#[test]
fn without_vectors_nothing_can_be_bound() {
    let rig = Rig::new(ModelOptions { vectors: Vectors::None, ..ModelOptions::default() });
    assert_eq!(rig.backing.vectors_count(), 0);
    assert!(rig.backing.bind_vector(0, None).is_err());
}

#[test]
fn news_wake_and_come_in_order() {
    let rig = Rig::new(ModelOptions::default());
    let fd = rig.backing.news_fd().unwrap().try_clone_to_owned().unwrap();
    assert_eq!(rig.backing.news(), None);
    rig.control.tell(DeviceNews::Requested);
    rig.control.vanish(true);
    let zero = Timespec::default();
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&zero)).unwrap(), 1);
    assert_eq!(rig.backing.news(), Some(DeviceNews::Requested));
    assert_eq!(rig.backing.news(), Some(DeviceNews::Gone));
    assert_eq!(rig.backing.news(), None);
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&zero)).unwrap(), 0);
}

#[test]
fn configuration_space_says_what_it_is() {
    let rig = Rig::new(ModelOptions::default());
    let mut space = [0; 256];
    rig.backing.config_read(0, &mut space).unwrap();
    assert_eq!(space[..4], [0xf0, 0xff, 1, 0]);
    assert_eq!(space[4] & 4, 4);
    assert_eq!(space[9..12], [0x02, 0x08, 0x01]);
    // Capabilities: PCI Express, then MSI-X with 65 vectors.
    let first = usize::from(space[0x34]);
    assert_eq!(space[first], 0x10);
    let second = usize::from(space[first + 1]);
    assert_eq!((space[second], space[second + 2]), (0x11, 64));
    assert_eq!(space[second + 1], 0);
    assert!(rig.backing.config_read(255, &mut [0; 2]).is_err());
    assert!(rig.backing.config_read(u64::MAX, &mut [0; 2]).is_err());
    rig.backing.set_bus_master(false).unwrap();
    rig.backing.config_read(4, &mut space[..1]).unwrap();
    assert_eq!(space[0] & 4, 0);
}
