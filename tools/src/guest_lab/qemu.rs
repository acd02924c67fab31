//! One QEMU process: its command line, its sockets, its end.
//!
//! Software emulation (`tcg,thread=multi`), shared guest memory, vhost-user-blk-pci disks that reconnect, two serial
//! ports (console, commands) and QMP, each over a socket that the lab listens on *before* QEMU starts: QEMU is the
//! client, so no output is lost and no start-up is raced. Works with QEMU 7.2 and newer.

use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::process::{Running, ScratchDir, command, run_text};
use super::qmp::Qmp;
use super::{LabError, LinuxImage, packages};

/// QEMU connects its sockets first thing.
const START_WAIT_MAX: Duration = Duration::from_secs(30);

/// Behind the slots that QEMU gives to devices without an address.
const NVME_SLOT_FIRST: usize = 0x10;

/// A disk as the machine sees it.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// The vhost-user socket of its server.
    pub socket: PathBuf,
    /// Virtqueues; at most one per vCPU makes sense.
    pub queues: u16,
    /// More properties of the device, each starting with a comma: `,packed=on`.
    pub properties: String,
}

impl DiskConfig {
    /// A disk with two queues.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), queues: 2, properties: String::new() }
    }
}

/// An emulated NVMe controller.
#[derive(Debug, Clone, Default)]
pub struct NvmeConfig {
    /// More properties of the controller, each starting with a comma: `,mdts=1,cmb_size_mb=16`.
    pub properties: String,
    /// Where it is plugged in, in QEMU's words; by default `addr=0x10`, the next `addr=0x11`, on the root bus.
    pub place: Option<String>,
    /// Its namespaces, numbered from 1.
    pub namespaces: Vec<NamespaceConfig>,
}

/// A namespace of it.
#[derive(Debug, Clone)]
pub struct NamespaceConfig {
    /// The options of QEMU's `-drive` behind its id: `format=raw,file=disk.img`.
    pub drive: String,
    /// More properties of the namespace: `,logical_block_size=4096`.
    pub properties: String,
}

impl NamespaceConfig {
    /// A namespace in an image.
    #[must_use]
    pub fn image(path: &Path) -> Self {
        Self { drive: format!("format=raw,file={}", escape(path)), properties: String::new() }
    }
}

/// What the machine starts.
#[derive(Debug, Clone)]
pub enum Boot {
    /// A kernel and an initramfs, loaded by QEMU.
    Linux(LinuxImage),
    /// Whatever SeaBIOS finds on the first disk.
    FirstDisk,
}

/// A machine.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    /// What it starts.
    pub boot: Boot,
    /// In the order in which Linux names them `vda`, `vdb`, …
    pub disks: Vec<DiskConfig>,
    /// vCPUs.
    pub cpus_count: u16,
    /// RAM.
    pub memory_mib: u32,
    /// In the order of their addresses, which is that of Linux: `nvme0`, `nvme1`, …
    pub nvme: Vec<NvmeConfig>,
    /// An IOMMU (VT-d), which Linux is told to use.
    pub has_iommu: bool,
    /// More devices, as QEMU's `-device` takes them: bridges and ports. They come before those above.
    pub devices: Vec<String>,
    /// Events of QEMU's that are written to a file, and that file: `pci_nvme_*`.
    pub trace: Option<(String, PathBuf)>,
    /// More words of the kernel's command line.
    pub kernel_words: String,
}

impl MachineConfig {
    /// Two vCPUs, 768 MiB.
    #[must_use]
    pub fn new(boot: Boot, disks: Vec<DiskConfig>) -> Self {
        Self {
            boot,
            disks,
            cpus_count: 2,
            memory_mib: 768,
            nvme: Vec::new(),
            has_iommu: false,
            devices: Vec::new(),
            trace: None,
            kernel_words: String::new(),
        }
    }
}

/// A running QEMU and the streams to it.
#[derive(Debug)]
pub(super) struct Qemu {
    pub(super) process: Running,
    pub(super) console: UnixStream,
    pub(super) commands: UnixStream,
    pub(super) qmp: Qmp,
    /// After the process, because fields are dropped in order.
    _scratch: ScratchDir,
}

impl Qemu {
    pub(super) fn start(config: &MachineConfig) -> Result<Self, LabError> {
        let program = packages::find("qemu-system-x86_64").ok_or_else(|| LabError::Packages {
            list: "qemu-system-x86 (for qemu-system-x86_64)".to_owned(),
        })?;
        let version = version_of(&program)?;
        let scratch = ScratchDir::new()?;
        let [console, commands, qmp] =
            ["console", "commands", "qmp"].map(|name| scratch.path().join(name));
        let listeners = [listen(&console)?, listen(&commands)?, listen(&qmp)?];
        let args = arguments(config, version, [&console, &commands, &qmp]);
        let mut process = Running::start(&program, &args, scratch.path())?;
        let [console, commands, qmp] = &listeners;
        let console = accept(&mut process, console)?;
        let commands = accept(&mut process, commands)?;
        // QEMU connects its sockets before it looks at its devices: a bad device shows here, and only stderr says why.
        let qmp = Qmp::new(accept(&mut process, qmp)?).map_err(|error| {
            LabError::protocol(
                "QEMU",
                format!("did not start: {}; its words: {}", error, process.stderr()),
            )
        })?;
        Ok(Self { console, commands, qmp, process, _scratch: scratch })
    }
}

