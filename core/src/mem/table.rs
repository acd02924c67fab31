//! Room for a fixed number of values that costs memory only as far as it was ever filled.
//!
//! Owner: whoever owns the values. **Invariant:** the first `len` places hold values; memory behind them was never touched,
//! by anybody: a long table has pages of its own, where one on the heap lies in what others have used before.
#![expect(unsafe_code)] // UNSAFETY: typed places in a mapping that the table owns.

use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use super::Mapping;

/// From this length on a table gets pages of its own.
const OWN_PAGES_BYTES: usize = 8192;

/// Whose memory it is.
enum Owner<T> {
    Pages(#[expect(dead_code, reason = "unmapped by dropping it")] Mapping),
    /// Empty as a vector: the table drops the values.
    Heap(ManuallyDrop<Vec<T>>),
}

/// At most so many values as were said at the start.
pub struct Table<T> {
    first: NonNull<T>,
    len: usize,
    capacity: usize,
    owner: Owner<T>,
}

// SAFETY: it owns its values and the memory that they are in; nothing else leads there.
unsafe impl<T: Send> Send for Table<T> {}
// SAFETY: as for `Send`; a shared table gives shared values only.
unsafe impl<T: Sync> Sync for Table<T> {}

impl<T> Table<T> {
    /// An empty table with room for `capacity` values. Nothing is allocated later.
    #[must_use]
    #[cold]
    pub fn with_capacity(capacity: usize) -> Table<T> {
        let len_bytes = capacity.saturating_mul(size_of::<T>());
        let fits = align_of::<T>() <= 4096 && len_bytes >= OWN_PAGES_BYTES;
        if let Some(pages) = fits.then(|| Mapping::anonymous(len_bytes)).and_then(Result::ok) {
            let first = pages.base().cast();
            return Table { first, len: 0, capacity, owner: Owner::Pages(pages) };
        }
        let mut heap = ManuallyDrop::new(Vec::with_capacity(capacity));
        let first = NonNull::new(heap.as_mut_ptr()).unwrap_or(NonNull::dangling());
        Table { first, len: 0, capacity, owner: Owner::Heap(heap) }
    }

    /// Adds a value at the end; gives it back when the table is full.
    ///
    /// # Errors
    /// The value.
    #[inline]
    pub fn push(&mut self, value: T) -> Result<(), T> {
        if self.len == self.capacity {
            return Err(value);
        }
        // SAFETY: `len` < `capacity`, for which there is memory, aligned for T; no value is there yet.
        unsafe { self.first.add(self.len).write(value) };
        self.len += 1;
        Ok(())
    }
}

impl<T> Deref for Table<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: the first `len` places hold values, and live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Table<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

impl<T> Drop for Table<T> {
    fn drop(&mut self) {
        let values: *mut [T] = &raw mut **self;
        self.len = 0;
        // SAFETY: values, each dropped here once: the table is empty already.
        unsafe { values.drop_in_place() };
        if let Owner::Heap(heap) = &mut self.owner {
            // SAFETY: dropped here only, after its last use; it has no values of its own.
            unsafe { ManuallyDrop::drop(heap) };
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn values_are_kept_in_order_and_dropped_once() {
        for capacity in [0, 1, 7, 1024, 5000] {
            let value = Arc::new(());
            let mut table = Table::with_capacity(capacity);
            assert_eq!(matches!(table.owner, Owner::Pages(_)), capacity >= 1024);
            for count in 0..capacity {
                assert!(table.push((count, Arc::clone(&value))).is_ok());
            }
            assert!(table.push((0, Arc::clone(&value))).is_err(), "{capacity} are in it");
            assert!(table.iter().map(|(at, _)| *at).eq(0..capacity));
            if let Some(last) = table.last_mut() {
                last.0 = 77;
                assert_eq!(table[capacity - 1].0, 77);
            }
            assert_eq!(Arc::strong_count(&value), capacity + 1);
            drop(table);
            assert_eq!(Arc::strong_count(&value), 1);
        }
    }

    #[test]
    fn values_without_a_size_or_with_a_large_alignment_are_values() {
        #[derive(Debug)]
        #[repr(align(8192))]
        struct Wide(u8);
        let mut wide = Table::with_capacity(3);
        (0..3).for_each(|at| drop(wide.push(Wide(at))));
        assert!(wide.iter().map(|w| w.0).eq(0..3));
        assert!(wide.iter().all(|w| (&raw const *w).addr() % 8192 == 0));
        let mut nothing = Table::with_capacity(2);
        assert!(nothing.push(()).is_ok() && nothing.push(()).is_ok() && nothing.push(()).is_err());
        assert_eq!(nothing.len(), 2);
    }
}
