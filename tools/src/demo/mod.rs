//! `ringmilld demo`: the whole path at work on this machine, with figures, in a quarter of a minute.
//!
//! [`host`] runs a daemon inside this program in a temporary directory; a vhost-user client in the same program writes,
//! verifies and loads its disks; [`guest`] lets a Linux guest under QEMU do so. Everything goes through the sockets that
//! a virtual machine and an operator would use.

mod guest;
mod host;
mod report;

use std::process::ExitCode;
use std::time::Duration;

use crate::daemon::args::DemoArgs;

/// Runs the demo.
///
/// # Errors
/// What kept it from the end, as one sentence.
pub fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    if args.guest { guest::run() } else { host::run(Duration::from_secs(args.seconds.into())) }
}
