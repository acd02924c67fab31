//! Which reactor serves which queue of a disk.
//!
//! In: cpumasks, turned into reactors by the caller. Owner: the control thread. **Invariant:** there is always at least
//! one reactor, and a queue's place depends on nothing but these settings and its number.

use std::collections::BTreeMap;

use ringmill_core::reactor::ReactorHandle;

/// See the module's head.
#[derive(Debug)]
pub(super) struct Places {
    /// For every queue without reactors of its own.
    common: Vec<ReactorHandle>,
    own: BTreeMap<u16, Vec<ReactorHandle>>,
    /// Spreads the first queues of different disks over the reactors.
    offset: usize,
}

impl Places {
    /// `None` without reactors.
    pub(super) fn new(common: Vec<ReactorHandle>, offset: usize) -> Option<Places> {
        (!common.is_empty()).then(|| Places { common, own: BTreeMap::new(), offset })
    }

    /// The reactor of a queue.
    pub(super) fn of(&self, index: u16) -> &ReactorHandle {
        let from = self.own.get(&index).filter(|own| !own.is_empty()).unwrap_or(&self.common);
        &from[usize::from(index).wrapping_add(self.offset) % from.len()]
    }

    /// From now on these reactors serve all queues; what was said of single ones is forgotten.
    pub(super) fn set_common(&mut self, reactors: Vec<ReactorHandle>) {
        if !reactors.is_empty() {
            self.common = reactors;
            self.own.clear();
        }
    }

    /// From now on one of these serves this queue.
    pub(super) fn set_own(&mut self, index: u16, reactors: Vec<ReactorHandle>) {
        self.own.insert(index, reactors);
    }

    /// The cores that serve the disk or may.
    pub(super) fn cores(&self) -> Vec<u32> {
        let all = self.common.iter().chain(self.own.values().flatten());
        let mut cores: Vec<u32> = all.filter_map(|r| r.core().map(|core| core.0)).collect();
        cores.sort_unstable();
        cores.dedup();
        cores
    }
}
