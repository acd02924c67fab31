//! Parameters on the command line: one JSON object, or `key=value` words typed after the method's table.

use serde_json::{Map, Value};

use super::CtlError;
use crate::rpc::{
    methods,
    params::{Kind, Param, Params},
};

/// The parameters of a call; checked here if the method is known, so that mistakes are usage errors.
pub fn params(method: &str, words: &[String]) -> Result<Value, CtlError> {
    let usage = |message: String| CtlError::Usage(message);
    let table = methods::find(method).map(|method| method.params).unwrap_or_default();
    let values = match words {
        [] => Map::new(),
        [json] if json.trim_start().starts_with('{') => serde_json::from_str(json)
            .map_err(|error| usage(format!("the parameters are not a JSON object: {error}")))?,
        words => {
            let mut values = Map::new();
            for word in words {
                let (key, text) = word.split_once('=').ok_or_else(|| {
                    usage(format!("\"{word}\" is neither key=value nor a JSON object; see `ringmillctl help {method}`"))
                })?;
                let param = table.iter().find(|param| param.name == key);
                if values.insert(key.to_owned(), value(param, text)).is_some() {
                    return Err(usage(format!("\"{key}\" is given twice")));
                }
            }
            values
        }
    };
    if let Some(method) = methods::find(method) {
        Params::check(method.name, method.params, values.clone()).map_err(|error| {
            usage(format!("{}; see `ringmillctl help {}`", error.message, method.name))
        })?;
    }
    Ok(if values.is_empty() { Value::Null } else { Value::Object(values) })
}

/// What a word means for a parameter: what its type says, or for an unknown one what it looks like.
fn value(param: Option<&Param>, text: &str) -> Value {
    let as_json = || serde_json::from_str(text).unwrap_or_else(|_| text.into());
    let as_list = || match as_json() {
        list @ Value::Array(_) => list,
        _ => text
            .split(',')
            .map(|item| {
                serde_json::from_str::<Value>(item)
                    .ok()
                    .filter(Value::is_u64)
                    .unwrap_or_else(|| item.into())
            })
            .collect(),
    };
    match param.map(|param| param.kind) {
        Some(Kind::Text | Kind::Word(_)) => text.into(),
        Some(Kind::Numbers) => as_list(),
        Some(Kind::Texts) => match as_json() {
            list @ Value::Array(_) => list,
            _ => text.split(',').collect(),
        },
        Some(Kind::Flag | Kind::Number(_) | Kind::Unsupported | Kind::Fixed(_)) | None => as_json(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(method: &str, words: &[&str]) -> Result<Value, String> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        params(method, &words).map_err(|error| error.to_string())
    }

    #[test]
    fn words_are_typed_after_the_method() {
        assert_eq!(
            parse("bdev_null_create", &["name=7", "num_blocks=8", "block_size=512"]),
            Ok(json!({"name": "7", "num_blocks": 8, "block_size": 512}))
        );
        assert_eq!(
            parse("bdev_get_histogram_borders", &["name=a", "borders=1,2"]),
            Ok(json!({"name": "a", "borders": [1, 2]}))
        );
        assert_eq!(parse("bdev_get_iostat", &["names=a,1"]), Ok(json!({"names": ["a", "1"]})));
        assert_eq!(parse("bdev_get_iostat", &[r#"{"names":["a"]}"#]), Ok(json!({"names": ["a"]})));
        assert_eq!(parse("framework_wait_init", &[]), Ok(Value::Null));
        assert_eq!(parse("later_method", &["a=1", "b=x"]), Ok(json!({"a": 1, "b": "x"})));
    }

    #[test]
    fn mistakes_say_which_word_and_where_to_look() {
        for (words, want) in [
            (&["nonsense"][..], "neither key=value"),
            (&["{\"a\":"], "not a JSON object"),
            (&["name=a", "name=b"], "given twice"),
            (
                &["name=a", "num_blocks=many", "block_size=512"],
                "\"num_blocks\" must be a whole number",
            ),
            (&["nam=a"], "did you mean \"name\"?"),
        ] {
            let message = parse("bdev_null_create", words).unwrap_err();
            assert!(message.contains(want), "{message}");
        }
    }
}
