//! HOT PATH
//! A fixed pool of slots addressed by tags with generations.
//!
//! Flow: `insert` hands out a tag, `get`/`remove` take it back; a tag whose generation is stale finds nothing.
//! Owner: one worker or channel. **Invariant:** never allocates after construction; memory is touched only as far as
//! slots were ever used at the same time (last in, first out).

use super::Tag;
use crate::mem::Table;

#[derive(Debug)]
struct Slot<T> {
    generation: u16,
    value: Option<T>,
}

/// At most `capacity` values of `T`.
#[derive(Debug)]
pub struct Slots<T> {
    slots: Table<Slot<T>>,
    free: Vec<u16>,
    capacity: usize,
    live_count: usize,
}

impl<T> Slots<T> {
    /// A pool of `capacity` slots (at most 65,536).
    #[must_use]
    #[cold]
    pub fn new(capacity: usize) -> Slots<T> {
        let capacity = capacity.min(usize::from(u16::MAX) + 1);
        Slots {
            slots: Table::with_capacity(capacity),
            free: Vec::with_capacity(capacity),
            capacity,
            live_count: 0,
        }
    }

    /// Free slots.
    #[inline]
    #[must_use]
    pub fn room(&self) -> usize {
        self.capacity - self.live_count
    }

    /// Slots in use.
    #[inline]
    #[must_use]
    pub fn live_count(&self) -> usize {
        self.live_count
    }

    /// Puts a value into a free slot.
    ///
    /// # Errors
    /// Returns the value when every slot is in use.
    #[inline]
    pub fn insert(&mut self, value: T) -> Result<Tag, T> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => match u16::try_from(self.slots.len()) {
                Ok(slot) if self.slots.push(Slot { generation: 0, value: None }).is_ok() => slot,
                _ => return Err(value),
            },
        };
        let entry = &mut self.slots[usize::from(slot)];
        entry.value = Some(value);
        self.live_count += 1;
        Ok(Tag::new(slot, entry.generation))
    }

    /// The value behind a tag; `None` for a stale or invented one.
    #[inline]
    pub fn get_mut(&mut self, tag: Tag) -> Option<&mut T> {
        let entry = self.slots.get_mut(usize::from(tag.slot()))?;
        if entry.generation != tag.generation() {
            return None;
        }
        entry.value.as_mut()
    }

    /// Takes the value out and frees the slot; `None` for a stale or invented tag.
    #[inline]
    pub fn remove(&mut self, tag: Tag) -> Option<T> {
        let entry = self.slots.get_mut(usize::from(tag.slot()))?;
        if entry.generation != tag.generation() {
            return None;
        }
        let value = entry.value.take()?;
        entry.generation = (entry.generation + 1) & 0x7fff;
        self.free.push(tag.slot());
        self.live_count -= 1;
        Some(value)
    }

    /// Every value in use with its tag.
    pub fn iter(&self) -> impl Iterator<Item = (Tag, &T)> {
        (0u16..)
            .zip(self.slots.iter())
            .filter_map(|(slot, e)| Some((Tag::new(slot, e.generation), e.value.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stale_tag_finds_nothing() {
        let mut slots = Slots::new(2);
        let a = slots.insert(1).unwrap();
        assert_eq!(slots.remove(a), Some(1));
        let b = slots.insert(2).unwrap();
        assert_eq!(a.slot(), b.slot());
        assert_eq!(slots.get_mut(a), None);
        assert_eq!(slots.remove(a), None);
        assert_eq!(slots.get_mut(b), Some(&mut 2));
        assert_eq!(slots.get_mut(Tag::new(900, 0)), None);
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(ops in prop::collection::vec((any::<bool>(), any::<u8>()), 1..300)) {
            let mut slots = Slots::new(8);
            let mut twin: HashMap<Tag, u8> = HashMap::new();
            let mut dead = Vec::new();
            for (insert, v) in ops {
                if insert {
                    match slots.insert(v) {
                        Ok(tag) => prop_assert!(twin.insert(tag, v).is_none() && twin.len() <= 8),
                        Err(_) => prop_assert_eq!(twin.len(), 8),
                    }
                } else if let Some(&tag) = twin.keys().nth(usize::from(v) % twin.len().max(1)) {
                    prop_assert_eq!(slots.remove(tag), twin.remove(&tag));
                    dead.push(tag);
                }
                prop_assert_eq!(slots.live_count(), twin.len());
                for tag in &dead {
                    prop_assert!(slots.get_mut(*tag).is_none() || twin.contains_key(tag));
                }
            }
        }
    }
}
