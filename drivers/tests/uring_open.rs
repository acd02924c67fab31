//! What cannot be served is refused in one line that says what to do.
#![expect(unsafe_code)] // UNSAFETY: one thread of the test gives up root's way around file permissions.

mod media;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use media::{Loop, Mount, Zram, disk_dir, image, open, options, shm_dir, skipped};
use ringmill_core::bdev::Bdev;
use ringmill_core::bdev::conformance::TestBed;
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_drivers::uring::{CacheMode, OpenProblem, UringBdev, UringOpenError, UringOptions};

fn refusal(options: &UringOptions) -> UringOpenError {
    let error = UringBdev::open("vm1", options).expect_err("must be refused");
    let text = error.to_string();
    assert!(text.starts_with("disk \"vm1\": \"/"), "{text}");
    assert!(!text.contains('\n') && text.len() < 300, "{text}");
    eprintln!("{text}");
    error
}

fn refused(path: &Path, words: &[&str]) {
    let text = refusal(&options(path, CacheMode::None)).to_string();
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

#[test]
fn paths_that_are_no_images_are_refused() {
    let dir = disk_dir();
    refused(&dir.path().join("nothing"), &["does not exist", "truncate"]);
    refused(dir.path(), &["is a directory", "image file"]);
    refused(Path::new("/dev/null"), &["character device", "regular file or a block device"]);
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    refused(&fifo, &["named pipe"]);
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    refused(&socket, &["socket"]);
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let dir = disk_dir();
    refused(&image(&dir, 0), &["is empty", "truncate"]);
    refused(&image(&dir, 5000), &["5000 bytes", "block size 512", "truncate -s 5120"]);
    let path = image(&dir, 8192 + 512);
    let with_block = |block_bytes| {
        let block_bytes = Some(block_bytes);
        refusal(&UringOptions { block_bytes, ..options(&path, CacheMode::None) }).to_string()
    };
    assert!(with_block(4096).contains("truncate -s 12288"));
    for odd in [0, 256, 1000, 131_072] {
        assert!(with_block(odd).contains("power of two from 512"));
    }
    // Nothing was changed by looking.
    assert_eq!(fs::metadata(&path).unwrap().len(), 8192 + 512);
}

#[test]
fn other_formats_are_refused_as_raw_unless_told() {
    let dir = disk_dir();
    let mut vdi = [0; 512];
    vdi[0x40..0x44].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
    let heads: [(&[u8], &str); 6] = [
        (b"QFI\xfb\0\0\0\x03", "qcow2"),
        (b"KDMV\x01", "VMDK"),
        (b"COWD", "VMDK"),
        (b"# Disk DescriptorFile\n", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (&vdi, "VDI"),
    ];
    for (head, format) in heads {
        let path = dir.path().join("foreign");
        fs::write(&path, head).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
        refused(&path, &[format, "qemu-img", "format = \"raw\""]);
        let options = UringOptions { format_raw: true, ..options(&path, CacheMode::None) };
        drop(open(&options));
    }
}

#[test]
fn a_second_opener_is_named_the_lock_and_gets_it_when_the_first_is_gone() {
    let dir = disk_dir();
    let path = image(&dir, 1 << 20);
    let first = open(&options(&path, CacheMode::None));
    refused(&path, &["locked by another program", "readonly = true"]);
    assert!(refusal(&options(&path, CacheMode::None)).may_pass());
    let reader = UringOptions { read_only: true, ..options(&path, CacheMode::WriteBack) };
    assert!(refusal(&reader).may_pass(), "a writer keeps readers out");
    // A channel's place in the ring holds the lock too: its requests could still be running.
    let bed = TestBed::new(&*first);
    drop(first);
    assert!(refusal(&options(&path, CacheMode::None)).may_pass());
    bed.finish();
    let reader_one = open(&reader);
    let reader_two = open(&reader);
    refused(&path, &["locked"]);
    drop((reader_one, reader_two));
    drop(open(&options(&path, CacheMode::None)));
}

/// Not a test: the process that the next one kills.
#[test]
#[ignore = "run by a_killed_owner_gives_the_image_up"]
fn owner_that_waits_to_be_killed() {
    let Some(path) = std::env::var_os("RINGMILL_TEST_IMAGE") else { return };
    let bdev = open(&options(Path::new(&path), CacheMode::None));
    let mut bed = TestBed::new(&*bdev);
    println!("ready");
    loop {
        for arena in 0..32 {
            let segment = bed.segment(arena, 0, 65536);
            let _ = bed.offer(IoOp::Write, IoFlags::FUA, 0, 65536, &[segment]);
        }
        bed.turn(|_, _| {});
    }
}

#[test]
fn a_killed_owner_gives_the_image_up() {
    let dir = disk_dir();
    let path = image(&dir, 1 << 20);
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "owner_that_waits_to_be_killed"])
        .env("RINGMILL_TEST_IMAGE", &path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.ends_with("ready")));
    assert!(refusal(&options(&path, CacheMode::None)).may_pass());
    owner.kill().unwrap();
    owner.wait().unwrap();
    let start = Instant::now();
    let patience = Duration::from_secs(10);
    let got = UringBdev::open_patiently("vm1", &options(&path, CacheMode::None), patience);
    eprintln!("the image was free {:?} after its owner's end", start.elapsed());
    drop(got.expect("the kernel gives the lock up with the last request"));
}

