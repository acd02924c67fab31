//! `ringmillctl hist`: latencies per stage on the terminal or into a file.

use std::{fs, path::PathBuf, time::SystemTime};

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::{Context, CtlError, is_interactive};
use crate::hist::{
    self, Row,
    dump::{self, Format},
    plot, table,
};

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum FormatArg {
    /// Figures and whole histograms
    Json,
    /// HdrHistogram interval log, for HdrHistogram's own tools
    Hlog,
    /// Percentile curves
    Svg,
}

#[derive(Debug, Subcommand)]
pub(super) enum HistCommand {
    /// Percentile tables and plots
    #[command(
        after_help = "Stages: queue is from the guest's hand-over to the pass that took the request, device until
the device has answered, complete until the guest can see it; total is all of it."
    )]
    Show {
        /// Only this controller
        name: Option<String>,
        /// Each queue on its own
        #[arg(long)]
        per_queue: bool,
        /// Tables only
        #[arg(long)]
        no_plot: bool,
    },
    /// Write latencies to a file
    #[command(after_help = "Examples:
  ringmillctl hist dump vm1.svg
  ringmillctl hist dump --format hlog --name vm1 - > vm1.hlog")]
    Dump {
        /// File; - is standard output
        file: PathBuf,
        /// Only this controller
        #[arg(long)]
        name: Option<String>,
        /// Form of the file [default: from its extension]
        #[arg(long, value_enum)]
        format: Option<FormatArg>,
        /// Add the queues up
        #[arg(long)]
        merge: bool,
    },
    /// Start afresh
    Reset {
        /// Only this controller
        name: Option<String>,
    },
}

pub(super) fn run(context: &mut Context<'_>, command: HistCommand) -> Result<(), CtlError> {
    match command {
        HistCommand::Show { name, per_queue, no_plot } => {
            show(context, name.as_deref(), per_queue, no_plot)
        }
        HistCommand::Dump { file, name, format, merge } => {
            let format = match format.or_else(|| from_extension(&file)) {
                Some(FormatArg::Json) => Format::Json,
                Some(FormatArg::Hlog) => Format::Hlog,
                Some(FormatArg::Svg) => Format::Svg,
                None => {
                    let message = format!(
                        "{}: the name does not say the form; end it in .json, .hlog or .svg, or give --format",
                        file.display()
                    );
                    return Err(CtlError::Usage(message));
                }
            };
            let (_, mut rows) = fetch(context, name.as_deref())?;
            if merge || format == Format::Svg {
                rows = hist::merge_queues(rows);
            }
            let bytes = dump::render(&rows, format, SystemTime::now())
                .map_err(|error| CtlError::Io(error.to_string()))?;
            if file.as_os_str() == "-" {
                return Ok(context.out.write_all(&bytes)?);
            }
            fs::write(&file, bytes).map_err(|error| {
                CtlError::Io(format!("cannot write {}: {error}", file.display()))
            })?;
            let line = format!("{} histograms are in {}", rows.len(), file.display());
            context.say(&json!({ "file": file, "histograms": rows.len() }), &line)
        }
        HistCommand::Reset { name } => {
            let params = name.map_or(Value::Null, |name| json!({ "ctrlr": name }));
            context.call("latency_reset_histograms", params)?;
            context.say(&Value::Bool(true), "latencies start afresh")
        }
    }
}

fn from_extension(file: &std::path::Path) -> Option<FormatArg> {
    match file.extension()?.to_str()? {
        "json" => Some(FormatArg::Json),
        "hlog" => Some(FormatArg::Hlog),
        "svg" => Some(FormatArg::Svg),
        _ => None,
    }
}

fn show(
    context: &mut Context<'_>,
    name: Option<&str>,
    per_queue: bool,
    no_plot: bool,
) -> Result<(), CtlError> {
    let (answer, mut rows) = fetch(context, name)?;
    if context.json {
        return Ok(writeln!(context.out, "{answer:#}")?);
    }
    if !per_queue {
        rows = hist::merge_queues(rows);
    }
    write!(context.out, "{}", table::render(&rows))?;
    let plots = if no_plot { String::new() } else { plot::render(&rows) };
    if !plots.is_empty() {
        write!(context.out, "\n{plots}")?;
    }
    if is_interactive() && rows.is_empty() {
        writeln!(
            context.out,
            "latencies are measured always: they appear with the guest's first request"
        )?;
    }
    Ok(())
}

fn fetch(context: &mut Context<'_>, name: Option<&str>) -> Result<(Value, Vec<Row>), CtlError> {
    let params = name.map_or(Value::Null, |name| json!({ "ctrlr": name }));
    let answer = context.call("latency_get_histograms", params)?;
    let rows = hist::rows_of(&answer).map_err(|error| CtlError::Io(error.to_string()))?;
    Ok((answer, rows))
}
