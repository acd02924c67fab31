//! The suite that every block driver passes.
