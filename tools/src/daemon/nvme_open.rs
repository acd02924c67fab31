//! From a place in words to a controller that serves.
//!
//! In: what the RPC asks for. Out: the driver over the backing that goes with the transport. Runs on a job's thread: it
//! waits for the kernel, for another process and for the device.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ringmill_core::limits::VFIO_USER_ATTACH_MS;
use ringmill_core::reactor::ReactorHandle;
use ringmill_drivers::nvme::{NvmeControl, NvmeError, NvmeEvents, NvmeOptions, attach_until};
use ringmill_drivers::pci::{CancelToken, Ended};
use ringmill_drivers::vfio::VfioDevice;
use ringmill_drivers::vfio_user::VfioUserBacking;

use crate::rpc::nvme::{NvmeSpec, NvmeTransport};

const VFIO_USER_ATTACH: Duration = Duration::from_millis(VFIO_USER_ATTACH_MS);

/// For an attempt that begins now. A PCI function's waits are bounded by what it is: the one that the driver has not to
/// trust in is a process that plays for time.
pub(super) fn attempt(transport: NvmeTransport) -> CancelToken {
    CancelToken::new(match transport {
        NvmeTransport::Pcie => None,
        NvmeTransport::VfioUser => Some(VFIO_USER_ATTACH),
    })
}

/// Opens the device and brings its controller up.
pub(super) fn open(
    spec: &NvmeSpec,
    options: NvmeOptions,
    reactors: &[ReactorHandle],
    events: NvmeEvents,
    token: &CancelToken,
) -> Result<Arc<dyn NvmeControl>, NvmeError> {
    let opened = match spec.transport {
        NvmeTransport::Pcie => {
            let device = VfioDevice::open(&spec.address).map_err(NvmeError::from);
            device.and_then(|device| attach_until(device, options, reactors, events, token))
        }
        NvmeTransport::VfioUser => {
            let path = Path::new(&spec.address);
            let backing = VfioUserBacking::connect_until(path, token).map_err(NvmeError::from);
            backing.and_then(|backing| attach_until(backing, options, reactors, events, token))
        }
    };
    // What it failed with is then only that it was cut off.
    opened.map_err(|error| match token.ended() {
        None => error,
        Some(Ended::Cancelled) => NvmeError::Cancelled { device: spec.address.clone() },
        Some(Ended::Late) => NvmeError::TooSlow {
            device: spec.address.clone(),
            what: "come up",
            within: VFIO_USER_ATTACH,
            advice: "its server answers, but too slowly; look at that process, then try again",
        },
    })
}