/// Major and minor number of a program of QEMU's: `QEMU emulator version 7.2.22 (Debian …)`.
pub(super) fn version_of(program: &Path) -> Result<(u32, u32), LabError> {
    let text = run_text(command(&program.to_string_lossy()).arg("--version"))?;
    parse_version(&text).ok_or_else(|| {
        LabError::protocol("qemu --version", format!("no version number in {text:?}"))
    })
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split("version ").nth(1)?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn arguments(
    config: &MachineConfig,
    version: (u32, u32),
    [console, commands, qmp]: [&Path; 3],
) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut option = |name: &str, value: String| args.extend([format!("-{name}"), value]);
    let memory_mib = config.memory_mib;
    // No -nographic: it would make SeaBIOS copy its screen to the first serial port.
    option("display", "none".to_owned());
    // Remapped interrupts need the I/O APIC in user space; it is there anyway without KVM, but QEMU insists on the word.
    let irqchip = if config.has_iommu { ",kernel-irqchip=split" } else { "" };
    option("machine", format!("q35,memory-backend=mem{irqchip}"));
    if config.has_iommu {
        // Before all devices behind it.
        option("device", "intel-iommu,intremap=on,caching-mode=on".to_owned());
    }
    for device in &config.devices {
        option("device", device.clone());
    }
    option("accel", "tcg,thread=multi".to_owned());
    option("cpu", "max".to_owned());
    option("smp", config.cpus_count.to_string());
    option("m", format!("{memory_mib}M"));
    option("object", format!("memory-backend-memfd,id=mem,size={memory_mib}M,share=on"));
    for (id, path) in [("console", console), ("commands", commands)] {
        option("chardev", format!("socket,id={id},path={}", escape(path)));
        option("serial", format!("chardev:{id}"));
    }
    option("chardev", format!("socket,id=qmp,path={}", escape(qmp)));
    option("mon", "chardev=qmp,mode=control".to_owned());
    // QEMU 9.2 renamed the option, later versions dropped the old name.
    let reconnect = if version >= (9, 2) { "reconnect-ms=200" } else { "reconnect=1" };
    for (index, disk) in config.disks.iter().enumerate() {
        let (socket, queues) = (escape(&disk.socket), disk.queues);
        option("chardev", format!("socket,id=disk{index},path={socket},{reconnect}"));
        let properties = &disk.properties;
        // A kernel given to QEMU has boot index 0 itself, and needs no disk to boot from.
        let boot = if matches!(config.boot, Boot::FirstDisk) {
            format!(",bootindex={index}")
        } else {
            String::new()
        };
        option(
            "device",
            format!("vhost-user-blk-pci,chardev=disk{index},num-queues={queues}{boot}{properties}"),
        );
    }
    for (index, nvme) in config.nvme.iter().enumerate() {
        let place =
            nvme.place.clone().unwrap_or_else(|| format!("addr={:#x}", NVME_SLOT_FIRST + index));
        let properties = &nvme.properties;
        option("device", format!("nvme,id=nvme{index},serial=lab{index},{place}{properties}"));
        for (number, namespace) in (1..).zip(&nvme.namespaces) {
            let (drive, properties) = (&namespace.drive, &namespace.properties);
            option("drive", format!("if=none,id=nvme{index}n{number},{drive}"));
            let disk = format!("nvme-ns,bus=nvme{index},drive=nvme{index}n{number},nsid={number}");
            option("device", disk + properties);
        }
    }
    if let Some((events, file)) = &config.trace {
        option("trace", events.clone());
        option("D", file.display().to_string());
    }
    if let Boot::Linux(image) = &config.boot {
        option("kernel", image.kernel.display().to_string());
        option("initrd", image.initramfs.display().to_string());
        // panic=0: a panic stays on the console to be read; mitigations only cost time here.
        let words = "console=ttyS0 quiet panic=0 mitigations=off random.trust_cpu=on";
        let iommu = if config.has_iommu { " intel_iommu=on" } else { "" };
        option("append", format!("{words}{iommu} {}", config.kernel_words).trim_end().to_owned());
    }
    args.extend(["-nodefaults".to_owned(), "-no-user-config".to_owned()]);
    args
}

/// A comma in an option's value is doubled.
fn escape(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn listen(path: &Path) -> Result<UnixListener, LabError> {
    let what = format!("listening on {}", path.display());
    let listener = UnixListener::bind(path).map_err(LabError::io(what.clone()))?;
    listener.set_nonblocking(true).map_err(LabError::io(what))?;
    Ok(listener)
}

fn accept(process: &mut Running, listener: &UnixListener) -> Result<UnixStream, LabError> {
    let mut outcome: Option<Result<UnixStream, std::io::Error>> = None;
    process.wait_until("QEMU's connection to the lab", START_WAIT_MAX, || {
        match listener.accept() {
            Ok((stream, _)) => outcome = Some(Ok(stream)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => outcome = Some(Err(error)),
        }
        outcome.is_some()
    })?;
    let stream = outcome
        .unwrap_or_else(|| Err(ErrorKind::TimedOut.into()))
        .map_err(LabError::io("accepting QEMU's connection"))?;
    stream.set_nonblocking(false).map_err(LabError::io("making QEMU's connection blocking"))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_debian_and_of_upstream_are_read() {
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright"),
            Some((7, 2))
        );
        assert_eq!(
            parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n"),
            Some((10, 0))
        );
        assert_eq!(parse_version("something else"), None);
    }

    #[test]
    fn the_reconnect_option_follows_the_version() {
        let config =
            MachineConfig::new(Boot::FirstDisk, vec![DiskConfig::new(Path::new("/tmp/a,b"))]);
        let line = |version| {
            arguments(&config, version, [Path::new("c"), Path::new("d"), Path::new("q")]).join(" ")
        };
        assert!(line((7, 2)).contains("path=/tmp/a,,b,reconnect=1"), "{}", line((7, 2)));
        assert!(line((10, 0)).contains("reconnect-ms=200"));
    }
}
