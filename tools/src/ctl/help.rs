//! `ringmillctl help`: commands as clap explains them, methods from the RPC's table.

use std::io::Write;

use clap::CommandFactory;

use super::{Cli, CtlError, plain_table};
use crate::rpc::{
    methods::{METHODS, Method, find},
    nearest::hint,
    params::Kind,
};

/// Explains a topic, or lists what there is.
pub(super) fn help(topic: Option<&str>, out: &mut dyn Write) -> Result<(), CtlError> {
    let mut command = Cli::command();
    let Some(topic) = topic else {
        writeln!(out, "{}", command.render_long_help())?;
        writeln!(out, "\nMethods for `ringmillctl call`; `ringmillctl help METHOD` tells more:")?;
        let rows =
            METHODS.iter().map(|m| vec![format!("  {}", m.name), m.help.to_owned()]).collect();
        return Ok(write!(out, "{}", plain_table(&["", ""], rows).trim_start_matches('\n'))?);
    };
    if let Some(method) = find(topic) {
        return Ok(write!(out, "{}", method_text(method))?);
    }
    if let Some(subcommand) = command.find_subcommand_mut(topic) {
        return Ok(writeln!(out, "{}", subcommand.render_long_help())?);
    }
    let commands: Vec<String> =
        command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let known = METHODS.iter().map(|method| method.name).chain(commands.iter().map(String::as_str));
    Err(CtlError::Usage(format!(
        "no command or method \"{topic}\"{}; `ringmillctl help` lists them",
        hint(topic, known)
    )))
}

fn method_text(method: &Method) -> String {
    let mut text = format!("{}\n  {}\n", method.name, method.help);
    let params = || method.params.iter().filter(|param| !param.is_ignored());
    if params().next().is_none() {
        text.push_str("\nNo parameters.\n");
    } else {
        text.push_str("\nParameters:\n");
        let width = params().map(|param| param.name.len()).max().unwrap_or(0);
        for param in params() {
            let need = match (param.required, param.default) {
                (true, _) => "required".to_owned(),
                (false, "") => "optional".to_owned(),
                (false, default) => format!("default: {default}"),
            };
            text.push_str(&format!("  {:width$}  {}; {need}\n", param.name, param.kind));
            text.push_str(&format!("  {:width$}  {}\n", "", param.help));
        }
    }
    let ignored: Vec<&str> = method
        .params
        .iter()
        .filter(|param| param.kind == Kind::Unsupported)
        .map(|param| param.name)
        .collect();
    if !ignored.is_empty() {
        text.push_str(&format!("\nAccepted only as false or 0: {}\n", ignored.join(", ")));
    }
    let fixed: Vec<String> = method
        .params
        .iter()
        .filter_map(|param| match param.kind {
            Kind::Fixed(texts) => Some(format!("{} = {}", param.name, texts.join(" or "))),
            _ => None,
        })
        .collect();
    if !fixed.is_empty() {
        text.push_str(&format!("\nAccepted only so: {}\n", fixed.join(", ")));
    }
    let example: Vec<String> = params()
        .filter(|param| param.required)
        .map(|param| format!("{}={}", param.name, sample(param.kind)))
        .collect();
    text.push_str(&format!("\nExample:\n  ringmillctl call {} {}", method.name, example.join(" ")));
    format!("{}\n", text.trim_end())
}

fn sample(kind: Kind) -> String {
    match kind {
        Kind::Text => "NAME".to_owned(),
        Kind::Flag => "true".to_owned(),
        Kind::Number(_) => "512".to_owned(),
        Kind::Texts => "A,B".to_owned(),
        Kind::Numbers => "10,100,1000".to_owned(),
        Kind::Word(words) => words.first().copied().unwrap_or_default().to_owned(),
        Kind::Unsupported => "false".to_owned(),
        Kind::Fixed(texts) => texts.first().copied().unwrap_or_default().to_owned(),
    }
}
