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
    /// Adds a call, in place of an earlier one of the same method on the same object (and the same queue of it).
    Put(Entry),
    /// The same, but a new call goes before all others of its subsystem: they build on it.
    PutFirst(Entry),
    /// Forgets the calls of one method on an object.
    Forget {
        /// Subsystem.
        subsystem: &'static str,
        /// Object.
        object: String,
        /// Method.
        method: &'static str,
    },
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
            Change::Put(entry) => self.put(entry, false),
            Change::PutFirst(entry) => self.put(entry, true),
            Change::Forget { subsystem, object, method } => self
                .entries
                .retain(|e| e.subsystem != subsystem || e.object != object || e.method != method),
            Change::Remove { subsystem, object } => self.remove(subsystem, &object),
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

    fn put(&mut self, entry: Entry, goes_first: bool) {
        let queue = |e: &Entry| e.params.get("queue").cloned();
        let earlier = self.entries.iter_mut().find(|e| {
            e.method == entry.method && e.object == entry.object && queue(e) == queue(&entry)
        });
        match earlier {
            Some(earlier) => *earlier = entry,
            None if goes_first => self.entries.insert(0, entry),
            None => self.entries.push(entry),
        }
    }

    /// A controller cannot be made again without its disk, so it goes with it.
    fn remove(&mut self, subsystem: &str, object: &str) {
        self.entries.retain(|entry| entry.subsystem != subsystem || entry.object != object);
        if subsystem == "bdev" {
            let orphans: Vec<String> = self
                .entries
                .iter()
                .filter(|entry| {
                    entry.params.get("dev_name").and_then(Value::as_str) == Some(object)
                })
                .map(|entry| entry.object.clone())
                .collect();
            for orphan in orphans {
                self.remove("vhost_blk", &orphan);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn put(subsystem: &'static str, object: &str, method: &'static str, params: Value) -> Change {
        let Value::Object(params) = params else { panic!("not an object") };
        Change::Put(Entry { subsystem, object: object.to_owned(), method, params })
    }

    #[test]
    fn a_vanished_disk_takes_what_needs_it_along() {
        let mut record = Record::default();
        record.apply(put("bdev", "a", "make", json!({"name": "a", "num_blocks": 1})));
        record.apply(put("bdev", "b", "make", json!({"name": "b"})));
        record.apply(put("vhost_blk", "va", "show", json!({"dev_name": "a"})));
        record.apply(put("vhost_blk", "va", "coalesce", json!({"us": 1})));
        record.apply(put("vhost_blk", "va", "coalesce", json!({"us": 2})));
        record.apply(put("vhost_blk", "vb", "show", json!({"dev_name": "b"})));
        // Calls about different queues stand beside each other and beside the one about all, until they are forgotten.
        for (queue, mask) in [(json!(null), 1), (json!(0), 2), (json!(1), 3), (json!(0), 4)] {
            let params = match queue {
                Value::Null => json!({"mask": mask}),
                queue => json!({"mask": mask, "queue": queue}),
            };
            record.apply(put("vhost_blk", "vb", "place", params));
        }
        let places = |record: &Record| -> Vec<u64> {
            let entries = record.subsystem("vhost_blk");
            let entries = entries.as_array().unwrap().iter().filter(|e| e["method"] == "place");
            entries.filter_map(|e| e["params"]["mask"].as_u64()).collect()
        };
        assert_eq!(places(&record), [1, 4, 3]);
        let (subsystem, object) = ("vhost_blk", "vb".to_owned());
        record.apply(Change::Forget { subsystem, object, method: "place" });
        assert!(places(&record).is_empty());
        let set = |value: u64| Change::Set {
            subsystem: "bdev",
            object: "a".to_owned(),
            name: "num_blocks",
            value: value.into(),
        };
        record.apply(set(7));
        assert_eq!(record.subsystem("bdev")[0]["params"]["num_blocks"], 7);
        assert_eq!(record.subsystem("vhost_blk").as_array().map(Vec::len), Some(3));
        record.apply(Change::Remove { subsystem: "bdev", object: "a".to_owned() });
        assert_eq!(record.subsystem("bdev").as_array().map(Vec::len), Some(1));
        assert_eq!(record.subsystem("vhost_blk")[0]["params"]["dev_name"], "b");
        assert_eq!(record.subsystem("vhost_blk").as_array().map(Vec::len), Some(1));
    }
}
