//! Real guests on disks that a vhost-user server serves: what an operator will do with it, done by a machine.
//!
//! Each test takes the lab for itself (guests run one at a time) and starts its own server. Without the lab's packages
//! a test says so and is skipped; with `RINGMILL_GUEST_REQUIRED=1` that is a failure. `RINGMILL_GUEST_SERVER` chooses
//! `ringmilld` or `qemu-storage-daemon`, the known good server that tells a broken test from a broken daemon.
//! Skipped tests are also appended to the file that `RINGMILL_SKIPPED_FILE` names.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine;
use ringmill_tools::guest_lab::boot_sector::{self, SECTOR_BYTES};
use ringmill_tools::guest_lab::guest::Guest;
use ringmill_tools::guest_lab::initramfs::Payload;
use ringmill_tools::guest_lab::qemu::{
    Boot, DiskConfig, MachineConfig, NamespaceConfig, NvmeConfig,
};
use ringmill_tools::guest_lab::server::{DiskServer, DiskSpec, Medium, ServerKind};
use ringmill_tools::guest_lab::{Lab, LabError, ScratchDir};

#[path = "support/lab.rs"]
mod lab;

use lab::{MIB, Outcome, image, skip, stripped, with_lab};

/// What serves the disks unless `RINGMILL_GUEST_SERVER` says otherwise.
const DEFAULT_SERVER: &str = "ringmilld";

/// The firmware takes about two seconds.
const FIRMWARE_WAIT_MAX: Duration = Duration::from_secs(60);

/// fio under software emulation, on a busy machine.
const FIO_WAIT_MAX: Duration = Duration::from_secs(180);

#[test]
fn a_file_system_survives_a_reboot_on_a_ram_disk() -> Outcome {
    let medium = Medium::Malloc { size_bytes: 256 * MIB };
    with_lab("file system on malloc", |lab| file_system_survives_a_reboot(lab, medium, ""))
}

#[test]
fn a_file_system_survives_a_reboot_on_a_file() -> Outcome {
    with_lab("file system on uring", |lab| {
        let scratch = ScratchDir::new()?;
        let path = image(&scratch, "disk.img", 256 * MIB)?;
        file_system_survives_a_reboot(lab, Medium::Uring { path: path.clone() }, "")?;
        // The host's own e2fsck must agree.
        check(Command::new("/usr/sbin/e2fsck").arg("-fn").arg(&path));
        Ok(())
    })
}

#[test]
fn a_file_system_survives_a_reboot_on_packed_rings() -> Outcome {
    const NAME: &str = "packed rings";
    if server_name() == "qemu-storage-daemon" {
        skip(NAME, "qemu-storage-daemon has split rings only");
        return Ok(());
    }
    with_lab(NAME, |lab| {
        let scratch = ScratchDir::new()?;
        let path = image(&scratch, "disk.img", 256 * MIB)?;
        file_system_survives_a_reboot(lab, Medium::Uring { path: path.clone() }, ",packed=on")?;
        check(Command::new("/usr/sbin/e2fsck").arg("-fn").arg(&path));
        Ok(())
    })
}

#[test]
fn packed_rings_without_tables_and_event_indices_carry_a_guest() -> Outcome {
    const NAME: &str = "packed rings, plain";
    if server_name() == "qemu-storage-daemon" {
        skip(NAME, "qemu-storage-daemon has split rings only");
        return Ok(());
    }
    with_lab(NAME, |lab| {
        let server = serve(&[disk("vm0", Medium::Malloc { size_bytes: 64 * MIB })])?;
        let plain = ",packed=on,indirect_desc=off,event_idx=off,queue-size=64";
        let mut guest = linux_with(lab, Payload::Fio, server.as_ref(), 1, plain)?;
        assert_eq!(ring_features(&mut guest)?, "001");
        let fio = "fio --name=job --filename=/dev/vda --rw=randwrite --bsrange=512-256k --ioengine=libaio \
                   --iodepth=32 --direct=1 --verify=crc32c --verify_fatal=1 --randseed=3 --size=24m";
        guest
            .sh_within(&format!("{fio} >/run/fio || {{ cat /run/fio; exit 1; }}"), FIO_WAIT_MAX)?;
        guest.quit()?;
        server.stop()
    })
}

