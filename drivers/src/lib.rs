//! Part of ringmill.