#[test]
fn permissions_are_explained() {
    let dir = shm_dir();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = image(&dir, 1 << 20);
    let check = move || {
        // SAFETY: plain system calls without pointers; they concern this thread only, which ends here. Root's
        // capabilities over files go away with the filesystem uid (capabilities(7)).
        unsafe {
            libc::syscall(libc::SYS_setfsgid, 65534);
            libc::syscall(libc::SYS_setfsuid, 65534);
        }
        fs::metadata(&path).unwrap();
        refused(&path, &["no permission", "reading and writing", "readonly = true"]);
        let options = UringOptions { read_only: true, ..options(&path, CacheMode::None) };
        drop(UringBdev::open("vm1", &options).expect("reading is allowed"));
        path
    };
    let path = if rustix::process::geteuid().is_root() {
        std::thread::spawn(check).join().unwrap()
    } else {
        return skipped("permissions_are_explained", "needs root to have a file of another user");
    };
    drop(open(&options(&path, CacheMode::None)));
}

#[test]
fn filesystems_without_direct_io_point_to_the_page_cache() {
    let dir = disk_dir();
    let mount = match Mount::new(&dir, "ramfs", "none", "mode=755") {
        Ok(mount) => mount,
        Err(reason) => {
            return skipped("filesystems_without_direct_io_point_to_the_page_cache", &reason);
        }
    };
    let path = mount.path.join("disk.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    refused(&path, &["does not support direct I/O", "cache = \"writeback\""]);
    drop(open(&options(&path, CacheMode::WriteBack)));
}

#[test]
fn a_read_only_filesystem_is_named() {
    let dir = disk_dir();
    let mut mount = match Mount::new(&dir, "tmpfs", "none", "size=8m") {
        Ok(mount) => mount,
        Err(reason) => return skipped("a_read_only_filesystem_is_named", &reason),
    };
    let path = mount.path.join("disk.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    mount.remount_read_only();
    let text = refusal(&options(&path, CacheMode::WriteBack)).to_string();
    assert!(text.contains("read-only filesystem") && text.contains("readonly = true"), "{text}");
    let options = UringOptions { read_only: true, ..options(&path, CacheMode::WriteBack) };
    drop(open(&options));
}

/// A loop device over a fresh image in `dir`.
fn loop_device(dir: &tempfile::TempDir, name: &str, sector_bytes: u32) -> Option<(PathBuf, Loop)> {
    let backing = image(dir, 16 << 20);
    match Loop::new(&backing, sector_bytes) {
        Ok(device) => Some((backing, device)),
        Err(reason) => {
            skipped(name, &reason);
            None
        }
    }
}

#[test]
fn a_mounted_device_is_refused_and_a_used_one_is_busy() {
    let dir = disk_dir();
    let name = "a_mounted_device_is_refused_and_a_used_one_is_busy";
    let Some((_, device)) = loop_device(&dir, name, 512) else { return };
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&device.path).status();
    if !made.is_ok_and(|status| status.success()) {
        return skipped(name, "mkfs.ext4 is missing");
    }
    let place = disk_dir();
    let source = device.path.to_str().unwrap();
    let mount = match Mount::new(&place, "ext4", source, "defaults") {
        Ok(mount) => mount,
        Err(reason) => return skipped(name, &reason),
    };
    let mount_text = mount.path.display().to_string();
    let error = refusal(&options(&device.path, CacheMode::None));
    assert!(matches!(error.problem, OpenProblem::Mounted { .. }));
    assert!(error.to_string().contains(&mount_text), "{error}");
    let reader = UringOptions { read_only: true, ..options(&device.path, CacheMode::None) };
    drop(open(&reader));
    drop(mount);

    let first = open(&options(&device.path, CacheMode::None));
    let error = refusal(&options(&device.path, CacheMode::None));
    assert!(matches!(error.problem, OpenProblem::Busy { .. }) && error.may_pass(), "{error}");
    drop(first);
    drop(open(&options(&device.path, CacheMode::None)));
}