#[test]
fn a_running_guest_goes_on_after_a_restart_of_the_daemon() -> Outcome {
    const NAME: &str = "daemon restart";
    if server_name() == "qemu-storage-daemon" {
        skip(NAME, "qemu-storage-daemon has split rings only");
        return Ok(());
    }
    with_lab(NAME, |lab| {
        for properties in ["", ",packed=on", ",packed=on,indirect_desc=off"] {
            let scratch = ScratchDir::new()?;
            let specs = [disk("vm0", Medium::Uring { path: image(&scratch, "a.img", 64 * MIB)? })];
            let mut server = serve(&specs)?;
            // QEMU connects to the same name again, and finds another daemon there.
            let socket = scratch.path().join("socket");
            let link = |to: &Path| {
                let _ = fs::remove_file(&socket);
                std::os::unix::fs::symlink(to, &socket).expect("a link");
            };
            link(server.socket(0));
            let disks =
                vec![DiskConfig { properties: properties.to_owned(), ..DiskConfig::new(&socket) }];
            let boot = Boot::Linux(lab.linux(Payload::Base)?);
            let mut guest = Guest::start(&MachineConfig::new(boot, disks))?;
            for round in 1..=3 {
                guest.sh(&format!(
                    "seq {round} 900000 | head -c 3000000 >/run/data{round}\n\
                     dd if=/run/data{round} of=/dev/vda bs=10000 seek=$(({round} * 400)) conv=fsync\n\
                     echo 3 >/proc/sys/vm/drop_caches\n\
                     for n in $(seq {round}); do\n\
                     dd if=/dev/vda bs=10000 skip=$((n * 400)) count=300 | cmp - /run/data$n || exit 1\n\
                     done"
                ))?;
                server.stop()?;
                server = serve(&specs)?;
                link(server.socket(0));
            }
            guest.sh("dd if=/dev/vda bs=10000 skip=1200 count=300 | cmp - /run/data3")?;
            guest.quit()?;
            server.stop()?;
        }
        Ok(())
    })
}

/// Whether the guest's driver uses indirect tables, event indices and packed rings: three digits.
fn ring_features(guest: &mut Guest) -> Result<String, LabError> {
    let bits = guest.sh("cat /sys/block/vda/device/features")?;
    Ok([28, 29, 34].iter().filter_map(|&bit| bits.chars().nth(bit)).collect())
}

fn file_system_survives_a_reboot(lab: &mut Lab, medium: Medium, properties: &str) -> Outcome {
    let server = serve(&[disk("vm0", medium)])?;
    let mut guest = linux_with(lab, Payload::Fio, server.as_ref(), 1, properties)?;
    let expected = if properties.contains("packed=on") { "111" } else { "110" };
    assert_eq!(ring_features(&mut guest)?, expected);
    // auto_da_alloc and the like are off the path: what is synced must be there, what fio verified must stay.
    guest.sh("mkfs.ext4 -q /dev/vda\nmount /dev/vda /mnt")?;
    let fio = "fio --name=job --directory=/mnt --size=24m --rw=randwrite --bsrange=4k-64k --ioengine=libaio \
               --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 --randseed=7 --fallocate=none";
    guest.sh_within(
        &format!("{fio} --do_verify=1 >/run/fio || {{ cat /run/fio; exit 1; }}"),
        FIO_WAIT_MAX,
    )?;
    guest.sh("cd /mnt\nfor n in 1 2 3 4 5 6 7 8; do seq $n $n 300000 >file$n; done\nsync\nrm file2 file5")?;
    let trimmed = guest.sh("fstrim -v /mnt")?;
    assert!(trimmed.contains("trimmed"), "fstrim said: {trimmed}");
    guest.sh("cd /mnt\nsha256sum file* >sums\ncd /\numount /mnt\ne2fsck -fn /dev/vda")?;

    guest.reboot()?;
    guest.sh("mount /dev/vda /mnt\ncd /mnt\nsha256sum -c sums\ntest ! -e file2")?;
    guest.sh_within(
        &format!("{fio} --verify_only >/run/fio || {{ cat /run/fio; exit 1; }}"),
        FIO_WAIT_MAX,
    )?;
    guest.sh("umount /mnt\ne2fsck -fn /dev/vda")?;
    guest.quit()?;
    server.stop()
}

