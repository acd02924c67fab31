//! The configuration as calls: what would have to be called, in this order, to get what exists now.
//!
//! `framework_get_config` shows it, `save_config` writes it, a configuration file is the same list. Changed only
//! when an operation has succeeded, so that a failed or unfinished one leaves no trace. Owner: the dispatcher.

use serde_json::{Map, Value, json};

/// Parts of the configuration, in the order in which they must be loaded, with what they depend on.
pub const SUBSYSTEMS: [(&str, &[&str]); 3] =
    [("reactor", &[]), ("bdev", &[]), ("vhost_blk", &["bdev"])];

/// One recorded call.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// One of [`SUBSYSTEMS`].
    pub subsystem: &'static str,
    /// What it made or set: a bdev's or controller's name.
    pub object: String,
    /// Method.
    pub method: &'static str,
    /// Its parameters.
    pub params: Map<String, Value>,
}

/// How a successful operation changes the record.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Adds a call, in place of an earlier one of the same method on the same object.
    Put(Entry),
    /// Forgets everything about an object.
    Remove {
        /// Subsystem.
        subsystem: &'static str,
        /// Object.
        object: String,
    },
    /// Changes one parameter of an object's calls that have it.
    Set {
        /// Subsystem.
        subsystem: &'static str,
        /// Object.
        object: String,
        /// Parameter.
        name: &'static str,
        /// Its new value.
        value: Value,
    },
}

/// See the module's head.
#[derive(Debug, Default)]
pub struct Record {
    entries: Vec<Entry>,
}

impl Record {
    /// Notes a successful operation.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Put(entry) => {
                let earlier = self
                    .entries
                    .iter_mut()
                    .find(|e| e.method == entry.method && e.object == entry.object);
                match earlier {
                    Some(earlier) => *earlier = entry,
                    None => self.entries.push(entry),
                }
            }
            Change::Remove { subsystem, object } => {
                self.entries.retain(|entry| entry.subsystem != subsystem || entry.object != object);
            }
            Change::Set { subsystem, object, name, value } => {
                let of_object = self
                    .entries
                    .iter_mut()
                    .filter(|e| e.subsystem == subsystem && e.object == object);
                for entry in of_object {
                    if let Some(param) = entry.params.get_mut(name) {
                        *param = value.clone();
                    }
                }
            }
        }
    }

    /// The calls of one subsystem, as `[{method, params}]`.
    pub fn subsystem(&self, subsystem: &str) -> Value {
        self.entries
            .iter()
            .filter(|entry| entry.subsystem == subsystem)
            .map(|entry| json!({ "method": entry.method, "params": entry.params }))
            .collect()
    }
}
