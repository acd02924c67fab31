//! JSON values to requests, results to replies (JSON-RPC 2.0 §4–§6).
//!
//! `jsonrpc` and `id` are optional; without an id there is no reply. `params` is an object, absent or null. An
//! array is a batch and is answered by one array. Pure functions; bytes are untrusted.

use serde_json::{Map, Value, json};

use super::error::RpcError;

/// Most requests in one batch.
pub const BATCH_MAX: usize = 256;

/// Who wants the answer. `None`: nobody, it is a notification.
pub type RequestId = Option<Value>;

/// One request, ready to be dispatched.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Method name, not yet looked up.
    pub method: String,
    /// Named parameters; absent and null become an empty object.
    pub params: Map<String, Value>,
    /// The id to answer with.
    pub id: RequestId,
}

/// A request, or the error to answer it with (and the id as far as it was legible).
pub type Parsed = Result<Request, (RequestId, RpcError)>;

/// What one JSON value on the wire holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// One request.
    Single(Parsed),
    /// Several; answered by one array.
    Batch(Vec<Parsed>),
}

/// Parses one JSON value. `Err` means the stream cannot be trusted any more: answer and close.
pub fn parse(bytes: &[u8]) -> Result<Message, RpcError> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| RpcError::parse(format!("not valid JSON: {error}")))?;
    Ok(match value {
        Value::Array(items) if items.is_empty() => Message::Single(Err((
            Some(Value::Null),
            RpcError::request("a batch needs at least one request"),
        ))),
        Value::Array(items) if items.len() > BATCH_MAX => Message::Single(Err((
            Some(Value::Null),
            RpcError::request(format!(
                "a batch of {} requests; at most {BATCH_MAX} are taken",
                items.len()
            )),
        ))),
        Value::Array(items) => Message::Batch(items.into_iter().map(request).collect()),
        other => Message::Single(request(other)),
    })
}

fn request(value: Value) -> Parsed {
    let Value::Object(mut fields) = value else {
        return Err((
            Some(Value::Null),
            RpcError::request("a request must be a JSON object with a \"method\""),
        ));
    };
    let id = match fields.remove("id") {
        None => None,
        Some(id @ (Value::Null | Value::String(_) | Value::Number(_))) => Some(id),
        Some(_) => {
            return Err((
                Some(Value::Null),
                RpcError::request("\"id\" must be a string, a number or null"),
            ));
        }
    };
    // An illegible request is answered even without an id: its sender cannot have meant a notification.
    let refuse =
        |id: RequestId, message: &str| Err((id.or(Some(Value::Null)), RpcError::request(message)));
    match fields.remove("jsonrpc") {
        None => {}
        Some(Value::String(version)) if version == "2.0" => {}
        Some(_) => return refuse(id, "\"jsonrpc\" must be \"2.0\""),
    }
    let Some(Value::String(method)) = fields.remove("method") else {
        return refuse(id, "\"method\" must be given, as a string");
    };
    let params = match fields.remove("params") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(params)) => params,
        Some(_) => {
            return Err((
                id,
                RpcError::params(
                    "\"params\" must be an object with named parameters; positional ones are not taken",
                ),
            ));
        }
    };
    if let Some(key) = fields.keys().next() {
        let message =
            format!("a request has no member \"{key}\"; it has jsonrpc, method, params and id");
        return refuse(id, &message);
    }
    Ok(Request { method, params, id })
}

/// The reply object of one request.
pub fn reply(id: Value, result: Result<Value, RpcError>) -> Value {
    match result {
        Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
        Err(error) => json!({ "jsonrpc": "2.0", "id": id, "error": error.to_value() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn single(text: &str) -> Parsed {
        match parse(text.as_bytes()).unwrap() {
            Message::Single(parsed) => parsed,
            Message::Batch(_) => panic!("a batch"),
        }
    }

    #[test]
    fn params_may_be_absent_null_or_an_object_but_not_an_array() {
        for text in
            [r#"{"method":"m","id":1}"#, r#"{"method":"m","id":1,"params":null,"jsonrpc":"2.0"}"#]
        {
            let request = single(text).unwrap();
            assert!(request.params.is_empty());
            assert_eq!(request.id, Some(json!(1)));
        }
        assert_eq!(single(r#"{"method":"m","params":[1],"id":"x"}"#).unwrap_err().1.code, -32602);
        assert_eq!(single(r#"{"method":"m","params":{"a":1}}"#).unwrap().id, None);
    }

    #[test]
    fn what_is_no_request_is_refused_with_the_legible_id() {
        for (text, id) in [
            ("17", Value::Null),
            ("[]", Value::Null),
            (r#"{"id":7}"#, json!(7)),
            (r#"{"id":{},"method":"m"}"#, Value::Null),
            (r#"{"id":"a","method":3}"#, json!("a")),
            (r#"{"jsonrpc":"1.0","method":"m"}"#, Value::Null),
            (r#"{"method":"m","parms":{},"id":1}"#, json!(1)),
        ] {
            let (got, error) = single(text).unwrap_err();
            assert_eq!((got, error.code), (Some(id), -32600), "{text}");
        }
        assert_eq!(parse(b"{nope}").unwrap_err().code, -32700);
    }
}
