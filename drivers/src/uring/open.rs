//! Opening an image: every check that stands between a path and a guest.
//!
//! Flow: look at the path → open without blocking → lock → look for foreign formats → O_DIRECT and its rules → size and
//! geometry → abilities. Owner: control threads; may block on the filesystem.
//! **Invariant:** nothing is written, truncated or created here; the descriptor that leaves is locked.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicI32;
use std::sync::{Arc, Mutex};

use ringmill_core::bdev::{Alignment, BdevError, BdevInfo, BlockLocks, Geometry};
use ringmill_core::limits::{BLOCK_BYTES_MAX, SECTOR_BYTES};
use ringmill_core::units::{len_u32, usize_of};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use uuid::Uuid;

use super::ability::{Abilities, Way};
use super::error::{OpenProblem, UringOpenError};
use super::mounts::{DeviceNumber, device_number, is_swap, mounted_at, with_partitions};
use super::probe::{self, DirectRules};
use super::{Counters, Shared, UringBdev, discard_thread, format, lock, ranges};

/// How the host's page cache takes part, in the words of QEMU and libvirt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Not at all (O_DIRECT); the guest flushes.
    #[default]
    None,
    /// Reads and writes go through it; the guest flushes.
    WriteBack,
    /// Reads come from it; every write is stable before it completes.
    WriteThrough,
}

impl CacheMode {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            CacheMode::None => "none",
            CacheMode::WriteBack => "writeback",
            CacheMode::WriteThrough => "writethrough",
        }
    }
}

impl std::str::FromStr for CacheMode {
    type Err = String;

    fn from_str(text: &str) -> Result<CacheMode, String> {
        [CacheMode::None, CacheMode::WriteBack, CacheMode::WriteThrough]
            .into_iter()
            .find(|mode| mode.name() == text)
            .ok_or_else(|| format!("{text:?} is not none, writeback or writethrough"))
    }
}

/// Which image, and how.
#[derive(Clone, Debug, Default)]
pub struct UringOptions {
    /// A regular file or a block device.
    pub filename: PathBuf,
    /// Bytes of the block that guests see, a power of two from 512 to 64 KiB; `None`: the device's own.
    pub block_bytes: Option<u32>,
    /// The host's page cache.
    pub cache: CacheMode,
    /// Guests only read, and several programs may share the image.
    pub read_only: bool,
    /// Serve it raw even if it starts like an image of another format.
    pub format_raw: bool,
    /// Also transfers of media that are memory (tmpfs, zram) go through the ring, where the kernel's worker threads do them,
    /// and are not done at once by the reactor.
    pub ring_only: bool,
    /// Ask a block device for the ends of transfers instead of waiting for its interrupts.
    pub iopoll: bool,
    /// Identity; `None`: a random one.
    pub uuid: Option<Uuid>,
}

pub(super) fn open(name: &str, options: &UringOptions) -> Result<UringBdev, UringOpenError> {
    open_image(name, options).map_err(|problem| UringOpenError { name: name.to_owned(), problem })
}

/// Words for an error of the kernel.
fn explain(options: &UringOptions, what: &'static str, source: io::Error) -> OpenProblem {
    let path = options.filename.clone();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => OpenProblem::Missing { path },
        Some(libc::EISDIR) => OpenProblem::Directory { path },
        Some(libc::EROFS) => OpenProblem::ReadOnlyMedium { path },
        Some(libc::EBUSY) => OpenProblem::Busy { path },
        Some(libc::EACCES | libc::EPERM) if options.read_only => {
            OpenProblem::Permission { path, access: "reading", hint: "" }
        }
        Some(libc::EACCES | libc::EPERM) => OpenProblem::Permission {
            path,
            access: "reading and writing",
            hint: ", or set readonly = true",
        },
        _ => OpenProblem::Io { path, what, source },
    }
}

/// Refuses what is neither file nor block device.
fn check_kind(path: &Path, meta: &Metadata) -> Result<(), OpenProblem> {
    let (path, kind) = (path.to_owned(), meta.file_type());
    let kind = match () {
        () if kind.is_file() || kind.is_block_device() => return Ok(()),
        () if kind.is_dir() => return Err(OpenProblem::Directory { path }),
        () if kind.is_char_device() => "character device",
        () if kind.is_fifo() => "named pipe",
        () if kind.is_socket() => "socket",
        () => "special file",
    };
    Err(OpenProblem::Kind { path, kind })
}

/// Refuses a block device that the system itself writes to.
fn check_unused(path: &Path, device: DeviceNumber) -> Result<(), OpenProblem> {
    let devices = with_partitions(device);
    if let Some(at) = mounted_at(&devices) {
        return Err(OpenProblem::Mounted { path: path.to_owned(), at });
    }
    if is_swap(&devices) {
        return Err(OpenProblem::Swap { path: path.to_owned() });
    }
    Ok(())
}

