//! Parameters: described once as data, checked against it, then read without errors.
//!
//! [`Params::check`] is the only place where a parameter can be refused for its name or type. Afterwards the typed
//! readers return what the table promised. `null` counts as absent, because some clients send it for "not given".

use std::fmt;

use serde_json::{Map, Value};

use super::{error::RpcError, nearest::hint};

/// This limit and that of 64 bits are the machine's, not the method's; people need not see them.
const U32_MAX: u64 = 0xffff_ffff;

/// Type of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A string, not empty.
    Text,
    /// true or false.
    Flag,
    /// A whole number from 0 to this.
    Number(u64),
    /// An array of strings.
    Texts,
    /// An array of whole numbers.
    Numbers,
    /// One of these words.
    Word(&'static [&'static str]),
    /// Accepted only as false, 0 or empty: clients send it, ringmill has no such thing.
    Unsupported,
    /// Accepted only as one of these JSON texts: clients send it, ringmill cannot be told otherwise.
    Fixed(&'static [&'static str]),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text => write!(f, "a string"),
            Self::Flag => write!(f, "true or false"),
            Self::Number(U32_MAX | u64::MAX) => write!(f, "a whole number"),
            Self::Number(max) => write!(f, "a whole number from 0 to {max}"),
            Self::Texts => write!(f, "an array of strings"),
            Self::Numbers => write!(f, "an array of whole numbers"),
            Self::Word([word]) => f.write_str(word),
            Self::Word(words) => write!(f, "one of {}", words.join(", ")),
            Self::Unsupported => write!(f, "false (not supported)"),
            Self::Fixed(texts) => write!(f, "{} (nothing else is supported)", texts.join(" or ")),
        }
    }
}

/// One parameter of a method.
#[derive(Debug, Clone, Copy)]
pub struct Param {
    /// Its name on the wire.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Whether it must be given.
    pub required: bool,
    /// What holds when it is not given; for people.
    pub default: &'static str,
    /// One line for people.
    pub help: &'static str,
}

impl Param {
    /// A parameter that must be given.
    pub(super) const fn must(name: &'static str, kind: Kind, help: &'static str) -> Self {
        Self { name, kind, required: true, default: "", help }
    }

    /// A parameter that may be given.
    pub(super) const fn may(
        name: &'static str,
        kind: Kind,
        default: &'static str,
        help: &'static str,
    ) -> Self {
        Self { name, kind, required: false, default, help }
    }

    /// A parameter that clients send and ringmill has one answer to.
    pub(super) const fn fixed(name: &'static str, texts: &'static [&'static str]) -> Self {
        let default = match texts.first() {
            Some(text) => text,
            None => "",
        };
        Self { name, kind: Kind::Fixed(texts), required: false, default, help: "cannot be changed" }
    }

    /// Only there for clients that send it.
    pub fn is_ignored(&self) -> bool {
        matches!(self.kind, Kind::Unsupported | Kind::Fixed(_))
    }

    /// A parameter that clients send and ringmill cannot honour.
    pub(super) const fn unsupported(name: &'static str) -> Self {
        Self {
            name,
            kind: Kind::Unsupported,
            required: false,
            default: "false",
            help: "not supported",
        }
    }
}

/// Checked parameters of one call.
#[derive(Debug, Clone, Default)]
pub struct Params {
    values: Map<String, Value>,
}

impl Params {
    /// Checks names, presence and types against the table.
    pub fn check(
        method: &str,
        table: &'static [Param],
        mut values: Map<String, Value>,
    ) -> Result<Self, RpcError> {
        for (name, value) in &values {
            let Some(param) = table.iter().find(|param| param.name == name) else {
                return Err(unknown(method, table, name));
            };
            if !value.is_null() {
                check_type(method, param, value)?;
            }
        }
        values.retain(|_, value| !value.is_null());
        for param in table.iter().filter(|param| param.required) {
            if !values.contains_key(param.name) {
                return Err(RpcError::params(format!(
                    "{method} needs the parameter \"{}\": {}",
                    param.name, param.help
                )));
            }
        }
        Ok(Self { values })
    }

    /// The parameters as they would be sent again.
    pub(super) fn into_map(self) -> Map<String, Value> {
        self.values
    }

    /// An optional string.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.get(name).and_then(Value::as_str)
    }

    /// A required string.
    pub fn text_required(&self, name: &str) -> &str {
        self.text(name).unwrap_or_default()
    }

    /// A flag; absent is false.
    pub fn flag(&self, name: &str) -> bool {
        self.values.get(name).and_then(Value::as_bool).unwrap_or(false)
    }

