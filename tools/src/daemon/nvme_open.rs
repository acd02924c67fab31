//! From a place in words to a controller that serves.
//!
//! In: what the RPC asks for. Out: the driver over the backing that goes with the transport. Runs on a job's thread: it
//! waits for the kernel, for another process and for the device.

use std::path::Path;
use std::sync::Arc;

use ringmill_core::reactor::ReactorHandle;
use ringmill_drivers::nvme::{NvmeControl, NvmeError, NvmeEvents, NvmeOptions, attach};
use ringmill_drivers::vfio::VfioDevice;
use ringmill_drivers::vfio_user::VfioUserBacking;

use crate::rpc::nvme::{NvmeSpec, NvmeTransport};

/// Opens the device and brings its controller up.
pub(super) fn open(
    spec: &NvmeSpec,
    options: NvmeOptions,
    reactors: &[ReactorHandle],
    events: NvmeEvents,
) -> Result<Arc<dyn NvmeControl>, NvmeError> {
    match spec.transport {
        NvmeTransport::Pcie => attach(VfioDevice::open(&spec.address)?, options, reactors, events),
        NvmeTransport::VfioUser => {
            let backing = VfioUserBacking::connect(Path::new(&spec.address))?;
            attach(backing, options, reactors, events)
        }
    }
}