#[test]
fn the_firmware_boots_from_a_file() -> Outcome {
    with_lab("firmware boot from uring", |_| {
        let scratch = ScratchDir::new()?;
        // Not a round number: the last sector is at an odd place.
        let size_bytes = 64 * MIB + 7 * 4096;
        let path = image(&scratch, "boot.img", size_bytes)?;
        boot_sector::install(&path, size_bytes)?;
        let server = serve(&[disk("vm0", Medium::Uring { path: path.clone() })])?;
        boot_by_firmware(server.as_ref())?;
        server.stop()?;
        let mut written = [0; SECTOR_BYTES];
        let at = boot_sector::SCRATCH_LBA * SECTOR_BYTES as u64;
        File::open(&path)
            .and_then(|file| file.read_exact_at(&mut written, at))
            .expect("the image is readable");
        assert!(
            written == boot_sector::payload()[SECTOR_BYTES..2 * SECTOR_BYTES],
            "the loader's write is not there"
        );
        Ok(())
    })
}

#[test]
fn the_firmware_boots_from_a_ram_disk_that_a_guest_prepared() -> Outcome {
    with_lab("firmware boot from malloc", |lab| {
        let size_bytes = 64 * MIB;
        let server = serve(&[disk("vm0", Medium::Malloc { size_bytes })])?;
        let mut guest = linux(lab, Payload::Base, server.as_ref(), 1)?;
        let sectors_count = size_bytes / SECTOR_BYTES as u64;
        let loader = base64::engine::general_purpose::STANDARD
            .encode(boot_sector::boot_sector(sectors_count));
        let payload_bytes = boot_sector::payload().len();
        let (text, last) = (boot_sector::LAST_SECTOR_TEXT, sectors_count - 1);
        guest.sh(&format!(
            "echo {loader} | base64 -d >/run/loader\nseq 1 100000 | head -c {payload_bytes} >/run/payload\n\
             dd if=/run/loader of=/dev/vda\ndd if=/run/payload of=/dev/vda seek=1\n\
             printf '{text}' | dd of=/dev/vda seek={last} conv=sync\nsync"
        ))?;
        guest.quit()?;
        boot_by_firmware(server.as_ref())?;
        server.stop()
    })
}

/// Keeps the tests above honest: a loader that checks nothing would pass them.
#[test]
fn the_boot_loader_notices_a_single_wrong_byte() -> Outcome {
    with_lab("firmware boot with wrong data", |_| {
        let scratch = ScratchDir::new()?;
        let size_bytes = 64 * MIB;
        let path = image(&scratch, "boot.img", size_bytes)?;
        boot_sector::install(&path, size_bytes)?;
        let file = OpenOptions::new().write(true).open(&path).expect("the image is ours");
        file.write_all_at(b"?", 20 * SECTOR_BYTES as u64).expect("the image is ours");
        let server = serve(&[disk("vm0", Medium::Uring { path })])?;
        assert_eq!(boot_line(server.as_ref())?, format!("{}D", boot_sector::TOKEN_FAILED));
        server.stop()
    })
}

fn boot_by_firmware(server: &dyn DiskServer) -> Outcome {
    let line = boot_line(server)?;
    assert_eq!(line, boot_sector::TOKEN_OK);
    Ok(())
}

/// What the boot loader says.
fn boot_line(server: &dyn DiskServer) -> Result<String, LabError> {
    let mut guest = Guest::start(&MachineConfig::new(
        Boot::FirstDisk,
        vec![DiskConfig::new(server.socket(0))],
    ))?;
    let line = guest.wait_console("RINGMILL BOOT", FIRMWARE_WAIT_MAX)?;
    guest.quit()?;
    Ok(line)
}

