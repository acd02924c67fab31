//! The servers of the guests' disks: `ringmilld`, and `qemu-storage-daemon` as the known good one to compare with.
//!
//! In: [`DiskSpec`]s. Out: one vhost-user socket per disk, resize, stop. A test takes `&mut dyn DiskServer` and cannot
//! tell which one it got.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::lines::Lines;
use super::process::{Running, ScratchDir};
use super::qemu::version_of;
use super::qmp::Qmp;
use super::{LabError, packages};

/// QUIRK: `qemu-storage-daemon` 7.2 never sends CONFIG_CHANGE, 10.0 does; both seen with the same QEMU.
const RESIZE_ANNOUNCED_SINCE: (u32, u32) = (10, 0);

const START_WAIT_MAX: Duration = Duration::from_secs(20);
const STOP_WAIT_MAX: Duration = Duration::from_secs(10);
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(30);

/// Block size of RAM disks, as SPDK's examples have it.
const RAM_BLOCK_BYTES: u64 = 512;

/// Where a disk's data lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Medium {
    /// RAM of the server.
    Malloc {
        /// A multiple of 512.
        size_bytes: u64,
    },
    /// A file or block device that is there already, reached through io_uring.
    Uring {
        /// Its path.
        path: PathBuf,
    },
}

/// A disk to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// Name of the bdev; the controller is called the same.
    pub name: String,
    /// Its data.
    pub medium: Medium,
}

/// A running server of vhost-user disks.
pub trait DiskServer {
    /// The socket of the disk with this index, in the order in which they were given.
    fn socket(&self, index: usize) -> &Path;

    /// Tells the server, and through it the guest, that a [`Medium::Uring`] file has grown to `size_bytes`. The file
    /// itself is resized by this call.
    ///
    /// # Errors
    /// The server refuses.
    fn resize(&mut self, index: usize, size_bytes: u64) -> Result<(), LabError>;

    /// Whether a connected guest hears of a resize.
    fn announces_resize(&self) -> bool {
        true
    }

    /// Ends it in an orderly way.
    ///
    /// # Errors
    /// It does not end in time, or with a failure.
    fn stop(self: Box<Self>) -> Result<(), LabError>;
}

/// Which server to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerKind {
    /// This daemon program.
    Ringmilld(PathBuf),
    /// QEMU's.
    StorageDaemon,
}

impl ServerKind {
    /// Starts it with `disks`.
    ///
    /// # Errors
    /// It does not start or refuses a disk; its own words are in the message.
    pub fn start(&self, disks: &[DiskSpec]) -> Result<Box<dyn DiskServer>, LabError> {
        Ok(match self {
            Self::Ringmilld(program) => Box::new(Ringmilld::start(program, disks)?),
            Self::StorageDaemon => Box::new(StorageDaemon::start(disks)?),
        })
    }
}

/// `ringmilld`, configured over its RPC socket.
#[derive(Debug)]
struct Ringmilld {
    disks: Vec<DiskSpec>,
    sockets: Vec<PathBuf>,
    rpc: Rpc,
    process: Running,
    _scratch: ScratchDir,
}

impl Ringmilld {
    fn start(program: &Path, disks: &[DiskSpec]) -> Result<Self, LabError> {
        let scratch = ScratchDir::new()?;
        let sockets_dir = scratch.path().join("s");
        fs::create_dir(&sockets_dir).map_err(LabError::io("creating the socket directory"))?;
        let rpc_socket = scratch.path().join("rpc");
        let args = [
            "--socket-dir".into(),
            sockets_dir.clone().into_os_string(),
            "--rpc-socket".into(),
            rpc_socket.clone().into_os_string(),
        ];
        let mut process = Running::start(program, args, scratch.path())?;
        let mut rpc = Rpc::new(connect(&mut process, &rpc_socket)?)?;
        for DiskSpec { name, medium } in disks {
            match medium {
                Medium::Malloc { size_bytes } => rpc.call(
                    "bdev_malloc_create",
                    &json!({ "name": name, "block_size": RAM_BLOCK_BYTES, "num_blocks": size_bytes / RAM_BLOCK_BYTES }),
                )?,
                Medium::Uring { path } => rpc.call("bdev_uring_create", &json!({ "name": name, "filename": path }))?,
            };
            rpc.call("vhost_create_blk_controller", &json!({ "ctrlr": name, "dev_name": name }))?;
        }
        let sockets = disks.iter().map(|disk| sockets_dir.join(&disk.name)).collect();
        Ok(Self { disks: disks.to_vec(), sockets, rpc, process, _scratch: scratch })
    }
}

