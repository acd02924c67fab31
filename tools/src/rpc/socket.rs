//! The RPC socket's file: path checks, the lock that keeps a second daemon off, a stale socket replaced, mode, group.
//!
//! The lock is a whole-file lock on `<socket>.lock`, held by an open file description: it ends with the process,
//! however that ends. The lock file stays: removing it would let two daemons hold locks on two files of one name.
//! Invariant: whoever holds the lock may replace the socket. Runs once, at start-up, on the control thread.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::{
        fd::AsFd,
        unix::{
            fs::{FileTypeExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Gid, Mode, OFlags},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

/// `sun_path` has 108 bytes with the final NUL (unix(7)).
pub const SOCKET_PATH_MAX: usize = 107;
/// Where a daemon of the whole system listens.
pub const SYSTEM_SOCKET: &str = "/run/ringmill/rpc.sock";
const LISTEN_BACKLOG: i32 = 64;

/// Why a socket could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Longer than the kernel takes.
    #[error(
        "socket path {path} has {} bytes; the kernel takes at most {SOCKET_PATH_MAX}: choose a shorter directory",
        path.as_os_str().len()
    )]
    PathTooLong {
        /// The path asked for.
        path: PathBuf,
    },
    /// Another process holds the lock.
    #[error(
        "{path}: another ringmilld{owner} is serving this socket; stop it or choose another with --rpc-socket"
    )]
    Locked {
        /// The socket's path.
        path: PathBuf,
        /// ` (process N)`, as far as known.
        owner: String,
    },
    /// Somebody answers there who does not use the lock.
    #[error(
        "{path}: another program is listening there; stop it or choose another path with --rpc-socket"
    )]
    InUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// A file of another kind is in the way.
    #[error(
        "{path} exists and is not a socket; remove it or choose another path with --rpc-socket"
    )]
    NotASocket {
        /// The path in the way.
        path: PathBuf,
    },
    /// The directory is missing and could not be made.
    #[error(
        "cannot create the directory {path} for the socket: {source}; create it or choose another path"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// `--socket-group` names nobody.
    #[error("no group \"{name}\" in /etc/group; give an existing group's name or its number")]
    NoGroup {
        /// As given.
        name: String,
    },
    /// Anything else the kernel refused.
    #[error("cannot {action} {path}: {source}{hint}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
}

impl SocketError {
    fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let hint = match source.kind() {
            io::ErrorKind::PermissionDenied => {
                "; run as a user who may write there, or choose another path"
            }
            io::ErrorKind::NotFound => "; create the directory first",
            _ => "",
        };
        Self::Io { action, path: path.to_owned(), source, hint }
    }
}

/// Who may connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketAccess {
    /// Permission bits of the socket file.
    pub mode: u32,
    /// Group of the socket file; `None` leaves the process's own.
    pub group: Option<u32>,
}

impl Default for SocketAccess {
    /// The owner alone.
    fn default() -> Self {
        Self { mode: 0o600, group: None }
    }
}

/// Where a user's own daemon listens, if the session has a run-time directory.
pub fn user_socket() -> Option<PathBuf> {
    let dir = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())?;
    Some(Path::new(&dir).join("ringmill/rpc.sock"))
}

/// Where a daemon listens by default: the system's socket for root, else the user's, else the system's.
pub fn default_socket() -> PathBuf {
    let system = PathBuf::from(SYSTEM_SOCKET);
    if rustix::process::geteuid().is_root() { system } else { user_socket().unwrap_or(system) }
}

/// Fails if `path` is too long for a Unix socket.
pub fn check_path(path: &Path) -> Result<(), SocketError> {
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(SocketError::PathTooLong { path: path.to_owned() });
    }
    Ok(())
}

/// The number of a group given by name or number (as in `/etc/group`).
pub fn group_id(name: &str) -> Result<u32, SocketError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let path = Path::new("/etc/group");
    let groups = fs::read_to_string(path).map_err(|error| SocketError::io("read", path, error))?;
    groups
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            Some((fields.next()?, fields.nth(1)?))
        })
        .find(|(group, _)| *group == name)
        .and_then(|(_, number)| number.parse().ok())
        .ok_or_else(|| SocketError::NoGroup { name: name.to_owned() })
}

/// A bound, listening, non-blocking socket and the lock that goes with it.
#[derive(Debug)]
pub struct LockedSocket {
    /// Ready for `accept`.
    pub listener: UnixListener,
    path: PathBuf,
    _lock: File,
}