#[test]
fn two_disks_with_two_queues_work_side_by_side_and_grow_under_the_guest() -> Outcome {
    with_lab("two disks, hot resize", |lab| {
        let scratch = ScratchDir::new()?;
        let size_bytes = 64 * MIB;
        let paths = [image(&scratch, "a.img", size_bytes)?, image(&scratch, "b.img", size_bytes)?];
        let specs = [
            disk("vm0a", Medium::Uring { path: paths[0].clone() }),
            disk("vm0b", Medium::Uring { path: paths[1].clone() }),
        ];
        let mut server = serve(&specs)?;
        let mut guest = linux(lab, Payload::Base, server.as_ref(), 2)?;
        assert_eq!(
            guest.sh("ls /sys/block/vda/mq | wc -l; ls /sys/block/vdb/mq | wc -l")?,
            "2\n2\n"
        );

        // Both disks and both CPUs at once: each writer is pinned so that both queues carry requests.
        guest.sh(
            "for d in a b; do for cpu in 0 1; do\n\
             (seq $cpu 2 1800000 | head -c 4194304 >/run/$d$cpu\n\
             taskset $((cpu + 1)) dd if=/run/$d$cpu of=/dev/vd$d bs=64k seek=$((cpu * 64)) oflag=direct) &\n\
             done; done; wait\nsync; echo 3 >/proc/sys/vm/drop_caches\n\
             for d in a b; do for cpu in 0 1; do\n\
             dd if=/dev/vd$d bs=64k skip=$((cpu * 64)) count=64 iflag=direct | cmp - /run/$d$cpu\n\
             done; done",
        )?;

        if !server.announces_resize() {
            skip(
                "hot resize",
                "this qemu-storage-daemon tells its guests nothing; take 10.0 or newer, or ringmilld",
            );
            guest.quit()?;
            return server.stop();
        }
        let grown_bytes = size_bytes + 32 * MIB;
        server.resize(1, grown_bytes)?;
        let sectors_count = grown_bytes / SECTOR_BYTES as u64;
        guest.sh(&format!(
            "for i in $(seq 100); do [ $(cat /sys/block/vdb/size) = {sectors_count} ] && exit 0; sleep 0.1; done\n\
             echo \"vdb has $(cat /sys/block/vdb/size) sectors, not {sectors_count}\"; exit 1"
        ))?;
        // The new space is really there, up to its last sector, and the other disk did not change.
        guest.sh(&format!(
            "seq 1 100000 | head -c 512 >/run/end\ndd if=/run/end of=/dev/vdb seek={0} oflag=direct\n\
             dd if=/dev/vdb skip={0} count=1 iflag=direct | cmp - /run/end\n\
             [ $(cat /sys/block/vda/size) = {1} ]",
            sectors_count - 1,
            size_bytes / SECTOR_BYTES as u64,
        ))?;
        guest.quit()?;
        server.stop()
    })
}

#[test]
fn a_killed_qemu_leaves_a_sound_disk_for_the_next_one() -> Outcome {
    with_lab("QEMU killed under load", |lab| {
        let scratch = ScratchDir::new()?;
        let path = image(&scratch, "disk.img", 256 * MIB)?;
        let server = serve(&[disk("vm0", Medium::Uring { path })])?;
        let mut guest = linux(lab, Payload::Base, server.as_ref(), 1)?;
        guest.sh("mkfs.ext4 -q /dev/vda\nmount /dev/vda /mnt\nseq 1 400000 >/mnt/kept")?;
        let sum = guest.sh("cd /mnt\nsha256sum kept | tee sums\nsync")?;
        guest.sh(
            "for n in 1 2 3; do (while :; do seq $n 3 200000 >/mnt/load$n; sync /mnt/load$n; done) >/dev/null 2>&1 &\n\
             done",
        )?;
        let busy = "cat /sys/block/vda/stat | awk '{print $5}'";
        let before = number(&guest.sh(busy)?);
        std::thread::sleep(Duration::from_secs(2));
        let after = number(&guest.sh(busy)?);
        assert!(after > before, "no writes were under way: {before} before, {after} after");
        guest.kill()?;

        let mut guest = linux(lab, Payload::Base, server.as_ref(), 1)?;
        // The journal is replayed by the mount; afterwards the file system must be clean.
        let again = guest.sh(
            "mount /dev/vda /mnt\ncd /mnt\nsha256sum -c sums >&2\ncat sums\ncd /\numount /mnt",
        )?;
        assert!(again.contains(&sum), "was {sum}, is {again}");
        guest.sh("e2fsck -fn /dev/vda")?;
        guest.quit()?;
        server.stop()
    })
}