impl DiskServer for Ringmilld {
    fn socket(&self, index: usize) -> &Path {
        &self.sockets[index]
    }

    fn resize(&mut self, index: usize, size_bytes: u64) -> Result<(), LabError> {
        let DiskSpec { name, medium } = &self.disks[index];
        resize_file(medium, size_bytes)?;
        self.rpc.call("bdev_uring_rescan", &json!({ "name": name })).map(drop)
    }

    fn stop(mut self: Box<Self>) -> Result<(), LabError> {
        stop(&mut self.process)
    }
}

/// A JSON-RPC connection: one request at a time, one line per answer.
#[derive(Debug)]
struct Rpc {
    stream: UnixStream,
    lines: Lines,
}

impl Rpc {
    fn new(stream: UnixStream) -> Result<Self, LabError> {
        let reading = stream.try_clone().map_err(LabError::io("duplicating the RPC socket"))?;
        Ok(Self { stream, lines: Lines::read_from("ringmilld's RPC", reading) })
    }

    fn call(&mut self, method: &str, params: &Value) -> Result<Value, LabError> {
        let request = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
        self.stream
            .write_all(format!("{request}\n").as_bytes())
            .map_err(LabError::io(format!("sending {method} to ringmilld")))?;
        let what = format!("the answer to {method}");
        let answer: Value =
            self.lines.find(&what, ANSWER_WAIT_MAX, |line| serde_json::from_str(line).ok())?;
        match answer.get("result") {
            Some(value) => Ok(value.clone()),
            None => Err(LabError::protocol(
                "ringmilld",
                format!("{request} was answered with {answer}"),
            )),
        }
    }
}

/// `qemu-storage-daemon`, one export per disk. A RAM disk is a file in `/dev/shm`.
#[derive(Debug)]
struct StorageDaemon {
    disks: Vec<DiskSpec>,
    sockets: Vec<PathBuf>,
    qmp: Qmp,
    version: (u32, u32),
    process: Running,
    _scratch: ScratchDir,
    _ram: ScratchDir,
}

impl StorageDaemon {
    fn start(disks: &[DiskSpec]) -> Result<Self, LabError> {
        let program = packages::find("qemu-storage-daemon").ok_or_else(|| LabError::Packages {
            list: "qemu-utils (for qemu-storage-daemon)".to_owned(),
        })?;
        let version = version_of(&program)?;
        let scratch = ScratchDir::new()?;
        let ram = ScratchDir::new_in(Path::new("/dev/shm"))?;
        let qmp_socket = scratch.path().join("qmp");
        let mut args = vec![
            "--chardev".to_owned(),
            format!("socket,id=qmp,path={},server=on,wait=off", qmp_socket.display()),
            "--monitor".to_owned(),
            "chardev=qmp".to_owned(),
        ];
        let mut sockets = Vec::new();
        for (index, disk) in disks.iter().enumerate() {
            let path = match &disk.medium {
                Medium::Malloc { size_bytes } => {
                    let path = ram.path().join(&disk.name);
                    set_len(&path, *size_bytes)?;
                    path
                }
                Medium::Uring { path } => path.clone(),
            };
            let is_device = fs::metadata(&path).is_ok_and(|about| !about.is_file());
            let driver = if is_device { "host_device" } else { "file" };
            let socket = scratch.path().join(format!("{}.sock", disk.name));
            args.extend([
                "--blockdev".to_owned(),
                format!("driver={driver},node-name=disk{index},discard=unmap,filename={}", path.display()),
                "--export".to_owned(),
                format!(
                    "type=vhost-user-blk,id=export{index},node-name=disk{index},addr.type=unix,addr.path={},\
                     writable=on,num-queues=2",
                    socket.display()
                ),
            ]);
            sockets.push(socket);
        }
        let mut process = Running::start(&program, &args, scratch.path())?;
        let qmp = Qmp::new(connect(&mut process, &qmp_socket)?)?;
        for socket in &sockets {
            process.wait_until("a disk's socket", START_WAIT_MAX, || socket.exists())?;
        }
        Ok(Self {
            disks: disks.to_vec(),
            sockets,
            qmp,
            version,
            process,
            _scratch: scratch,
            _ram: ram,
        })
    }
}

