//! The names of all bdevs, who uses them, and what happens to them.
//!
//! Flow: creation → `add`; a controller claims → `claim` with a listener; resize and removal reach the claimant through
//! that listener, which may answer later. Owner: control threads; nothing here is touched by a reactor.
//! **Invariant:** a bdev has at most one claim, and leaves the registry only after its claim is gone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::limits::NAME_BYTES_MAX;

use super::Bdev;

/// What a claimant hears about its bdev.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BdevEvent {
    /// The size changed to this many blocks.
    Resized {
        /// Blocks now.
        blocks_count: u64,
    },
    /// The bdev is being removed: stop using it, then release the claim.
    Removing,
}

/// Hears of events; called on a control thread, passes them on and returns.
pub type Listener = Box<dyn Fn(BdevEvent) + Send>;

/// Why the registry refuses.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RegistryError {
    /// The name is taken.
    #[error("a bdev named {0:?} exists already; choose another name or delete it first")]
    Exists(String),
    /// No such bdev.
    #[error("there is no bdev named {0:?}")]
    Missing(String),
    /// Somebody uses it.
    #[error("bdev {name:?} is in use by {owner:?}")]
    Claimed {
        /// The bdev.
        name: String,
        /// Who has it.
        owner: String,
    },
    /// A bad name.
    #[error(
        "{0:?} is not a name: use 1 to {NAME_BYTES_MAX} letters, digits, '.', '_', ':' or '-', not starting with '.'"
    )]
    Name(String),
}

struct Entry {
    bdev: Arc<dyn Bdev>,
    claim: Option<(String, Listener)>,
    removing: bool,
}

/// All bdevs by name.
#[derive(Default)]
pub struct Registry {
    entries: Mutex<BTreeMap<String, Entry>>,
}

/// Proof of a claim; dropping it does not release it (a crash of the owner must not free a disk): call
/// [`Registry::release`].
#[must_use]
#[derive(Debug)]
pub struct Claim {
    name: String,
}

impl Claim {
    /// The bdev's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// True for a name that is safe in paths, logs and shells.
fn name_is_good(name: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._:-".contains(&b);
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with('.')
        && name.bytes().all(good)
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.lock().keys()).finish()
    }
}

impl Registry {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Registry {
        Registry::default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a name for use.
    ///
    /// # Errors
    /// [`RegistryError::Name`].
    pub fn check_name(name: &str) -> Result<(), RegistryError> {
        if name_is_good(name) { Ok(()) } else { Err(RegistryError::Name(name.to_owned())) }
    }

    /// Checks that a bdev of this name could be added.
    ///
    /// # Errors
    /// A bad or taken name.
    pub fn check_free(&self, name: &str) -> Result<(), RegistryError> {
        Self::check_name(name)?;
        if self.lock().contains_key(name) {
            Err(RegistryError::Exists(name.to_owned()))
        } else {
            Ok(())
        }
    }

    /// Adds a bdev under its own name.
    ///
    /// # Errors
    /// A bad or taken name.
    pub fn add(&self, bdev: Arc<dyn Bdev>) -> Result<(), RegistryError> {
        let name = bdev.info().name().to_owned();
        self.check_free(&name)?;
        self.lock().insert(name, Entry { bdev, claim: None, removing: false });
        Ok(())
    }

    /// The bdev of this name.
    ///
    /// # Errors
    /// [`RegistryError::Missing`].
    pub fn get(&self, name: &str) -> Result<Arc<dyn Bdev>, RegistryError> {
        let missing = || RegistryError::Missing(name.to_owned());
        self.lock().get(name).map(|e| Arc::clone(&e.bdev)).ok_or_else(missing)
    }

    /// All bdevs with their claimants, by name.
    #[must_use]
    pub fn list(&self) -> Vec<(Arc<dyn Bdev>, Option<String>)> {
        let owner = |e: &Entry| e.claim.as_ref().map(|(owner, _)| owner.clone());
        self.lock().values().map(|e| (Arc::clone(&e.bdev), owner(e))).collect()
    }

    /// Claims a bdev for one owner.
    ///
    /// # Errors
    /// Missing, or claimed by somebody else.
    pub fn claim(
        &self,
        name: &str,
        owner: &str,
        listener: Listener,
    ) -> Result<(Claim, Arc<dyn Bdev>), RegistryError> {
        let mut entries = self.lock();
        let missing = || RegistryError::Missing(name.to_owned());
        let entry = entries.get_mut(name).filter(|e| !e.removing).ok_or_else(missing)?;
        if let Some((owner, _)) = &entry.claim {
            return Err(RegistryError::Claimed { name: name.to_owned(), owner: owner.clone() });
        }
        entry.claim = Some((owner.to_owned(), listener));
        Ok((Claim { name: name.to_owned() }, Arc::clone(&entry.bdev)))
    }

    /// Ends a claim. Returns the bdev when it was waiting to be removed: dropping it closes the device.
    pub fn release(&self, claim: Claim) -> Option<Arc<dyn Bdev>> {
        let mut entries = self.lock();
        let entry = entries.get_mut(&claim.name)?;
        entry.claim = None;
        if entry.removing { entries.remove(&claim.name).map(|e| e.bdev) } else { None }
    }

    /// Removes a bdev. An unclaimed one is returned at once; for a claimed one the claimant is told, and `Ok(None)` means
    /// that [`Registry::release`] will finish the removal.
    ///
    /// # Errors
    /// Missing, or a removal under way.
    pub fn remove(&self, name: &str) -> Result<Option<Arc<dyn Bdev>>, RegistryError> {
        let mut entries = self.lock();
        let missing = || RegistryError::Missing(name.to_owned());
        let entry = entries.get_mut(name).filter(|e| !e.removing).ok_or_else(missing)?;
        match &entry.claim {
            None => Ok(entries.remove(name).map(|e| e.bdev)),
            Some((_, listener)) => {
                entry.removing = true;
                listener(BdevEvent::Removing);
                Ok(None)
            }
        }
    }

    /// Publishes a new size and tells the claimant; false when nothing changed.
    ///
    /// # Errors
    /// Missing.
    pub fn resize(&self, name: &str, blocks_count: u64) -> Result<bool, RegistryError> {
        let entries = self.lock();
        let entry = entries.get(name).ok_or_else(|| RegistryError::Missing(name.to_owned()))?;
        if entry.bdev.info().blocks_count() == blocks_count {
            return Ok(false);
        }
        entry.bdev.info().set_blocks(blocks_count);
        if let Some((_, listener)) = &entry.claim {
            listener(BdevEvent::Resized { blocks_count });
        }
        Ok(true)
    }
}
