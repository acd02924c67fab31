//! A blocking RPC client: one request, one reply.

use std::{
    env,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::CtlError;
use crate::rpc::{
    RpcError,
    scan::{Scan, Scanner},
    socket::{SYSTEM_SOCKET, user_socket},
};

/// Longest reply taken; a daemon with thousands of disks stays far below.
const REPLY_BYTES_MAX: usize = 256 << 20;
const REPLY_DEPTH_MAX: usize = 64;

/// `$RINGMILL_RPC`, else the system's socket, else the user's if the system's does not exist.
pub fn default_socket() -> PathBuf {
    if let Some(path) = env::var_os("RINGMILL_RPC").filter(|path| !path.is_empty()) {
        return path.into();
    }
    let system = PathBuf::from(SYSTEM_SOCKET);
    match user_socket() {
        Some(user) if !system.exists() && user.exists() => user,
        _ => system,
    }
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    socket: PathBuf,
    timeout: Duration,
    id_next: u64,
}

impl Client {
    /// Connects. `timeout` is for each reply.
    pub fn connect(socket: &Path, timeout: Duration) -> Result<Self, CtlError> {
        let stream = UnixStream::connect(socket).map_err(|error| {
            let path = socket.display();
            let advice = match error.kind() {
                io::ErrorKind::NotFound => {
                    "nothing listens there; start the daemon with `ringmilld`, or name its socket with --socket"
                }
                io::ErrorKind::ConnectionRefused => {
                    "the socket is left over from a daemon that is gone; start it again with `ringmilld`"
                }
                io::ErrorKind::PermissionDenied => {
                    "you may not connect; become the daemon's user, or start it with --socket-mode and --socket-group"
                }
                _ => "start the daemon with `ringmilld`, or name its socket with --socket",
            };
            CtlError::Unreachable(format!("cannot reach ringmilld at {path}: {advice} ({error})"))
        })?;
        Ok(Self { stream, socket: socket.to_owned(), timeout, id_next: 1 })
    }

    /// Calls a method. `params` is an object, or null for none.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, CtlError> {
        let id = self.id_next;
        self.id_next += 1;
        let mut request = json!({ "jsonrpc": "2.0", "method": method, "id": id });
        if let (Some(fields), false) = (request.as_object_mut(), params.is_null()) {
            fields.insert("params".to_owned(), params);
        }
        // A daemon that refuses the connection closes it, but its reply is still there to be read.
        let sent = self.stream.write_all(request.to_string().as_bytes());
        let mut reply = match (self.receive(method), sent) {
            (Err(_), Err(error)) => return Err(self.lost(method, &error)),
            (received, _) => received?,
        };
        if let Some(error) = reply.get("error") {
            let code = error.get("code").and_then(Value::as_i64).unwrap_or(0);
            let message =
                error.get("message").and_then(Value::as_str).unwrap_or("the daemon gave no reason");
            return Err(RpcError::new(code, message).into());
        }
        Ok(reply.get_mut("result").map_or(Value::Null, Value::take))
    }

    fn receive(&mut self, method: &str) -> Result<Value, CtlError> {
        let deadline = Instant::now() + self.timeout;
        let mut scanner = Scanner::new(REPLY_DEPTH_MAX, REPLY_BYTES_MAX);
        let mut buffer = Vec::new();
        let mut piece = vec![0; 256 * 1024];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.silent(method));
            }
            self.stream.set_read_timeout(Some(left)).map_err(|error| self.lost(method, &error))?;
            match self.stream.read(&mut piece) {
                Ok(0) => {
                    return Err(self.lost(method, &io::Error::from(io::ErrorKind::UnexpectedEof)));
                }
                Ok(count) => buffer.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(self.silent(method));
                }
                Err(error) => return Err(self.lost(method, &error)),
            }
            match scanner.next(&buffer, false) {
                Scan::Incomplete => {}
                Scan::Value(range) => {
                    let reply: Option<Value> = serde_json::from_slice(&buffer[range]).ok();
                    let is_reply = |reply: &Value| {
                        reply.get("result").is_some() || reply.get("error").is_some()
                    };
                    return reply.filter(is_reply).ok_or_else(|| self.foreign());
                }
                _ => return Err(self.foreign()),
            }
        }
    }

    fn lost(&self, method: &str, error: &io::Error) -> CtlError {
        CtlError::Unreachable(format!(
            "{}: the daemon closed the connection before it answered {method} ({error})",
            self.socket.display()
        ))
    }

    fn silent(&self, method: &str) -> CtlError {
        CtlError::Unreachable(format!(
            "{}: no answer to {method} within {} s; the daemon may still be at work: look again, or use --timeout",
            self.socket.display(),
            self.timeout.as_secs()
        ))
    }

    fn foreign(&self) -> CtlError {
        CtlError::Unreachable(format!(
            "{} does not speak JSON-RPC; is it ringmilld's socket?",
            self.socket.display()
        ))
    }
}