impl DiskServer for StorageDaemon {
    fn socket(&self, index: usize) -> &Path {
        &self.sockets[index]
    }

    fn resize(&mut self, index: usize, size_bytes: u64) -> Result<(), LabError> {
        resize_file(&self.disks[index].medium, size_bytes)?;
        let node = format!("disk{index}");
        self.qmp
            .execute("block_resize", &json!({ "node-name": node, "size": size_bytes }))
            .map(drop)
    }

    fn announces_resize(&self) -> bool {
        self.version >= RESIZE_ANNOUNCED_SINCE
    }

    fn stop(mut self: Box<Self>) -> Result<(), LabError> {
        stop(&mut self.process)
    }
}

fn stop(process: &mut Running) -> Result<(), LabError> {
    process.terminate()?;
    let status = process.wait_exit(STOP_WAIT_MAX)?;
    if status.success() {
        return Ok(());
    }
    Err(LabError::protocol(process.name(), format!("ended with {status}: {}", process.stderr())))
}

fn connect(process: &mut Running, socket: &Path) -> Result<UnixStream, LabError> {
    let mut stream = None;
    process.wait_until("the server's control socket", START_WAIT_MAX, || {
        stream = UnixStream::connect(socket).ok();
        stream.is_some()
    })?;
    stream.ok_or_else(|| LabError::protocol(process.name(), "has no control socket"))
}

fn resize_file(medium: &Medium, size_bytes: u64) -> Result<(), LabError> {
    match medium {
        Medium::Uring { path } => set_len(path, size_bytes),
        Medium::Malloc { .. } => {
            Err(LabError::protocol("the guest lab", "a RAM disk cannot be resized"))
        }
    }
}

/// Makes `path` a sparse file of this size, or gives it this size.
///
/// # Errors
/// Where it cannot be created or resized.
pub fn set_len(path: &Path, size_bytes: u64) -> Result<(), LabError> {
    let what = format!("giving {} the size of {size_bytes} bytes", path.display());
    let open = fs::OpenOptions::new().write(true).create(true).truncate(false).open(path);
    open.and_then(|file| file.set_len(size_bytes)).map_err(LabError::io(what))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    /// A server of one request, which it returns.
    fn answering(answer: &'static str) -> (Rpc, std::thread::JoinHandle<String>) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let server = std::thread::spawn(move || {
            let mut request = String::new();
            BufReader::new(&theirs).read_line(&mut request).expect("a request");
            (&theirs).write_all(answer.as_bytes()).expect("the client listens");
            request
        });
        (Rpc::new(ours).expect("a connected socket"), server)
    }

    #[test]
    fn a_call_is_one_json_object_and_its_result_is_returned() {
        let (mut rpc, server) = answering("{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":true}\n");
        assert_eq!(
            rpc.call("bdev_uring_rescan", &json!({ "name": "vm0" })).expect("a result"),
            json!(true)
        );
        let request: Value =
            serde_json::from_str(&server.join().expect("the server ends")).expect("JSON");
        assert_eq!(request["method"], "bdev_uring_rescan");
        assert_eq!(request["params"]["name"], "vm0");
    }

    #[test]
    fn a_refusal_is_told_with_the_request() {
        let (mut rpc, _server) =
            answering("{\"id\":1,\"error\":{\"code\":-19,\"message\":\"no such bdev\"}}\n");
        let error = rpc
            .call("bdev_uring_rescan", &json!({ "name": "vm0" }))
            .expect_err("a refusal")
            .to_string();
        assert!(error.contains("no such bdev") && error.contains("vm0"), "{error}");
    }
}