/// Opens the path without ever waiting for the other end of a pipe or a tape; returns the file as found.
fn open_file(options: &UringOptions) -> Result<(File, Metadata), OpenProblem> {
    let path = options.filename.as_path();
    let failed = |source| explain(options, "open it", source);
    let meta = std::fs::metadata(path).map_err(failed)?;
    check_kind(path, &meta)?;
    let mut flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    if meta.file_type().is_block_device() && !options.read_only {
        check_unused(path, device_number(meta.rdev()))?;
        flags |= libc::O_EXCL;
    }
    let file = OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(path)
        .map_err(failed)?;
    // The path may have changed hands since it was looked at.
    let meta = file.metadata().map_err(failed)?;
    check_kind(path, &meta)?;
    // With O_NONBLOCK set, io_uring would answer EAGAIN instead of waiting.
    set_flags(&file, OFlags::empty(), OFlags::NONBLOCK).map_err(failed)?;
    Ok((file, meta))
}

fn set_flags(file: &File, add: OFlags, drop: OFlags) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, (flags | add) - drop)?)
}

/// Switches to O_DIRECT and learns its rules.
fn go_direct(
    file: &File,
    options: &UringOptions,
    device: Option<DeviceNumber>,
) -> Result<DirectRules, OpenProblem> {
    let path = || options.filename.clone();
    if set_flags(file, OFlags::DIRECT, OFlags::empty()).is_err() {
        return Err(OpenProblem::Direct { path: path() });
    }
    match device {
        Some(device) => probe::device_rules(file, device)
            .map_err(|source| explain(options, "ask for the block size", source)),
        None => probe::file_rules(file).ok_or_else(|| OpenProblem::Direct { path: path() }),
    }
}

/// Rules through the page cache: any memory; a device's own block, so that none is half-written by two reactors.
fn buffered_rules(file: &File, device: Option<DeviceNumber>) -> DirectRules {
    let offset_bytes = match device {
        Some(_) => rustix::fs::ioctl_blksszget(file).unwrap_or(SECTOR_BYTES).max(SECTOR_BYTES),
        None => SECTOR_BYTES,
    };
    DirectRules { memory_bytes: 1, offset_bytes }
}

fn check_format(file: &File, options: &UringOptions) -> Result<(), OpenProblem> {
    let mut head = [0; format::HEAD_BYTES];
    let read = file
        .read_at(&mut head, 0)
        .map_err(|source| explain(options, "read its first block", source))?;
    match format::detect(&head[..read]) {
        Some(format) if !options.format_raw => {
            Err(OpenProblem::Format { path: options.filename.clone(), format })
        }
        _ => Ok(()),
    }
}

/// The logical block that guests see, checked against what the device can do.
fn choose_block(options: &UringOptions, rules: DirectRules) -> Result<u32, OpenProblem> {
    let path = options.filename.clone();
    let block_bytes = options.block_bytes.unwrap_or(rules.offset_bytes);
    if !block_bytes.is_power_of_two() || !(SECTOR_BYTES..=BLOCK_BYTES_MAX).contains(&block_bytes) {
        let reason =
            format!("block size {block_bytes} is not a power of two from 512 to {BLOCK_BYTES_MAX}");
        return Err(OpenProblem::Geometry { path, reason });
    }
    // Through the page cache a smaller one only costs the reads around it.
    if options.cache == CacheMode::None && block_bytes < rules.offset_bytes {
        return Err(OpenProblem::Block { path, block_bytes, device_bytes: rules.offset_bytes });
    }
    Ok(block_bytes)
}

fn choose_geometry(
    options: &UringOptions,
    file: &File,
    meta: &Metadata,
    block_bytes: u32,
) -> Result<Geometry, OpenProblem> {
    let path = || options.filename.clone();
    let size_bytes =
        probe::size_bytes(file).map_err(|source| explain(options, "ask for its size", source))?;
    if size_bytes == 0 {
        return Err(OpenProblem::Empty { path: path() });
    }
    let block = u64::from(block_bytes);
    if !size_bytes.is_multiple_of(block) {
        let next_bytes = size_bytes.next_multiple_of(block);
        return Err(OpenProblem::Size { path: path(), size_bytes, block_bytes, next_bytes });
    }
    let own_physical = match meta.file_type().is_block_device() {
        true => rustix::fs::ioctl_blkpbszget(file).unwrap_or(block_bytes),
        // Filesystems that name a large transfer size here (network ones) do not mean a block.
        false => len_u32(usize_of(meta.blksize())).min(4096),
    };
    let physical_block_bytes =
        own_physical.checked_next_power_of_two().unwrap_or(block_bytes).max(block_bytes);
    Ok(Geometry {
        block_bytes,
        physical_block_bytes,
        optimal_io_bytes: 0,
        blocks_count: size_bytes / block,
        read_only: options.read_only,
        write_cache: options.cache != CacheMode::WriteThrough,
        discard: false,
        discard_granularity_bytes: 0,
        write_zeroes: !options.read_only,
    })
}

