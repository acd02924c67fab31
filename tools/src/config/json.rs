//! The JSON form of a configuration: `{"subsystems":[{"subsystem":…,"config":[{"method":…,"params":…},…]},…]}`.

use serde_json::Value;

use super::{Config, ConfigCall, ConfigError};

/// Parses a saved configuration; `file` is its name in messages.
pub fn parse(file: &str, text: &str) -> Result<Config, ConfigError> {
    let value: Value = serde_json::from_str(text).map_err(|error| {
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or(&message).to_owned();
        ConfigError::Mistake {
            place: format!("{file}:{}:{}", error.line(), error.column()),
            message,
        }
    })?;
    let mistake =
        |place: String, message: &str| ConfigError::Mistake { place, message: message.to_owned() };
    let Some(subsystems) = value.get("subsystems").and_then(Value::as_array) else {
        return Err(mistake(
            file.to_owned(),
            "a configuration is {\"subsystems\": [{\"subsystem\": …, \"config\": […]}]}, as save_config writes it",
        ));
    };
    let mut calls = Vec::new();
    for (index, subsystem) in subsystems.iter().enumerate() {
        let place = match subsystem.get("subsystem").and_then(Value::as_str) {
            Some(name) => format!("{file}: subsystem \"{name}\""),
            None => format!("{file}: subsystem number {}", index + 1),
        };
        let config = match subsystem.get("config") {
            // Subsystems without any settings are saved with null.
            Some(Value::Null) => continue,
            Some(Value::Array(config)) => config,
            _ => return Err(mistake(place, "needs a \"config\" with an array of calls")),
        };
        for (index, call) in config.iter().enumerate() {
            calls.push(parse_call(&format!("{place}, call {}", index + 1), call)?);
        }
    }
    Ok(Config { calls, ..Config::default() })
}

fn parse_call(place: &str, call: &Value) -> Result<ConfigCall, ConfigError> {
    let mistake = |message: String| Err(ConfigError::Mistake { place: place.to_owned(), message });
    let Some(fields) = call.as_object() else {
        return mistake("a call is {\"method\": …, \"params\": {…}}".to_owned());
    };
    let Some(method) = fields.get("method").and_then(Value::as_str) else {
        return mistake("a call needs a \"method\", as a string".to_owned());
    };
    let params = match fields.get("params") {
        None | Some(Value::Null) => serde_json::Map::new(),
        Some(Value::Object(params)) => params.clone(),
        Some(_) => return mistake("\"params\" must be an object".to_owned()),
    };
    if let Some(key) = fields.keys().find(|key| !matches!(key.as_str(), "method" | "params")) {
        return mistake(format!("a call has no \"{key}\"; it has method and params"));
    }
    Ok(ConfigCall { method: method.to_owned(), params, place: place.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_configuration_becomes_calls_in_order() {
        let text = r#"{"subsystems":[{"subsystem":"iobuf","config":null},
            {"subsystem":"bdev","config":[{"method":"bdev_null_create","params":{"name":"a"}},{"method":"x"}]}]}"#;
        let config = parse("a.json", text).unwrap();
        assert_eq!(config.calls.len(), 2);
        assert_eq!(config.calls[0].params["name"], "a");
        assert_eq!(config.calls[1].place, "a.json: subsystem \"bdev\", call 2");
    }

    #[test]
    fn mistakes_are_one_line_with_their_place() {
        for (text, want) in [
            ("{\n  \"subsystems\": [,]}", "a.json:2:18: expected value"),
            ("[]", "a.json: a configuration is {\"subsystems\""),
            (
                r#"{"subsystems":[{"subsystem":"bdev"}]}"#,
                "a.json: subsystem \"bdev\": needs a \"config\"",
            ),
            (r#"{"subsystems":[{"config":[5]}]}"#, "a.json: subsystem number 1, call 1: a call is"),
            (
                r#"{"subsystems":[{"subsystem":"b","config":[{"method":"m","parms":{}}]}]}"#,
                "a.json: subsystem \"b\", call 1: a call has no \"parms\"",
            ),
        ] {
            let message = parse("a.json", text).unwrap_err().to_string();
            assert!(message.starts_with(want), "{message}");
            assert!(!message.contains('\n'));
        }
    }
}
