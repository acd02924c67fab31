//! What methods and daemon say to each other about NVMe controllers: plain data.

use std::time::Duration;

use ringmill_drivers::nvme::{ActionOnTimeout, ControllerInfo, Health, NamespaceInfo, NvmeOptions};

use super::super::{
    engine::{EngineError, Started},
    server::Token,
};

/// How a controller is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NvmeTransport {
    /// A PCI function, through VFIO.
    Pcie,
    /// A controller in another process, through vfio-user.
    VfioUser,
}

impl NvmeTransport {
    /// All words, as results have them.
    pub const NAMES: [&'static str; 2] = ["PCIe", "VFIOUSER"];

    /// Parses a word of any case.
    pub fn from_name(name: &str) -> Option<Self> {
        if name.eq_ignore_ascii_case("pcie") {
            Some(Self::Pcie)
        } else if name.eq_ignore_ascii_case("vfiouser") {
            Some(Self::VfioUser)
        } else {
            None
        }
    }

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pcie => Self::NAMES[0],
            Self::VfioUser => Self::NAMES[1],
        }
    }
}

/// What holds for controllers that say nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeDefaults {
    /// What happens to a command without an answer.
    pub action_on_timeout: ActionOnTimeout,
    /// How long an I/O command may take; zero: for ever.
    pub timeout: Duration,
    /// How long an admin command may take.
    pub timeout_admin: Duration,
    /// Entries of an I/O queue; one more than commands in flight.
    pub io_queue_size: u16,
}

impl Default for NvmeDefaults {
    fn default() -> Self {
        let options = NvmeOptions::default();
        Self {
            action_on_timeout: options.action_on_timeout,
            timeout: options.timeout,
            timeout_admin: options.timeout_admin,
            io_queue_size: options.io_queue_size,
        }
    }
}

/// A controller to attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeSpec {
    /// Its name; its bdevs are called `<name>n<nsid>`.
    pub name: String,
    /// How it is reached.
    pub transport: NvmeTransport,
    /// Where: a PCI address with its domain, or the path of a socket or of its directory.
    pub address: String,
    /// I/O queues wanted; 0: one per reactor.
    pub queues: u32,
    /// What it has of its own; `None`: the defaults at that time.
    pub action_on_timeout: Option<ActionOnTimeout>,
    /// As in [`NvmeDefaults`].
    pub timeout: Option<Duration>,
    /// As in [`NvmeDefaults`].
    pub timeout_admin: Option<Duration>,
    /// As in [`NvmeDefaults`].
    pub io_queue_size: Option<u16>,
}

impl NvmeSpec {
    /// The driver's options: what was said, and the defaults.
    pub fn options(&self, defaults: &NvmeDefaults) -> NvmeOptions {
        NvmeOptions {
            name: self.name.clone(),
            num_io_queues: self.queues,
            io_queue_size: self.io_queue_size.unwrap_or(defaults.io_queue_size),
            timeout: self.timeout.unwrap_or(defaults.timeout),
            timeout_admin: self.timeout_admin.unwrap_or(defaults.timeout_admin),
            action_on_timeout: self.action_on_timeout.unwrap_or(defaults.action_on_timeout),
            ..NvmeOptions::default()
        }
    }
}

/// A controller as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeView {
    /// Its name.
    pub name: String,
    /// How it is reached.
    pub transport: NvmeTransport,
    /// Where.
    pub address: String,
    /// It is on its way out: `deleting` for clients.
    pub is_detaching: bool,
    /// What it says of itself; `None` while it is being attached.
    pub info: Option<ControllerInfo>,
    /// Its namespaces.
    pub namespaces: Vec<NamespaceInfo>,
}

/// The controller and namespace behind a bdev.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeBdevInfo {
    /// How the controller is reached.
    pub transport: NvmeTransport,
    /// Where.
    pub address: String,
    /// The controller.
    pub controller: ControllerInfo,
    /// The namespace's number.
    pub nsid: u32,
}

/// A controller's health.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeHealth {
    /// Where it is.
    pub address: String,
    /// What it is.
    pub controller: ControllerInfo,
    /// How it is.
    pub health: Health,
}

/// What the daemon is asked about NVMe controllers.
pub trait NvmeEngine {
    /// What holds for controllers attached from now on. Refused while there are any.
    fn set_nvme_defaults(&mut self, defaults: NvmeDefaults) -> Result<(), EngineError>;
    /// The defaults.
    fn nvme_defaults(&self) -> NvmeDefaults;
    /// Attaches a controller; ends with the names of its bdevs. An existing name: `Failed` with `EEXIST`.
    fn attach_nvme(&mut self, spec: NvmeSpec, token: Token) -> Started;
    /// All controllers, in the order in which they were attached.
    fn nvme_controllers(&self) -> Vec<NvmeView>;
    /// Removes a controller's bdevs and lets go of it.
    fn detach_nvme(&mut self, name: &str, token: Token) -> Started;
    /// Resets a controller; ends when it serves again.
    fn reset_nvme(&mut self, name: &str, token: Token) -> Started;
    /// Asks a controller for its health; ends with it.
    fn nvme_health(&mut self, name: &str, token: Token) -> Started;
}