#[test]
fn a_disk_with_a_mounted_partition_is_refused() {
    let name = "a_disk_with_a_mounted_partition_is_refused";
    let dir = disk_dir();
    let backing = image(&dir, 16 << 20);
    // One Linux partition of 8 MiB from sector 2048 on, in an MBR.
    let mut boot = [0; 512];
    boot[446 + 4] = 0x83;
    boot[446 + 8..][..4].copy_from_slice(&2048_u32.to_le_bytes());
    boot[446 + 12..][..4].copy_from_slice(&16384_u32.to_le_bytes());
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    let file = fs::OpenOptions::new().write(true).open(&backing).unwrap();
    file.write_all_at(&boot, 0).unwrap();
    let device = match Loop::with_partitions(&backing) {
        Ok(device) => device,
        Err(reason) => return skipped(name, &reason),
    };
    let partition = PathBuf::from(format!("{}p1", device.path.display()));
    for _ in 0..50 {
        if partition.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    if !partition.exists() {
        return skipped(name, "no device node for a loop device's partition");
    }
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&partition).status();
    if !made.is_ok_and(|status| status.success()) {
        return skipped(name, "mkfs.ext4 is missing");
    }
    let place = disk_dir();
    let mount = Mount::new(&place, "ext4", partition.to_str().unwrap(), "defaults").unwrap();
    for path in [&device.path, &partition] {
        let error = refusal(&options(path, CacheMode::None));
        assert!(matches!(error.problem, OpenProblem::Mounted { .. }), "{error}");
    }
    drop(mount);
    let bdev = open(&options(&partition, CacheMode::None));
    assert_eq!(bdev.info().size_bytes(), 8 << 20);
    assert!(bdev.info().geometry().discard, "a partition has its disk's abilities");
}

#[test]
fn a_block_below_the_devices_own_is_refused() {
    let device = match Zram::new(16 << 20) {
        Ok(device) => device,
        Err(reason) => return skipped("a_block_below_the_devices_own_is_refused", &reason),
    };
    let small = |cache| UringOptions { block_bytes: Some(512), ..options(&device.path, cache) };
    let text = refusal(&small(CacheMode::None)).to_string();
    assert!(text.contains("blocks of 4096 bytes, more than the block size 512"), "{text}");
    let bdev = open(&small(CacheMode::WriteBack));
    assert_eq!(bdev.info().geometry().block_bytes, 512);
    assert!(bdev.info().geometry().physical_block_bytes >= 4096);
}

#[test]
fn block_sizes_above_the_devices_own_are_served() {
    let dir = disk_dir();
    let path = image(&dir, 1 << 20);
    for block_bytes in [512, 1024, 4096, 65536] {
        let block_bytes_option = Some(block_bytes);
        let options =
            UringOptions { block_bytes: block_bytes_option, ..options(&path, CacheMode::None) };
        let bdev: Arc<UringBdev> = open(&options);
        let geometry = bdev.info().geometry();
        assert_eq!(
            (geometry.block_bytes, geometry.blocks_count),
            (block_bytes, (1 << 20) / u64::from(block_bytes))
        );
        assert!(geometry.physical_block_bytes >= block_bytes);
    }
}