#[test]
fn each_sync_of_the_guest_reaches_the_medium() -> Outcome {
    const NAME: &str = "flushes on a loop device";
    if !rustix::process::geteuid().is_root() {
        skip(NAME, "needs root for a loop device");
        return Ok(());
    }
    with_lab(NAME, |lab| {
        let scratch = ScratchDir::new()?;
        let device = LoopDevice::on(&image(&scratch, "loop.img", 64 * MIB)?);
        let server = serve(&[disk("vm0", Medium::Uring { path: device.path.clone() })])?;
        let mut guest = linux(lab, Payload::Base, server.as_ref(), 1)?;
        if server_name() == "qemu-storage-daemon" {
            // QUIRK: its config space starts with wce = 0 whatever its cache is.
            guest.sh("echo 'write back' >/sys/block/vda/cache_type")?;
        }
        assert_eq!(guest.sh("cat /sys/block/vda/cache_type")?, "write back\n");
        let mut raises_flushes = |what: &str, script: &str| -> Outcome {
            for round in 1..=3 {
                let before = device.flushes_count();
                guest.sh(&script.replace("ROUND", &round.to_string()))?;
                let after = device.flushes_count();
                assert!(
                    after > before,
                    "round {round}: {what} in the guest, but {after} flushes before and after"
                );
            }
            Ok(())
        };
        raises_flushes("fsync", "dd if=/dev/zero of=/dev/vda bs=4k count=1 seek=ROUND conv=fsync")?;
        raises_flushes(
            "sync",
            "[ -e /run/made ] || { mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt; touch /run/made; }\n\
             seq ROUND 1000 >/mnt/file\nsync",
        )?;
        // Now the guest's driver sends no flush, so each write has to be stable when it completes.
        let through = "echo 'write through' >/sys/block/vda/cache_type; grep -q through /sys/block/vda/cache_type";
        raises_flushes(
            "a write-through write",
            &format!(
                "umount /mnt || true\n{through}\ndd if=/dev/zero of=/dev/vda bs=4k count=1 seek=ROUND oflag=direct"
            ),
        )?;
        guest.quit()?;
        server.stop()
    })
}

#[test]
fn a_write_of_the_firmware_which_knows_no_flush_reaches_the_medium() -> Outcome {
    const NAME: &str = "firmware writes on a loop device";
    if !rustix::process::geteuid().is_root() {
        skip(NAME, "needs root for a loop device");
        return Ok(());
    }
    if server_name() == "qemu-storage-daemon" {
        skip(NAME, "qemu-storage-daemon acknowledges such writes before they are stable");
        return Ok(());
    }
    with_lab(NAME, |_| {
        let scratch = ScratchDir::new()?;
        let size_bytes = 64 * MIB;
        let path = image(&scratch, "loop.img", size_bytes)?;
        boot_sector::install(&path, size_bytes)?;
        let device = LoopDevice::on(&path);
        let server = serve(&[disk("vm0", Medium::Uring { path: device.path.clone() })])?;
        let before = device.flushes_count();
        boot_by_firmware(server.as_ref())?;
        let after = device.flushes_count();
        assert!(
            after > before,
            "SeaBIOS negotiates no FLUSH, yet its write was not flushed ({after} before and after)"
        );
        server.stop()
    })
}

#[test]
fn a_device_that_can_be_polled_works_without_its_interrupts() -> Outcome {
    with_lab("polled NVMe", |lab| {
        let scratch = ScratchDir::new()?;
        let programs = [env!("CARGO_BIN_EXE_ringmilld"), env!("CARGO_BIN_EXE_ringmill-perf")]
            .map(|program| stripped(&scratch, Path::new(program)));
        let image = lab.linux_with_programs(Payload::Base, &scratch, &programs)?;
        let config = MachineConfig {
            nvme: vec![NvmeConfig {
                namespaces: vec![NamespaceConfig::image(&self::image(
                    &scratch,
                    "nvme.img",
                    64 * MIB,
                )?)],
                ..NvmeConfig::default()
            }],
            kernel_words: "nvme.poll_queues=1".to_owned(),
            ..MachineConfig::new(Boot::Linux(image), Vec::new())
        };
        let mut guest = Guest::start(&config)?;
        let can_poll = guest.sh("cat /sys/block/nvme0n1/queue/io_poll")?;
        assert_eq!(can_poll.trim(), "1", "the kernel gave the device no queue to poll");
        let [polled, plain] =
            ["true", "false"].map(|iopoll| load_nvme(&mut guest, &programs, iopoll));
        let (polled, plain) = (polled?, plain?);
        eprintln!("{polled} interrupts when polled, {plain} when not");
        // Each load is more than 4,096 requests.
        assert!(polled < 40, "completions came by interrupt");
        assert!(plain > 200, "the comparison counts no interrupts");
        guest.quit()
    })
}

