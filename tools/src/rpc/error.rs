//! What a method answers when it cannot do what was asked: a JSON-RPC code and a sentence for people.
//!
//! Codes below -32000 are JSON-RPC's own; run-time failures carry a negative errno, as clients of SPDK expect.

use serde_json::{Value, json};

/// The bytes are not JSON.
pub const PARSE_ERROR: i64 = -32700;
/// JSON, but not a request.
pub const INVALID_REQUEST: i64 = -32600;
/// No method of that name.
pub const METHOD_NOT_FOUND: i64 = -32601;
/// A parameter is unknown, missing, of the wrong type or out of range.
pub const INVALID_PARAMS: i64 = -32602;

/// An error reply: `code` and `message` go to the client as they are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// JSON-RPC code, or a negative errno.
    pub code: i64,
    /// What was wrong, with which value, and what to do.
    pub message: String,
}

impl RpcError {
    /// An error with any code.
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// Bad parameters (-32602).
    pub fn params(message: impl Into<String>) -> Self {
        Self::new(INVALID_PARAMS, message)
    }

    /// Not a request (-32600).
    pub fn request(message: impl Into<String>) -> Self {
        Self::new(INVALID_REQUEST, message)
    }

    /// Not JSON (-32700).
    pub fn parse(message: impl Into<String>) -> Self {
        Self::new(PARSE_ERROR, message)
    }

    /// A run-time failure; `errno` is positive, as in `libc::ENOENT`.
    pub fn errno(errno: i32, message: impl Into<String>) -> Self {
        Self::new(-i64::from(errno), message)
    }

    /// The `error` member of a reply.
    pub fn to_value(&self) -> Value {
        json!({ "code": self.code, "message": self.message })
    }
}
