//! The log: to standard error, with a level that the RPC can change.

use std::io::IsTerminal;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, fmt, reload};

use crate::rpc::engine::LogLevel;

/// The handle to the running log.
pub struct Log {
    handle: Option<reload::Handle<LevelFilter, Registry>>,
    level: LogLevel,
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Notice | LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    }
}

impl Log {
    /// Starts the log. A second call in one process (tests) leaves the first one in charge.
    #[must_use]
    pub fn start(level: LogLevel) -> Log {
        let (layer, handle) = reload::Layer::new(filter(level));
        let lines = fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false);
        let started = tracing_subscriber::registry().with(layer).with(lines).try_init().is_ok();
        Log { handle: started.then_some(handle), level }
    }

    /// The level.
    #[must_use]
    pub fn level(&self) -> LogLevel {
        self.level
    }

    /// Changes the level.
    pub fn set_level(&mut self, level: LogLevel) {
        self.level = level;
        if let Some(handle) = &self.handle {
            // Fails only when the subscriber is gone, which lives as long as the process.
            let _ = handle.modify(|now| *now = filter(level));
        }
    }
}
