//! The demo with a real guest: Linux under QEMU makes a file system on one of the daemon's disks and runs fio on it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::host::DemoDaemon;
use super::report;
use crate::guest_lab::guest::Guest;
use crate::guest_lab::initramfs::Payload;
use crate::guest_lab::qemu::{Boot, DiskConfig, MachineConfig};
use crate::guest_lab::{Lab, LabError};

/// Emulated fio on a busy machine.
const FIO_WAIT_MAX: Duration = Duration::from_secs(180);

/// Where kernel and initramfs are kept between runs.
fn cache_dir() -> PathBuf {
    let user = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    user.or_else(home).unwrap_or_else(std::env::temp_dir).join("ringmill")
}

/// Boots the guest and lets it work.
pub(super) fn run() -> anyhow::Result<ExitCode> {
    let start = Instant::now();
    let mut lab = match Lab::open(&cache_dir()) {
        Ok(lab) => lab,
        Err(error @ LabError::Packages { .. }) => {
            println!("A guest needs QEMU and some tools that are not here: {error}");
            println!(
                "As root, `cargo xtask packages --install` installs them; or name them to apt-get yourself."
            );
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return Err(error.into()),
    };
    println!(
        "Getting a kernel and building a small system for the guest (kept in {}) …",
        cache_dir().display()
    );
    let image = lab.linux(Payload::Fio).context("no kernel for the guest")?;
    let daemon = DemoDaemon::start()?;
    let disks =
        vec![DiskConfig::new(&daemon.socket("ram")), DiskConfig::new(&daemon.socket("file"))];
    println!("Booting Linux in QEMU on two disks of ringmill …");
    let mut guest = Guest::start(&MachineConfig::new(Boot::Linux(image), disks))?;
    println!("{}", guest.sh("uname -sr; cat /proc/partitions")?.trim_end());
    for (device, disk) in [("/dev/vda", "the RAM disk"), ("/dev/vdb", "the file")] {
        println!("\n{device}, {disk}: mkfs.ext4, mount, fio with verification, unmount, fsck");
        guest.sh(&format!("mkfs.ext4 -q {device}\nmount {device} /mnt"))?;
        let fio = "fio --name=demo --directory=/mnt --size=16m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 \
                   --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --fallocate=none";
        let output = guest.sh_within(&format!("{fio} 2>&1"), FIO_WAIT_MAX)?;
        for line in output.lines().filter(|line| line.contains("IOPS=")) {
            println!("  {}", line.trim());
        }
        println!(
            "  {}",
            guest.sh(&format!("umount /mnt\ne2fsck -fn {device} 2>&1 | tail -1"))?.trim()
        );
    }
    guest.quit()?;
    println!(
        "\nThe guest's processor is emulated, so its rates say nothing about ringmill's speed."
    );
    report::print_latencies(&mut report::connect(&daemon.rpc())?)?;
    daemon.stop()?;
    println!("Done in {:.0} s.", start.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}