impl LockedSocket {
    /// Takes the lock, replaces a stale socket, binds and listens.
    pub fn bind(path: &Path, access: SocketAccess) -> Result<Self, SocketError> {
        check_path(path)?;
        if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty() && !d.exists())
        {
            fs::create_dir(directory)
                .map_err(|source| SocketError::Directory { path: directory.to_owned(), source })?;
        }
        let lock = lock(path)?;
        remove_stale(path)?;
        let listener = listen(path, access)?;
        Ok(Self { listener, path: path.to_owned(), _lock: lock })
    }

    /// Where clients connect.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LockedSocket {
    fn drop(&mut self) {
        // The lock is still held, so the file is ours. Nobody is left to tell about a failure.
        let _ = fs::remove_file(&self.path);
    }
}

fn lock(socket_path: &Path) -> Result<File, SocketError> {
    let mut name = socket_path.as_os_str().to_owned();
    name.push(".lock");
    let path = PathBuf::from(name);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0))
        .open(&path)
        .map_err(|error| SocketError::io("open the lock file", &path, error))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let mut owner = String::new();
            let _ = (&mut file).take(32).read_to_string(&mut owner);
            let owner = match owner.trim().parse::<u32>() {
                Ok(number) => format!(" (process {number})"),
                Err(_) => String::new(),
            };
            return Err(SocketError::Locked { path: socket_path.to_owned(), owner });
        }
        Err(error) => return Err(SocketError::io("lock", &path, error)),
    }
    let write_owner = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    // Only the second daemon's message needs it; a full disk must not stop the first.
    let _ = write_owner(&mut file);
    Ok(file)
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(SocketError::io("look at", path, error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    if UnixStream::connect(path).is_ok() {
        return Err(SocketError::InUse { path: path.to_owned() });
    }
    fs::remove_file(path).map_err(|error| SocketError::io("remove the stale socket", path, error))
}

fn listen(path: &Path, access: SocketAccess) -> Result<UnixListener, SocketError> {
    let failed = |action| move |error: Errno| SocketError::io(action, path, error);
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(failed("create a socket for"))?;
    // bind(2) gives the file this mode less the umask: there is no moment in which others could connect.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(access.mode & 0o600))
        .map_err(failed("set the mode of"))?;
    let address = SocketAddrUnix::new(path).map_err(failed("use the socket path"))?;
    rustix::net::bind(&socket, &address).map_err(failed("bind the socket"))?;
    if let Some(group) = access.group {
        rustix::fs::chownat(
            rustix::fs::CWD,
            path,
            None,
            Some(Gid::from_raw(group)),
            rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(failed("set the group of"))?;
    }
    rustix::fs::chmod(path, Mode::from_raw_mode(access.mode)).map_err(failed("set the mode of"))?;
    rustix::net::listen(socket.as_fd(), LISTEN_BACKLOG).map_err(failed("listen on"))?;
    Ok(UnixListener::from(socket))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_second_daemon_is_told_so_and_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rpc.sock");
        let first = LockedSocket::bind(&path, SocketAccess::default()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let second = LockedSocket::bind(&path, SocketAccess::default()).unwrap_err().to_string();
        assert!(second.contains("another ringmilld (process"), "{second}");
        drop(first);
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "left behind as by kill -9");
        let third = LockedSocket::bind(&path, SocketAccess { mode: 0o660, group: None }).unwrap();
        assert_eq!(fs::metadata(third.path()).unwrap().permissions().mode() & 0o777, 0o660);
    }

    #[test]
    fn what_cannot_be_a_socket_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(120));
        let message = LockedSocket::bind(&long, SocketAccess::default()).unwrap_err().to_string();
        assert!(message.contains("at most 107"), "{message}");
        let file = dir.path().join("file");
        fs::write(&file, "precious").unwrap();
        let message = LockedSocket::bind(&file, SocketAccess::default()).unwrap_err().to_string();
        assert!(message.contains("not a socket"), "{message}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        let used = dir.path().join("used");
        let _other = UnixListener::bind(&used).unwrap();
        let message = LockedSocket::bind(&used, SocketAccess::default()).unwrap_err().to_string();
        assert!(message.contains("another program is listening"), "{message}");
        assert_eq!(group_id("0").unwrap(), 0);
        assert_eq!(group_id("root").unwrap(), 0);
        assert!(group_id("no-such-group").unwrap_err().to_string().contains("no-such-group"));
    }
}
