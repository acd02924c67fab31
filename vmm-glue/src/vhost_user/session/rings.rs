//! The session's messages about rings.
//!
//! In: SET_VRING_* and GET_VRING_BASE. Out: rings that start, change and stop. Owner: the control thread.
//!
//! **Invariants:** a ring starts exactly when its size, addresses, memory and kick are all there, whichever comes last,
//! and runs until GET_VRING_BASE or RESET_DEVICE; size, addresses and base of a running ring do not change.
//!
//! Spec: vhost-user protocol, "Ring states", "VHOST_USER_SET_VRING_NUM" to "VHOST_USER_SET_VRING_ERR",
//! "VHOST_USER_SET_VRING_ENABLE".

use std::os::fd::OwnedFd;

use super::super::backend::{Backend, StopProgress};
use super::super::descriptor::{SharedFd, accept_eventfd};
use super::super::error::Error;
use super::super::message::{RINGS_MAX, Request, VringAddr, VringFd, VringState, virtio_feature};
use super::super::ring::{Kick, Layout, Ring, RingAddresses, check_addresses, check_size};
use super::{Operation, Outcome, Session, one_fd, wrong_size};

impl Session {
    pub(super) fn running_rings(&self) -> impl Iterator<Item = u16> {
        (0..RINGS_MAX).zip(&self.rings).filter(|(_, ring)| ring.started).map(|(index, _)| index)
    }

    /// Checks a ring index from a message and narrows it to one that `self.rings` has.
    pub(super) fn ring_index(&self, request: Request, index: u32) -> Result<u16, Error> {
        let queues_max = u16::try_from(self.rings.len()).unwrap_or(RINGS_MAX);
        match u16::try_from(index) {
            Ok(known) if known < queues_max => Ok(known),
            _ => Err(Error::RingIndex { request, index, queues_max }),
        }
    }

    pub(super) fn ring(&mut self, index: u16) -> &mut Ring {
        &mut self.rings[usize::from(index)]
    }

    pub(super) fn vring_state(
        &self,
        request: Request,
        payload: &[u8],
    ) -> Result<(u16, u32), Error> {
        let state = VringState::decode(payload).ok_or_else(|| wrong_size(request, payload))?;
        Ok((self.ring_index(request, state.index)?, state.value))
    }

    pub(super) fn set_vring_num(
        &mut self,
        payload: &[u8],
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::SetVringNum;
        let (index, size) = self.vring_state(request, payload)?;
        let size = check_size(index, self.layout(), size)?;
        let ring = self.ring(index);
        if ring.started {
            return Err(Error::RingRuns { request, index });
        }
        ring.size = Some(size);
        self.start_when_ready(request, index, backend)
    }

    pub(super) fn set_vring_addr(
        &mut self,
        payload: &[u8],
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::SetVringAddr;
        let addr = VringAddr::decode(payload).ok_or_else(|| wrong_size(request, payload))?;
        let index = self.ring_index(request, addr.index)?;
        // Ignoring the log flag would corrupt a migrating guest: refuse what is not tracked.
        if addr.flags != 0 {
            return Err(Error::RingFlags { index, flags: addr.flags });
        }
        let addresses = RingAddresses::new(&addr);
        check_addresses(index, self.layout(), &addresses)?;
        let ring = self.ring(index);
        // QEMU repeats the addresses of a running ring when it switches logging on or off.
        if ring.started && ring.addresses != Some(addresses) {
            return Err(Error::RingRuns { request, index });
        }
        ring.addresses = Some(addresses);
        self.start_when_ready(request, index, backend)
    }

    pub(super) fn set_vring_base(&mut self, payload: &[u8]) -> Result<Outcome, Error> {
        let request = Request::SetVringBase;
        let (index, base) = self.vring_state(request, payload)?;
        let layout = self.layout();
        let ring = self.ring(index);
        if ring.started {
            return Err(Error::RingRuns { request, index });
        }
        if layout == Layout::Split && base > u32::from(u16::MAX) {
            let reason = "a split ring's index has 16 bits";
            return Err(Error::RingBase { index, base, reason });
        }
        ring.base = Some(base);
        Ok(Outcome::Ack)
    }

