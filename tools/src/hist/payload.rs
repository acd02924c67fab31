//! Histograms as text: HdrHistogram's V2-compressed form in base64, which all its implementations read.

use std::io::Cursor;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hdrhistogram::{
    Histogram,
    serialization::{Deserializer, Serializer, V2DeflateSerializer},
};

/// A payload that is not a histogram.
#[derive(Debug, thiserror::Error)]
#[error("not a V2-compressed HdrHistogram payload: {0}")]
pub struct PayloadError(String);

/// A histogram as base64 of its V2-compressed form (`HISTFAA…`).
pub fn encode(histogram: &Histogram<u64>) -> Result<String, PayloadError> {
    let mut bytes = Vec::new();
    V2DeflateSerializer::new()
        .serialize(histogram, &mut bytes)
        .map_err(|error| PayloadError(error.to_string()))?;
    Ok(STANDARD.encode(bytes))
}

/// The histogram in such a text.
pub fn decode(text: &str) -> Result<Histogram<u64>, PayloadError> {
    let bytes = STANDARD.decode(text).map_err(|error| PayloadError(error.to_string()))?;
    Deserializer::new()
        .deserialize(&mut Cursor::new(bytes))
        .map_err(|error| PayloadError(error.to_string()))
}