    /// An optional number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.values.get(name).and_then(Value::as_u64)
    }

    /// An optional number of a smaller type; the table's maximum has made sure that it fits.
    pub fn number_as<T: TryFrom<u64>>(&self, name: &str) -> Option<T> {
        self.number(name).and_then(|number| T::try_from(number).ok())
    }

    /// Strings; absent is none.
    pub fn texts(&self, name: &str) -> Vec<String> {
        let items =
            self.values.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        items.iter().filter_map(|item| item.as_str().map(str::to_owned)).collect()
    }

    /// Numbers; absent is none.
    pub fn numbers(&self, name: &str) -> Vec<u64> {
        let items =
            self.values.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        items.iter().filter_map(Value::as_u64).collect()
    }
}

fn unknown(method: &str, table: &[Param], name: &str) -> RpcError {
    let known: Vec<&str> = table.iter().filter(|p| !p.is_ignored()).map(|p| p.name).collect();
    let takes = if known.is_empty() {
        "it takes none".to_owned()
    } else {
        format!("it takes {}", known.join(", "))
    };
    let name: String = name.chars().take(64).collect();
    RpcError::params(format!(
        "{method} has no parameter \"{name}\"{}; {takes}",
        hint(&name, known.iter().copied())
    ))
}

fn check_type(method: &str, param: &Param, value: &Value) -> Result<(), RpcError> {
    let fits = match param.kind {
        Kind::Text => value.as_str().is_some_and(|text| !text.is_empty()),
        Kind::Flag => value.is_boolean(),
        Kind::Number(max) => value.as_u64().is_some_and(|number| number <= max),
        Kind::Texts => value.as_array().is_some_and(|items| items.iter().all(Value::is_string)),
        Kind::Numbers => value.as_array().is_some_and(|items| items.iter().all(Value::is_u64)),
        Kind::Fixed(texts) => texts.contains(&value.to_string().as_str()),
        Kind::Word(words) => value.as_str().is_some_and(|text| words.contains(&text)),
        Kind::Unsupported => {
            let is_off = match value {
                Value::Bool(on) => !on,
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::String(text) => text.is_empty(),
                Value::Array(items) => items.is_empty(),
                Value::Object(fields) => fields.is_empty(),
                Value::Null => true,
            };
            if is_off {
                return Ok(());
            }
            return Err(RpcError::params(format!(
                "{method}: \"{}\" = {} is not supported; leave it out",
                param.name,
                shown(value)
            )));
        }
    };
    if fits {
        return Ok(());
    }
    let words: &[&str] = if let Kind::Word(words) = param.kind { words } else { &[] };
    Err(RpcError::params(format!(
        "{method}: \"{}\" must be {}, not {}{}",
        param.name,
        param.kind,
        shown(value),
        hint(value.as_str().unwrap_or_default(), words.iter().copied())
    )))
}

/// A value in an error message: short, whatever it is.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 64 {
        return text;
    }
    let mut short: String = text.chars().take(60).collect();
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TABLE: &[Param] = &[
        Param::must("name", Kind::Text, "what to call it"),
        Param::may("block_size", Kind::Number(4096), "512", "bytes per block"),
        Param::may("mode", Kind::Word(&["poll", "adaptive"]), "poll", "how"),
        Param::may("opts", Kind::Numbers, "", "numbers"),
        Param::unsupported("md_interleave"),
    ];

    fn check(value: Value) -> Result<Params, RpcError> {
        let Value::Object(map) = value else { panic!("not an object") };
        Params::check("make", TABLE, map)
    }

    #[test]
    fn what_the_table_allows_is_taken() {
        let params =
            check(json!({"name": "a", "block_size": 512, "mode": null, "md_interleave": false, "opts": [1]}))
                .unwrap();
        assert_eq!(params.text_required("name"), "a");
        assert_eq!(params.number_as::<u32>("block_size"), Some(512));
        assert_eq!(params.text("mode"), None);
        assert_eq!(params.numbers("opts"), [1]);
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        for (value, want) in [
            (
                json!({"name": "a", "blocksize": 1}),
                "no parameter \"blocksize\" (did you mean \"block_size\"?",
            ),
            (json!({"block_size": 1}), "needs the parameter \"name\""),
            (json!({"name": ""}), "\"name\" must be a string"),
            (json!({"name": "a", "block_size": 4097}), "from 0 to 4096, not 4097"),
            (json!({"name": "a", "block_size": 512.0}), "not 512.0"),
            (json!({"name": "a", "block_size": -1}), "not -1"),
            (json!({"name": "a", "block_size": "512"}), "not \"512\""),
            (json!({"name": "a", "mode": "adaptve"}), "did you mean \"adaptive\"?"),
            (json!({"name": "a", "opts": [1, "x"]}), "an array of whole numbers"),
            (
                json!({"name": "a", "md_interleave": true}),
                "\"md_interleave\" = true is not supported",
            ),
        ] {
            let error = check(value).unwrap_err();
            assert_eq!(error.code, -32602);
            assert!(error.message.contains(want), "{} lacks {want}", error.message);
        }
    }
}