/// Finds out how ranges can be discarded and writes that into the geometry.
fn probe_abilities(
    file: &File,
    device: Option<DeviceNumber>,
    geometry: &mut Geometry,
) -> Abilities {
    let abilities = Abilities::new(device.is_some());
    if geometry.read_only {
        return abilities;
    }
    match device {
        None => {
            if !probe::punches_holes(file, geometry.blocks_count * u64::from(geometry.block_bytes))
            {
                abilities.strike(Way::Punch);
            }
            geometry.discard_granularity_bytes = geometry.physical_block_bytes;
        }
        Some(device) => {
            let limit_bytes = probe::queue_number(device, "discard_max_bytes").unwrap_or(0);
            if limit_bytes == 0 || !discard_thread::ring_discards(file) {
                abilities.strike(Way::RingDiscard);
            }
            // Also where the ring can: it may yet refuse, and the thread only waits.
            if limit_bytes == 0 || discard_thread::start().is_err() {
                abilities.strike(Way::HelperDiscard);
            }
            let granularity = probe::queue_number(device, "discard_granularity").unwrap_or(0);
            geometry.discard_granularity_bytes =
                len_u32(usize_of(granularity)).max(geometry.block_bytes);
        }
    }
    geometry.discard = abilities.discard_way().is_some();
    abilities
}

/// Refuses to poll what cannot be polled.
fn check_polling(options: &UringOptions, device: Option<DeviceNumber>) -> Result<(), OpenProblem> {
    let path = options.filename.clone();
    let Some(device) = device else {
        return Err(OpenProblem::Poll { path, why: "only block devices can be polled" });
    };
    if options.cache != CacheMode::None {
        return Err(OpenProblem::Poll { path, why: "polling needs cache = \"none\"" });
    }
    if probe::queue_number(device, "io_poll") != Some(1) {
        let why = "the device has no queues to poll (queue/io_poll is 0); NVMe gets them by nvme.poll_queues=N on the \
                   kernel's command line";
        return Err(OpenProblem::Poll { path, why });
    }
    Ok(())
}

fn open_image(name: &str, options: &UringOptions) -> Result<UringBdev, OpenProblem> {
    let path = || options.filename.clone();
    let (file, meta) = open_file(options)?;
    match lock::try_lock(&file, options.read_only) {
        Ok(true) => {}
        Ok(false) => return Err(OpenProblem::Locked { path: path() }),
        Err(source) => return Err(OpenProblem::Io { path: path(), what: "lock it", source }),
    }
    check_format(&file, options)?;
    let device = meta.file_type().is_block_device().then(|| device_number(meta.rdev()));
    if options.iopoll {
        check_polling(options, device)?;
    }
    let direct = options.cache == CacheMode::None;
    // An empty file cannot be tried, and has a better message coming.
    let has_data = probe::size_bytes(&file).is_ok_and(|bytes| bytes > 0);
    let rules = match direct && has_data {
        true => go_direct(&file, options, device)?,
        false => buffered_rules(&file, device),
    };
    let block_bytes = choose_block(options, rules)?;
    let mut geometry = choose_geometry(options, &file, &meta, block_bytes)?;
    let abilities = probe_abilities(&file, device, &mut geometry);
    ranges::prepare_zeroes()
        .map_err(|e| OpenProblem::Geometry { path: path(), reason: e.to_string() })?;
    let info = BdevInfo::new(name, options.uuid, "Uring disk", geometry).map_err(|e| match e {
        BdevError::Geometry { reason, .. } => OpenProblem::Geometry { path: path(), reason },
        other => OpenProblem::Geometry { path: path(), reason: other.to_string() },
    })?;
    let in_place = !options.ring_only && !options.iopoll && probe::is_memory(&file, device);
    let facts = vec![
        ("filename", options.filename.display().to_string()),
        ("kind", if device.is_some() { "block device" } else { "file" }.to_owned()),
        ("cache", options.cache.name().to_owned()),
        ("transfers", if in_place { "in place" } else { "io_uring" }.to_owned()),
    ];
    let offset_bytes = rules.offset_bytes;
    Ok(UringBdev {
        info: Arc::new(info),
        shared: Arc::new(Shared {
            file,
            abilities,
            write_through: options.cache == CacheMode::WriteThrough,
            write_flags: match options.cache {
                CacheMode::WriteThrough => libc::RWF_DSYNC,
                CacheMode::None | CacheMode::WriteBack => 0,
            },
            buffered: !direct,
            polled: options.iopoll,
            in_place,
            transfer_unit_bytes: if direct { offset_bytes } else { 1 },
            counters: Counters::default(),
            sync_failed: AtomicI32::new(0),
        }),
        rules: Alignment {
            block_bytes: offset_bytes,
            address_bytes: rules.memory_bytes,
            segment_bytes: if direct { offset_bytes } else { 1 },
        },
        locks: (offset_bytes > SECTOR_BYTES).then(|| Arc::new(BlockLocks::default())),
        channels: Mutex::new(Vec::new()),
        facts,
    })
}
