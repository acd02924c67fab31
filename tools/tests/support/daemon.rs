//! The real `ringmilld` in a directory of its own: start, ask, stop, and what it says.
//!
//! Owner: one test. **Invariant:** a daemon is killed by its handle when its owner goes away, and its directory with it.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The program under test.
pub const RINGMILLD: &str = env!("CARGO_BIN_EXE_ringmilld");

/// Every wait of these tests ends after this at the latest.
pub const WAIT_MAX: Duration = Duration::from_secs(30);

/// Looks again every few milliseconds until `done` says so; false when time is up.
pub fn wait_for(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One connection to the RPC; an answer that does not come is a failure, not a hang.
pub struct Rpc {
    reader: BufReader<UnixStream>,
    next_id: u64,
}

impl Rpc {
    pub fn connect(path: &Path) -> std::io::Result<Rpc> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(WAIT_MAX))?;
        Ok(Rpc { reader: BufReader::new(stream), next_id: 0 })
    }

    /// Sends a request without waiting for its answer.
    pub fn send(&mut self, method: &str, params: &Value) {
        self.next_id += 1;
        let request =
            json!({"jsonrpc": "2.0", "id": self.next_id, "method": method, "params": params});
        self.reader.get_mut().write_all(request.to_string().as_bytes()).expect("the RPC listens");
    }

    /// The next answer: a result, or code and message.
    pub fn answer(&mut self) -> Result<Value, (i64, String)> {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("the RPC answers in time");
        let mut answer: Value = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("not an answer: {line:?}: {error}"));
        match answer.get("error") {
            Some(error) => Err((
                error["code"].as_i64().expect("a code"),
                error["message"].as_str().expect("a message").to_owned(),
            )),
            None => Ok(answer["result"].take()),
        }
    }

    pub fn try_call(&mut self, method: &str, params: &Value) -> Result<Value, (i64, String)> {
        self.send(method, params);
        self.answer()
    }

    pub fn call(&mut self, method: &str, params: &Value) -> Value {
        self.try_call(method, params)
            .unwrap_or_else(|(code, message)| panic!("{method} {params}: {code} {message}"))
    }
}

/// A daemon that runs.
pub struct Daemon {
    child: Child,
    dir: TempDir,
    pub rpc_socket: PathBuf,
    pub sockets: PathBuf,
    stderr: PathBuf,
}

impl Daemon {
    /// On core 0, sleeping when idle, so that tests share a small machine.
    pub fn start() -> Daemon {
        Self::with(["-m", "1"])
    }

    /// With arguments of the test's choice; the sockets are in its own directory.
    pub fn with<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Daemon {
        let dir = TempDir::new().expect("a temporary directory");
        Self::in_dir(dir, Path::new(RINGMILLD), &[], args)
    }

    /// In a directory that the test prepared, started through another program (setpriv and the like) if `through` says
    /// so.
    pub fn in_dir<S: AsRef<OsStr>>(
        dir: TempDir,
        program: &Path,
        through: &[&str],
        args: impl IntoIterator<Item = S>,
    ) -> Daemon {
        let sockets = dir.path().join("s");
        let rpc_socket = dir.path().join("rpc");
        let stderr = dir.path().join("stderr");
        let mut words: Vec<OsString> = through.iter().map(OsString::from).collect();
        words.push(program.into());
        words.extend(["-S".into(), sockets.clone().into(), "-r".into(), rpc_socket.clone().into()]);
        words.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        let child = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr).expect("the directory is ours"))
            .spawn()
            .expect("ringmilld starts");
        let mut daemon = Daemon { child, dir, rpc_socket, sockets, stderr };
        let (mut ended, socket) = (None, daemon.rpc_socket.clone());
        let child = &mut daemon.child;
        let is_up = wait_for(WAIT_MAX, || {
            ended = child.try_wait().expect("our child");
            ended.is_some() || UnixStream::connect(&socket).is_ok()
        });
        assert!(is_up && ended.is_none(), "{words:?} did not start: {}", daemon.stderr());
        daemon
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    pub fn rpc(&self) -> Rpc {
        Rpc::connect(&self.rpc_socket)
            .unwrap_or_else(|error| panic!("no RPC: {error}\n{}", self.stderr()))
    }

    pub fn call(&self, method: &str, params: &Value) -> Value {
        self.rpc().call(method, params)
    }

    /// The guest's socket of a controller.
    pub fn socket(&self, controller: &str) -> PathBuf {
        self.sockets.join(controller)
    }

    /// A bdev over RAM with a controller of the same name.
    pub fn add_malloc(&self, name: &str, size_bytes: u64, block_bytes: u64) -> PathBuf {
        self.call(
            "bdev_malloc_create",
            &json!({"name": name, "block_size": block_bytes, "num_blocks": size_bytes / block_bytes}),
        );
        self.add_controller(name, name, &json!({}))
    }

    /// A bdev over a file or device with a controller of the same name.
    pub fn add_uring(&self, name: &str, path: &Path, more: &Value) -> PathBuf {
        let mut params = json!({"name": name, "filename": path});
        merge(&mut params, more);
        self.call("bdev_uring_create", &params);
        self.add_controller(name, name, &json!({}))
    }

    pub fn add_controller(&self, name: &str, bdev: &str, more: &Value) -> PathBuf {
        let mut params = json!({"ctrlr": name, "dev_name": bdev});
        merge(&mut params, more);
        self.call("vhost_create_blk_controller", &params);
        self.socket(name)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("the daemon runs");
    }

    /// The end of the process, if it comes in time.
    pub fn wait_exit(&mut self, limit: Duration) -> Option<ExitStatus> {
        let mut status = None;
        let child = &mut self.child;
        wait_for(limit, || {
            status = child.try_wait().expect("our child");
            status.is_some()
        });
        status
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("our child").is_none()
    }

    /// SIGTERM, then exit 0 within 5 s, as promised to operators; the machine may be busy, so a little more.
    pub fn stop(mut self) {
        self.signal(Signal::TERM);
        let status = self.wait_exit(Duration::from_secs(10));
        assert!(status.is_some_and(|s| s.success()), "ended with {status:?}: {}", self.stderr());
        assert!(!self.rpc_socket.exists(), "the RPC socket is left behind");
        let left: Vec<_> = fs::read_dir(&self.sockets)
            .map(|entries| entries.flatten().map(|e| e.file_name()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "sockets are left behind: {left:?}");
        let said = self.stderr();
        assert!(!said.contains("panicked"), "{said}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- ringmilld said:\n{}---", self.stderr());
        }
        // Already reaped is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn merge(into: &mut Value, more: &Value) {
    let (Some(into), Some(more)) = (into.as_object_mut(), more.as_object()) else {
        panic!("parameters are objects")
    };
    into.extend(more.clone());
}
