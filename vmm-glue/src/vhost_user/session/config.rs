//! The session's messages about the configuration space.
//!
//! In: GET_CONFIG, SET_CONFIG, SET_BACKEND_REQ_FD. Out: ranges within the space, for the backend; the channel on which
//! the front-end learns of changes. Owner: the control thread.
//!
//! **Invariant:** the backend sees only ranges that end within [`CONFIG_BYTES_MAX`].
//!
//! Spec: vhost-user protocol, "Virtio device config space", "VHOST_USER_GET_CONFIG", "VHOST_USER_SET_CONFIG".

use std::os::fd::OwnedFd;

use super::super::backend::Backend;
use super::super::channel::BackendChannel;
use super::super::descriptor::accept_stream_socket;
use super::super::error::Error;
use super::super::message::{CONFIG_BYTES_MAX, ConfigSpace, Request, protocol_feature};
use super::{Outcome, Session, expect_empty, one_fd, wrong_size};

/// QUIRK: old Cloud Hypervisor addresses the configuration space where virtio-mmio has it.
const CONFIG_OFFSET_QUIRK: u32 = 0x100;

impl Session {
    pub(super) fn config_range(
        request: Request,
        payload: &[u8],
    ) -> Result<(ConfigSpace, u32, &[u8]), Error> {
        let (space, data) =
            ConfigSpace::decode(payload).ok_or_else(|| wrong_size(request, payload))?;
        let ConfigSpace { offset, size_bytes, .. } = space;
        let fits =
            |offset: u32| offset.checked_add(size_bytes).is_some_and(|end| end <= CONFIG_BYTES_MAX);
        // QUIRK: see CONFIG_OFFSET_QUIRK. The space itself ends there, so no valid range is taken for it.
        let shifted = offset.checked_sub(CONFIG_OFFSET_QUIRK);
        match (fits(offset), shifted) {
            (true, _) if offset < CONFIG_OFFSET_QUIRK => Ok((space, offset, data)),
            (_, Some(shifted)) if fits(shifted) => Ok((space, shifted, data)),
            _ => Err(Error::ConfigRange { request, offset, size_bytes }),
        }
    }

    pub(super) fn get_config(
        &mut self,
        payload: &[u8],
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::GetConfig;
        self.require(request, protocol_feature::CONFIG, "CONFIG")?;
        // The bytes that follow a question mean nothing; some front-ends send as many as they ask for, some none.
        let (space, offset, _) = Self::config_range(request, payload)?;
        let mut data = [0; CONFIG_BYTES_MAX as usize];
        let out = usize::try_from(space.size_bytes).ok().and_then(|size| data.get_mut(..size));
        let out = out.ok_or_else(|| wrong_size(request, payload))?;
        backend.get_config(offset, out).map_err(|source| Error::Backend { request, source })?;
        Ok(Outcome::Reply(space.encode(out)))
    }

    pub(super) fn set_config(
        &mut self,
        payload: &[u8],
        backend: &mut dyn Backend,
    ) -> Result<Outcome, Error> {
        let request = Request::SetConfig;
        self.require(request, protocol_feature::CONFIG, "CONFIG")?;
        let (space, offset, data) = Self::config_range(request, payload)?;
        if usize::try_from(space.size_bytes) != Ok(data.len()) {
            return Err(wrong_size(request, payload));
        }
        let migration = match space.flags {
            0 => false,
            ConfigSpace::FLAG_MIGRATION => true,
            flags => return Err(Error::ConfigFlags { flags }),
        };
        backend
            .set_config(offset, data, migration)
            .map_err(|source| Error::Backend { request, source })?;
        Ok(Outcome::Ack)
    }

    pub(super) fn set_backend_req_fd(
        &mut self,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Outcome, Error> {
        let request = Request::SetBackendReqFd;
        self.require(request, protocol_feature::BACKEND_REQ, "BACKEND_REQ")?;
        expect_empty(request, payload)?;
        let socket = accept_stream_socket(request, one_fd(request, fds)?)?;
        self.channel = Some(BackendChannel::new(socket));
        Ok(Outcome::Ack)
    }
}
