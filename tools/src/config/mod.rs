//! Configuration files: what `-c FILE` means.
//!
//! A `.toml` file (short, for people) and a `.json` file (what `save_config` writes) both become [`Config`]: settings
//! of the daemon itself, and one ordered list of RPC calls. The calls take the same way as calls from a socket, so
//! there is one set of rules. Everything that can be checked without touching a disk is checked before the first
//! call: a mistake is one line with file, line, column, the offending key and what is allowed.

pub mod json;
pub mod run;
pub mod size;
pub mod toml;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::rpc::{methods, params::Params};

/// Longest configuration file; a larger one is some other file.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Why a configuration cannot be used. Displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: cannot read the configuration: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The name says neither TOML nor JSON.
    #[error("{path}: a configuration is a .toml or a .json file; rename it")]
    Extension {
        /// The file.
        path: PathBuf,
    },
    /// Larger than any configuration.
    #[error("{path} has more than {FILE_BYTES_MAX} bytes; that is no configuration")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A mistake in the file.
    #[error("{place}: {message}")]
    Mistake {
        /// `file:line:column`, or the file and the call in it.
        place: String,
        /// What is wrong and what is allowed.
        message: String,
    },
}

/// What the daemon itself is told; `None`: its default, or what the command line says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DaemonSettings {
    /// Cores of the reactors.
    pub cores: Option<Vec<u32>>,
    /// Directory of the controllers' sockets.
    pub socket_dir: Option<PathBuf>,
    /// The RPC's socket.
    pub rpc_socket: Option<PathBuf>,
    /// Permission bits of all sockets.
    pub socket_mode: Option<u32>,
    /// Group of all sockets, by name or number.
    pub socket_group: Option<String>,
}

/// One RPC call of a configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigCall {
    /// Method.
    pub method: String,
    /// Parameters.
    pub params: Map<String, Value>,
    /// Where it stands, for messages.
    pub place: String,
}

/// A configuration, checked as far as it can be without touching a disk.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Config {
    /// What the daemon itself is told.
    pub daemon: DaemonSettings,
    /// What is called, in this order, when it is up.
    pub calls: Vec<ConfigCall>,
}

/// Reads and checks a configuration file.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let is_toml = match path.extension().and_then(|extension| extension.to_str()) {
        Some("toml") => true,
        Some("json") => false,
        _ => return Err(ConfigError::Extension { path: path.to_owned() }),
    };
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    let file = path.display().to_string();
    let config = if is_toml { toml::parse(&file, &text)? } else { json::parse(&file, &text)? };
    check_calls(&config.calls)?;
    Ok(config)
}

/// Holds the calls against the table of methods.
fn check_calls(calls: &[ConfigCall]) -> Result<(), ConfigError> {
    for call in calls {
        methods::find_or_error(&call.method)
            .and_then(|method| Params::check(method.name, method.params, call.params.clone()))
            .map_err(|error| ConfigError::Mistake {
                place: format!("{} ({})", call.place, call.method),
                message: error.message,
            })?;
    }
    Ok(())
}