    pub(super) fn get_vring_base(
        &mut self,
        payload: &[u8],
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::GetVringBase;
        let (index, _) = self.vring_state(request, payload)?;
        let layout = self.layout();
        let ring = self.ring(index);
        if !ring.started {
            let base = ring.base(layout);
            return Ok(self.ring_stopped(index, base));
        }
        match backend.stop_ring(index).map_err(|source| Error::Backend { request, source })? {
            StopProgress::Done { base } => Ok(self.ring_stopped(index, base)),
            StopProgress::Pending => Ok(Outcome::Later(Operation::Stop { index })),
        }
    }

    /// Only the next SET_VRING_KICK starts the ring again; its size and addresses hold until they are replaced.
    pub(super) fn ring_stopped(&mut self, index: u16, base: u32) -> Outcome {
        let ring = self.ring(index);
        ring.started = false;
        ring.kick = Kick::Unset;
        ring.base = Some(base);
        Outcome::Reply(VringState { index: index.into(), value: base }.encode())
    }

    pub(super) fn vring_fd(
        &self,
        request: Request,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(u16, Option<SharedFd>), Error> {
        let vring = VringFd::decode(payload).ok_or_else(|| wrong_size(request, payload))?;
        if vring.reserved_set {
            return Err(Error::ReservedBits { request });
        }
        let index = self.ring_index(request, vring.index)?;
        if vring.no_fd {
            return Ok((index, None));
        }
        Ok((index, Some(accept_eventfd(request, one_fd(request, fds)?)?)))
    }

    pub(super) fn set_vring_kick(
        &mut self,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::SetVringKick;
        let (index, kick) = self.vring_fd(request, payload, fds)?;
        if self.ring(index).started {
            backend
                .set_ring_kick(index, kick.clone())
                .map_err(|source| Error::Backend { request, source })?;
        }
        self.ring(index).kick = kick.map_or(Kick::Polled, Kick::Fd);
        self.start_when_ready(request, index, backend)
    }

    pub(super) fn set_vring_call(
        &mut self,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::SetVringCall;
        let (index, call) = self.vring_fd(request, payload, fds)?;
        if self.ring(index).started {
            backend
                .set_ring_call(index, call.clone())
                .map_err(|source| Error::Backend { request, source })?;
        }
        self.ring(index).call = call;
        Ok(Outcome::Ack)
    }

    pub(super) fn set_vring_err(
        &mut self,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::SetVringErr;
        let (index, err) = self.vring_fd(request, payload, fds)?;
        if self.ring(index).started {
            backend
                .set_ring_err(index, err.clone())
                .map_err(|source| Error::Backend { request, source })?;
        }
        self.ring(index).err = err;
        Ok(Outcome::Ack)
    }

    pub(super) fn set_vring_enable(
        &mut self,
        payload: &[u8],
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::SetVringEnable;
        let (index, value) = self.vring_state(request, payload)?;
        let enabled = match value {
            0 => false,
            1 => true,
            _ => return Err(Error::RingEnable { index, value }),
        };
        let operation = Operation::Enable { index, enabled };
        let was_enabled = self.is_enabled(index);
        if !self.ring(index).started || was_enabled == enabled {
            self.settle(request, operation, backend)?;
            return Ok(Outcome::Ack);
        }
        let progress = backend.enable_ring(index, enabled);
        self.advance(request, progress, operation, backend)
    }

    /// "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in the enabled state"; an
    /// explicit SET_VRING_ENABLE counts in any case.
    pub(super) fn is_enabled(&self, index: u16) -> bool {
        let by_default = self.features & virtio_feature::PROTOCOL_FEATURES == 0;
        self.rings[usize::from(index)].enabled.unwrap_or(by_default)
    }

    /// Starts a ring if it does not run and everything it needs is there.
    pub(super) fn start_when_ready(
        &mut self,
        request: Request,
        index: u16,
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let (layout, enabled) = (self.layout(), self.is_enabled(index));
        let ring = &mut self.rings[usize::from(index)];
        if ring.started {
            return Ok(Outcome::Ack);
        }
        let started = match ring.start(index, layout, &self.memory, enabled) {
            Ok(None) => return Ok(Outcome::Ack),
            Ok(Some(start)) => backend
                .start_ring(index, start)
                .map_err(|source| Error::Backend { request, source }),
            Err(error) => Err(error),
        };
        ring.started = started.is_ok();
        if started.is_err() {
            // Otherwise every later message about this ring would fail for the same reason.
            ring.kick = Kick::Unset;
        }
        started.map(|()| Outcome::Ack)
    }
}