/// Serves the NVMe disk in the guest, fills 8 MiB of it, reads and writes, and checks everything; interrupts of the
/// device's I/O queues meanwhile.
fn load_nvme(
    guest: &mut Guest,
    [ringmilld, perf]: &[PathBuf; 2],
    iopoll: &str,
) -> Result<u64, LabError> {
    let (ringmilld, perf) = (ringmilld.display(), perf.display());
    let said = guest.sh_within(
        &format!(
            r#"count() {{ awk '/nvme0q[1-9]/ {{for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) n += $i}} END {{print n + 0}}' /proc/interrupts; }}
printf '[[disk]]\nname = "d"\npath = "/dev/nvme0n1"\niopoll = {iopoll}\n' >/run/c.toml
{ringmilld} -m 1 -S /run/s -r /run/rpc -c /run/c.toml >/run/log 2>&1 &
pid=$!
for i in 1 2 3 4 5 6 7 8 9; do [ -S /run/s/d ] && break; sleep 1; done
before=$(count)
{perf} /run/s/d -w verify -t 2 -q 8 --span 8m >/run/perf 2>&1 || {{ cat /run/perf /run/log; exit 1; }}
after=$(count)
kill $pid; wait $pid || {{ cat /run/log; exit 1; }}
echo counted $((after - before))"#
        ),
        FIO_WAIT_MAX,
    )?;
    let count = said.lines().find_map(|line| line.strip_prefix("counted ")?.trim().parse().ok());
    Ok(count.unwrap_or_else(|| panic!("no count in {said}")))
}

fn serve(disks: &[DiskSpec]) -> Result<Box<dyn DiskServer>, LabError> {
    let kind = match server_name().as_str() {
        "ringmilld" => ServerKind::Ringmilld(PathBuf::from(env!("CARGO_BIN_EXE_ringmilld"))),
        "qemu-storage-daemon" => ServerKind::StorageDaemon,
        other => {
            panic!("RINGMILL_GUEST_SERVER is {other:?}; it may be ringmilld or qemu-storage-daemon")
        }
    };
    kind.start(disks)
}

fn server_name() -> String {
    std::env::var("RINGMILL_GUEST_SERVER").unwrap_or_else(|_| DEFAULT_SERVER.to_owned())
}

fn linux(
    lab: &mut Lab,
    payload: Payload,
    server: &dyn DiskServer,
    disks_count: usize,
) -> Result<Guest, LabError> {
    linux_with(lab, payload, server, disks_count, "")
}

fn linux_with(
    lab: &mut Lab,
    payload: Payload,
    server: &dyn DiskServer,
    disks_count: usize,
    properties: &str,
) -> Result<Guest, LabError> {
    let image = lab.linux(payload)?;
    let disk = |index| DiskConfig {
        properties: properties.to_owned(),
        ..DiskConfig::new(server.socket(index))
    };
    let disks = (0..disks_count).map(disk).collect();
    let started = Instant::now();
    let guest = Guest::start(&MachineConfig::new(Boot::Linux(image), disks))?;
    eprintln!("booted in {:.1} s", started.elapsed().as_secs_f64());
    Ok(guest)
}

fn disk(name: &str, medium: Medium) -> DiskSpec {
    DiskSpec { name: name.to_owned(), medium }
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_else(|_| panic!("not a number: {text:?}"))
}

fn check(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// A loop device on an image; detached when dropped.
struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    fn on(image: &Path) -> Self {
        let path = check(Command::new("/usr/sbin/losetup").args(["--find", "--show"]).arg(image));
        Self { path: PathBuf::from(path.trim()) }
    }

    /// Flush requests that the device has completed: the 16th field of its `stat`
    /// (the kernel's `Documentation/block/stat.rst`).
    fn flushes_count(&self) -> u64 {
        let name = self.path.file_name().expect("/dev/loopN").to_string_lossy();
        let path = format!("/sys/block/{name}/stat");
        let stat = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        number(
            stat.split_whitespace()
                .nth(15)
                .unwrap_or_else(|| panic!("{path} has no 16th field: {stat}")),
        )
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("/usr/sbin/losetup").arg("--detach").arg(&self.path).status();
    }
}
