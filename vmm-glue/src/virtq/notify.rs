//! The arithmetic of event suppression, once for all ring formats.

/// True when moving an index from `old` to `new` passes `event`, so that the other side asked to be told
/// (virtio 1.2 §2.7.10, "if event is in [old, new)" with 16-bit wrap).
#[inline]
#[must_use]
pub const fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The naive twin: step through every index between old and new.
        #[test]
        fn agrees_with_stepping(event: u16, old: u16, steps in 0u16..2000) {
            let twin = (0..steps).any(|i| old.wrapping_add(i) == event);
            prop_assert_eq!(needs_event(event, old.wrapping_add(steps), old), twin);
        }
    }
}
